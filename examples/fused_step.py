"""What fewer nodes would bring a decode step: rewrites that an export could do, one after the other, timed.

    python examples/fused_step.py --onnx all=run-all --dtypes fp32 int8 --json out.json

Each student is optimised by ONNX Runtime first. Then: the sum of the residual stream and the norm of it become
SkipSimplifiedLayerNormalization, gates LinearAttentionGate, the norm and the gate of outputs GatedRMSNorm (kernels of
ONNX Runtime 1.32), keys are no longer repeated for the heads that share them, and all products of one input become one.
Each row has the rewrites of those above it too; logits must stay. Models take turns, behind --context tokens, on one
thread; run it with GLIBC_TUNABLES=glibc.malloc.hugetlb=1 for pages of 2 MB. For students without kept layers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from bench_serving import for_contexts
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from tcal_compiler.runtime.session import OnnxSession
from tcal_compiler.runtime.speed import decode_seconds, go_behind

NORM, RULE, MICROSOFT = "SimplifiedLayerNormalization", "LinearAttention", "com.microsoft"
LARGEST_ERROR = 1e-3  # of the largest logit


class Rewriter:
    """A model and what reads and makes its values; nodes may be exchanged in any order."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(path)
        self.graph = self.model.graph
        self.constants = {t.name: t for t in self.graph.initializer}
        self._look()

    def _look(self) -> None:
        self.makers = {o: n for n in self.graph.node for o in n.output if o}
        self.readers: dict[str, list[Any]] = {}
        for n in self.graph.node:
            for i in n.input:
                self.readers.setdefault(i, []).append(n)

    def all(self, kind: str) -> list[Any]:
        return [n for n in self.graph.node if n.op_type == kind]

    def array(self, name: str) -> NDArray[Any]:
        return numpy_helper.to_array(self.constants[name])

    def constant(self, name: str, array: NDArray[Any]) -> str:
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(array, name)
            self.graph.initializer.append(self.constants[name])
        return name

    def split(self, node: Any) -> tuple[str, str]:
        """A node's input that is no constant, and the one that is."""
        first, second = node.input
        return (second, first) if first in self.constants else (first, second)

    def exchange(self, old: list[Any], new: list[Any]) -> None:
        gone = {id(n) for n in old}
        waiting = [onnx.NodeProto.FromString(n.SerializeToString()) for n in self.graph.node if id(n) not in gone] + new
        known = {"", *self.constants, *(i.name for i in self.graph.input)}
        del self.graph.node[:]
        while waiting:
            ready = [n for n in waiting if known.issuperset(n.input)]
            assert ready, "a rewrite left a value without a node that makes it"
            self.graph.node.extend(ready)
            known.update(o for n in ready for o in n.output)
            waiting = [n for n in waiting if not known.issuperset(n.output)]
        self._look()


def skip_norms(w: Rewriter) -> None:
    old, new = [], []
    for norm in w.all(NORM):
        total = w.makers.get(norm.input[0])
        if total is None or total.op_type != "Add" or any(i in w.constants for i in total.input):
            continue
        ends = [*total.input, norm.input[1]], [norm.output[0], "", "", total.output[0]]
        eps = next(a.f for a in norm.attribute if a.name == "epsilon")
        new.append(helper.make_node("SkipSimplifiedLayerNormalization", *ends, domain=MICROSOFT, epsilon=eps))
        old += [total, norm]
    w.exchange(old, new)


def gates(w: Rewriter) -> None:
    old, new = [], []
    for rule in w.all(RULE):
        decay, write = (w.makers[w.makers[i].input[2]] for i in rule.input[4:6])  # behind the Where of padding
        soft, scale = w.split(decay)
        softplus = w.makers[soft]
        total = w.makers[softplus.input[0]]
        x, bias = w.split(total)
        ends = [x, bias, scale, write.input[0]], [decay.output[0], write.output[0]]
        new.append(helper.make_node("LinearAttentionGate", *ends, domain=MICROSOFT))
        old += [decay, softplus, total, write]
    w.exchange(old, new)


def gated_norms(w: Rewriter) -> None:
    old, new = [], []
    for rule in w.all(RULE):
        chain = [rule]
        for kind in ("Reshape", NORM, "Mul", "Mul", "Reshape"):
            chain.append(w.readers[chain[-1].output[0]][0])
            assert chain[-1].op_type == kind, chain[-1]
        _, _, norm, weighted, gated, packed = chain
        gate = w.makers[next(i for i in gated.input if i != weighted.output[0])]
        heads = w.makers[gate.input[0]]
        weights, name = w.array(w.split(weighted)[1]), w.split(weighted)[1]
        ones = w.constant(f"ones.{weights.shape[-1]}", np.ones(weights.shape[-1], np.float32))
        eps = next(a.f for a in norm.attribute if a.name == "epsilon")
        ends = [rule.output[0], ones, heads.input[0]], [f"{packed.output[0]}.norm"]
        new.append(helper.make_node("GatedRMSNorm", *ends, domain=MICROSOFT, epsilon=eps, activation="silu"))
        flat = w.constant(f"{name}.flat", weights.reshape(-1))
        new.append(helper.make_node("Mul", [ends[1][0], flat], [packed.output[0]]))
        old += [*chain[1:], gate, heads]
    w.exchange(old, new)


