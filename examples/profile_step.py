"""Where the time of a decode step goes, against the bytes that it reads; and what one operator alone can do.

    python examples/profile_step.py --onnx hybrid=run --onnx all=run-all --dtypes fp32 int8 --contexts 128 7900 \
        --json out.json

--onnx NAME=RUN is a run folder. Every step is timed without ONNX Runtime's profiler and then with it, which makes all
nodes slower; a part's time is the sum of the medians of its nodes, and its bytes are the weights, caches or states that
it must read, recurrent states also written. Then single operators, in models of their own whose weights or caches are
beyond every cache of the processor: a product with one row in float32, by blocks of 8-bit weights (--widths) and, as
MatMulIntegerToFloat, with one scale for each output; and GroupQueryAttention behind the longest context with --heads
query heads for each number of key heads that divides them, in float32 and on int8 caches, beside its two products as
MatMul, one row for each query head of a group; its scores with the keys as left operand, a column for each query; its
values from a cache that is transposed; and a copy of one cache, as a plain operator would need of one that is not full.
All on --threads threads; run it with GLIBC_TUNABLES=glibc.malloc.hugetlb=1 for pages of 2 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from bench_onnx import operators
from bench_serving import for_contexts
from bench_variants import read_bandwidth, weight_bytes
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tcal_compiler.runtime.quantize import WEIGHT_TYPES
from tcal_compiler.runtime.session import OnnxSession
from tcal_compiler.runtime.speed import decode_seconds, go_behind

PRODUCTS, ATTENTION, RECURRENCE = ("MatMul", "MatMulNBits", "Gemm"), "GroupQueryAttention", "LinearAttention"
BLOCKS = (16, 32, 64, 128, 256)  # those that MatMulNBits knows
BEYOND_CACHES = 120e6  # bytes or more of weights or caches that a timed run goes through


def parts(folder: Path, context: int, steps: int, threads: int) -> dict[str, Any]:
    """A step's time and its parts: milliseconds, number of nodes and the megabytes that they must read."""
    session = OnnxSession(folder, threads=threads)
    go_behind(session, context)
    states, moved = session.state_bytes, session.step_bytes
    step = decode_seconds(session, steps=steps)
    del session
    written = moved - states  # of recurrent states
    weights = weight_bytes(folder / "model.onnx")
    reads = {"products": weights, ATTENTION: states - written, RECURRENCE: 2 * written, "other operators": 0}
    found = {name: {"ms": 0.0, "nodes": 0, "mb": bytes_ / 1e6} for name, bytes_ in reads.items()}
    for kind, row in operators(folder, context, steps, threads).items():
        name = "products" if kind in PRODUCTS else kind if kind in found else "other operators"
        for key in ("ms", "nodes"):
            found[name][key] += row[key]
    return {"step_ms": 1e3 * step, "moved_mb": (weights + moved) / 1e6, "parts": found}


def session_of(nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: list[Any], threads: int) -> Any:
    graph = helper.make_graph(nodes, "one", inputs, outputs, [numpy_helper.from_array(a, n) for n, a in weights])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def tensor(name: str, *shape: int, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def median_seconds(call: Callable[[], Any], count: int = 15) -> float:
    times = []
    for _ in range(count + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def product(width: int, out: int, block: int | None, threads: int) -> dict[str, float]:
    """[1, width] @ [width, out], float32 or (block) of 8-bit weights: microseconds and bytes of one.

    block: how many weights have a scale; those of an output where it is the whole width.
    """
    rng, weights, nodes = np.random.default_rng(0), [], []
    one = 4 * width * out if block is None else out * -(-width // block) * (block + 4)
    count = max(2, round(BEYOND_CACHES / one))
    if block == width:
        nodes.append(helper.make_node("DynamicQuantizeLinear", ["x"], ["bytes", "scale", "zero"]))
    for i in range(count):
        if block == width:
            weights += [(f"w{i}", rng.integers(-127, 127, (width, out), np.int8)), (f"s{i}", np.ones(out, np.float32))]
            names = ["bytes", f"w{i}", "scale", f"s{i}", "zero"]
            nodes.append(helper.make_node("MatMulIntegerToFloat", names, [f"y{i}"], domain="com.microsoft"))
            continue
        if block is None:
            weights.append((f"w{i}", rng.standard_normal((width, out), np.float32)))
            nodes.append(helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]))
            continue
        shape = (out, -(-width // block), block)
        weights += [(f"w{i}", rng.integers(0, 255, shape, np.uint8)), (f"s{i}", np.ones(shape[:2], np.float32))]
        options = {"K": width, "N": out, "bits": 8, "block_size": block, "accuracy_level": 4}
        ends = ["x", f"w{i}", f"s{i}"], [f"y{i}"]
        nodes.append(helper.make_node("MatMulNBits", *ends, domain="com.microsoft", **options))
    outputs = [tensor(f"y{i}", 1, 1, out) for i in range(count)]
    session = session_of(nodes, [tensor("x", 1, 1, width)], outputs, weights, threads)
    x = rng.standard_normal((1, 1, width), np.float32)
    seconds = median_seconds(lambda: session.run(None, {"x": x})) / count
    return {"us": 1e6 * seconds, "gb_s": one / seconds / 1e9}


def attention(heads: int, kv_heads: int, dim: int, context: int, threads: int, int8: bool = False) -> dict[str, float]:
    """One token behind `context` others: microseconds, and the speed at which caches are read if they are read once."""
    slots, one = context + 1, 2 * kv_heads * context * dim * (1 if int8 else 4)
    cache, kind = (1, kv_heads, slots, dim), TensorProto.INT8 if int8 else TensorProto.FLOAT
    names = ["q", "k", "v", "past_k", "past_v", "last", "total"]
    inputs = [tensor("q", 1, 1, heads * dim), *(tensor(n, 1, 1, kv_heads * dim) for n in "kv")]
    inputs += [tensor("past_k", *cache, kind=kind), tensor("past_v", *cache, kind=kind)]
    inputs += [tensor("last", 1, kind=TensorProto.INT32), tensor("total", kind=TensorProto.INT32)]
    outputs = [tensor("o", 1, 1, heads * dim), *(tensor(n, *cache, kind=kind) for n in ("new_k", "new_v"))]
    options: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads}
    scales = []
    if int8:
        names += ["", "", "", "", "", "scales", "scales"]
        scales = [("scales", np.full((1, kv_heads, 1, dim), 0.03, np.float32))]
        options |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    node = helper.make_node(ATTENTION, names, ["o", "new_k", "new_v"], domain="com.microsoft", **options)
    session = session_of([node], inputs, outputs, scales, threads)
    bindings = [bound(session, inputs, cache, context) for _ in range(max(2, round(BEYOND_CACHES / one)))]
    seconds = median_seconds(lambda: [session.run_with_iobinding(b) for b, _ in bindings]) / len(bindings)
    return {"us": 1e6 * seconds, "gb_s": one / seconds / 1e9}


def grouped(heads: int, kv_heads: int, dim: int, context: int, threads: int) -> dict[str, float]:
    """The same by two plain products, no softmax: a group's queries are rows of one, so that keys are read once."""
    rows, one = heads // kv_heads, 2 * kv_heads * context * dim * 4
    count, rng = max(2, round(BEYOND_CACHES / one)), np.random.default_rng(0)
    shapes = {"q": (rows, dim), "k": (dim, context), "p": (rows, context), "v": (context, dim)}
    feeds = {f"{n}{i}": rng.standard_normal((kv_heads, *shapes[n]), np.float32) for n in "qkpv" for i in range(count)}
    pairs = [(f"{a}{i}", f"{b}{i}", f"{a}{b}{i}") for i in range(count) for a, b in ("qk", "pv")]
    nodes = [helper.make_node("MatMul", [a, b], [c]) for a, b, c in pairs]
    outputs = [tensor(c, kv_heads, rows, context if c[0] == "q" else dim) for *_, c in pairs]
    session = session_of(nodes, [tensor(n, *a.shape) for n, a in feeds.items()], outputs, [], threads)
    values = {n: ort.OrtValue.ortvalue_from_numpy(a) for n, a in feeds.items()}
    names = [c for *_, c in pairs]
    seconds = median_seconds(lambda: session.run_with_ort_values(names, values)) / count
    return {"us": 1e6 * seconds, "gb_s": one / seconds / 1e9}


def single(name: str, heads: int, kv_heads: int, dim: int, context: int, threads: int) -> dict[str, float]:
    """One product of attention with a cache as left operand, or (copy) a copy of all but its last slot."""
    rows, one = heads // kv_heads, kv_heads * context * dim * 4
    cache = (kv_heads, dim, context) if name == "values" else (kv_heads, context, dim)
    right = (kv_heads, cache[2], rows)
    result = (kv_heads, context - 1, dim) if name == "copy" else (*cache[:2], rows)
    rng, count = np.random.default_rng(0), max(2, round(BEYOND_CACHES / one))
    caches = [(f"c{i}", rng.standard_normal(cache, np.float32)) for i in range(count)]
    feeds = dict(caches) if name == "copy" else dict(caches) | {"x": rng.standard_normal(right, np.float32)}
    bounds = [(n, np.array([v])) for n, v in (("first", 0), ("last", context - 1), ("axis", 1))]
    ends = [n for n, _ in bounds] if name == "copy" else ["x"]
    kind = "Slice" if name == "copy" else "MatMul"
    nodes = [helper.make_node(kind, [n, *ends], [f"{n}.out"]) for n, _ in caches]
    outputs = [tensor(f"{n}.out", *result) for n, _ in caches]
    inputs = [tensor(n, *a.shape) for n, a in feeds.items()]
    session = session_of(nodes, inputs, outputs, bounds if name == "copy" else [], threads)
    values = {n: ort.OrtValue.ortvalue_from_numpy(a) for n, a in feeds.items()}
    names = [o.name for o in outputs]
    seconds = median_seconds(lambda: session.run_with_ort_values(names, values)) / count
    return {"us": 1e6 * seconds, "gb_s": one / seconds / 1e9}


def bound(session: Any, inputs: list[Any], cache: tuple[int, ...], context: int) -> tuple[Any, list[Any]]:
    """A binding whose caches are written in place, and the memory that it does not own."""
    rng, binding, kept = np.random.default_rng(0), session.io_binding(), []
    for given in inputs[:5]:
        name, kind = given.name, given.type.tensor_type
        array: NDArray[Any] = rng.standard_normal([d.dim_value for d in kind.shape.dim], np.float32)
        if kind.elem_type == TensorProto.INT8:
            array = (30 * array).clip(-127, 127).astype(np.int8)
        kept.append(ort.OrtValue.ortvalue_from_numpy(array))
        binding.bind_ortvalue_input(name, kept[-1])
    binding.bind_cpu_input("last", np.array([context], np.int32))
    binding.bind_cpu_input("total", np.array(context + 1, np.int32))
    binding.bind_output("o", "cpu")
    for name, value in zip(("new_k", "new_v"), kept[-2:], strict=True):
        binding.bind_ortvalue_output(name, value)
    return binding, kept


def alone(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for width, out in (tuple(map(int, w.split("x"))) for w in args.widths):
        for block in (None, *BLOCKS, width):
            kind = "float32" if block is None else f"8 bits in blocks of {block}"
            name = f"product {width} x {out}, " + ("8 bits by MatMulIntegerToFloat" if block == width else kind)
            yield {"name": name} | product(width, out, block, args.threads)
    for kv_heads in (k for k in range(1, args.heads + 1) if args.heads % k == 0):
        name = f"{ATTENTION}, {args.heads} query heads on {kv_heads}, behind {max(args.contexts)} tokens"
        sizes = (args.heads, kv_heads, args.dim, max(args.contexts), args.threads)
        yield {"name": name} | attention(*sizes)
        yield {"name": name.replace(ATTENTION, f"{ATTENTION} on int8 caches")} | attention(*sizes, int8=True)
        yield {"name": name.replace(ATTENTION, "its products as MatMul")} | grouped(*sizes)
        forms = {"scores": "its scores, keys as left operand", "values": "its values, transposed cache as left operand"}
        for form, said in (forms | {"copy": "a copy of one cache"}).items():
            yield {"name": name.replace(ATTENTION, said)} | single(form, *sizes)


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--onnx", action="append", default=[], metavar="NAME=RUN")
    p.add_argument("--dtypes", nargs="+", default=["fp32"], choices=["fp32", *WEIGHT_TYPES])
    p.add_argument("--contexts", type=int, nargs="+", default=[128, 7900])
    p.add_argument("--steps", type=int, default=15)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--widths", nargs="*", default=["576x576", "576x1536", "1536x576", "576x49152"], metavar="INxOUT")
    p.add_argument("--heads", type=int, default=9)
    p.add_argument("--dim", type=int, default=64)
    p.add_argument("--json", type=Path)
    return p.parse_args()


def main() -> None:
    args = options()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    where = {"machine": platform.machine(), "onnxruntime": ort.__version__, "threads": args.threads}
    where |= {"GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES"), "commit": commit}
    body: dict[str, Any] = {"environment": where, "read_gb_s": [read_bandwidth() / 1e9], "step_parts": [], "alone": []}
    room = max(args.contexts) + args.steps + 1
    with tempfile.TemporaryDirectory() as work:
        for name, path in (item.split("=", 1) for item in args.onnx):
            for dtype in args.dtypes:
                folder = for_contexts(Path(path) / "onnx", Path(work, f"{name}-{dtype}"), dtype, room)
                for context in args.contexts:
                    row = {"name": f"{name} {dtype}", "context": context}
                    row |= parts(folder, context, args.steps, args.threads)
                    body["step_parts"].append(row)
                    print(json.dumps(row), flush=True)
    for row in alone(args):
        body["alone"].append(row)
        print(f"{row['name']:60} {row['us']:8.1f} us {row['gb_s']:6.1f} GB/s", flush=True)
    body["read_gb_s"].append(read_bandwidth() / 1e9)
    if args.json:
        args.json.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