def key_heads(w: Rewriter) -> None:
    old = []
    for rule in w.all(RULE):
        packed = w.makers[rule.input[1]]
        repeated = w.makers[packed.input[0]]
        if repeated.op_type != "Gather":
            continue
        packed.input[0] = repeated.input[0]
        packed.input[1] = w.constant("packed", np.array([0, 0, -1]))
        old.append(repeated)
    w.exchange(old, [])


def merged_products(w: Rewriter) -> None:
    old, new = [], []
    by_input: dict[str, list[Any]] = {}
    for product in w.all("MatMul"):
        if product.input[1] in w.constants:
            by_input.setdefault(product.input[0], []).append(product)
    for x, products in ((x, p) for x, p in by_input.items() if len(p) > 1):
        outputs, biases = [], []
        for product in products:
            out, width = product.output[0], w.array(product.input[1]).shape[1]
            (reader, *others), bias = w.readers[out], np.zeros(width, np.float32)
            if not others and reader.op_type == "Add" and any(i in w.constants for i in reader.input):
                bias, out = w.array(w.split(reader)[1]).reshape(-1), reader.output[0]
                old.append(reader)
            outputs.append(out)
            biases.append(bias)
        old += products
        whole = f"{outputs[0]}.whole"
        matrix = w.constant(f"{whole}.matrix", np.concatenate([w.array(p.input[1]) for p in products], 1))
        new.append(helper.make_node("MatMul", [x, matrix], [whole], whole))
        if any(b.any() for b in biases):
            new.append(
                helper.make_node("Add", [whole, w.constant(f"{whole}.bias", np.concatenate(biases))], [f"{whole}.sum"])
            )
            whole = f"{whole}.sum"
        sizes = w.constant(f"{whole}.sizes", np.array([len(b) for b in biases]))
        new.append(helper.make_node("Split", [whole, sizes], outputs, axis=-1))
    w.exchange(old, new)


REWRITES: dict[str, Callable[[Rewriter], None]] = {
    "sums and norms": skip_norms,
    "gates": gates,
    "gated norms": gated_norms,
    "keys not repeated": key_heads,
    "products of one input": merged_products,
}


def rewritten(run: Path, work: Path, dtype: str, room: int) -> dict[str, Path]:
    """Folders of the student as it is and after each rewrite."""
    plain = for_contexts(run / "onnx", work / "plain", "fp32", room)
    (work / "optimised").mkdir()
    optimised = work / "optimised/model.onnx"
    OnnxSession(plain, threads=1, optimized_path=optimised)
    shutil.copyfile(plain / "genai_config.json", optimised.with_name("genai_config.json"))
    folders, rewriter = {"as exported": optimised.parent}, Rewriter(optimised)
    for i, (name, rewrite) in enumerate(REWRITES.items()):
        rewrite(rewriter)
        folders[f"+ {name}"] = work / str(i)
        folders[f"+ {name}"].mkdir()
        onnx.save(rewriter.model, work / str(i) / "model.onnx")
        shutil.copyfile(plain / "genai_config.json", work / str(i) / "genai_config.json")
    return {n: for_contexts(f, f / dtype, dtype, room) for n, f in folders.items()}


def logits(session: OnnxSession) -> NDArray[Any]:
    """Of a padded batch."""
    ids = np.random.default_rng(0).integers(0, 1000, (2, 9))
    mask = np.ones_like(ids)
    mask[0, :3] = 0
    session.reset(batch=2)
    return np.asarray(session.forward(ids, mask)[mask == 1])


def timed(folders: dict[str, Path], context: int, steps: int, turns: int, exact: bool) -> list[dict[str, Any]]:
    """One model is loaded at a time: several might not find large pages."""
    times: dict[str, list[float]] = {n: [] for n in folders}
    first = None
    for _ in range(turns):
        for name, folder in folders.items():
            session = OnnxSession(folder, threads=1)
            found = logits(session)
            first = found if first is None else first
            assert not exact or np.abs(found - first).max() <= LARGEST_ERROR * np.abs(first).max()
            go_behind(session, context)
            times[name].append(decode_seconds(session, steps=steps))
            del session
    nodes = {n: len(onnx.load(f / "model.onnx", load_external_data=False).graph.node) for n, f in folders.items()}
    return [{"name": n, "nodes": nodes[n], "ms": 1e3 * statistics.median(t)} for n, t in times.items()]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--onnx", action="append", required=True, metavar="NAME=RUN")
    p.add_argument("--dtypes", nargs="+", default=["fp32"], choices=["fp32", "int8", "int4"])
    p.add_argument("--context", type=int, default=128)
    p.add_argument("--steps", type=int, default=15)
    p.add_argument("--turns", type=int, default=5)
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    where = {"machine": platform.machine(), "onnxruntime": ort.__version__, "threads": 1}
    where |= {"GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES"), "commit": commit}
    body: dict[str, Any] = {"environment": where, "context": args.context, "fused": {}}
    room = args.context + args.steps + 1
    for name, run in (item.split("=", 1) for item in args.onnx):
        for dtype in args.dtypes:
            with tempfile.TemporaryDirectory() as work:
                folders = rewritten(Path(run), Path(work), dtype, room)
                rows = timed(folders, args.context, args.steps, args.turns, dtype == "fp32")
            body["fused"][f"{name} {dtype}"] = rows
            for row in rows:
                print(f"{name} {dtype:6} {row['name']:26} {row['nodes']:5} nodes {row['ms']:7.2f} ms", flush=True)
    if args.json:
        args.json.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
