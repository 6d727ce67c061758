"""What smaller weights of ONNX students cost and bring: size, divergence, perplexity, and decode speed with its bound.

    python examples/bench_variants.py --model teacher=run-all --model hybrid=run --contexts 128 7900 --json out.json

Each NAME=RUN is a run folder (or a folder with onnx/); it is read only, variants are written into a temporary folder.
KL is to the float32 student of the same run, on sequences of a text. 8-bit weights come in blocks of each of --blocks;
int8 caches are measured on the calibration text that ships, or on --calibration. Decode is measured on one thread, from
states of small random numbers (decode time does not depend on their values); all variants take turns within a context,
and medians of single-token steps are given. Beside each stands the least time in which this machine can read the bytes
that a step needs: all weights but embedding tables, caches of the context, recurrent states both ways.
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
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from bench_onnx import filled_state, step_times
from numpy.typing import NDArray

from tcal_compiler.runtime import data
from tcal_compiler.runtime.quantize import BLOCKS, WEIGHT_TYPES, divergence, quantize
from tcal_compiler.runtime.session import OnnxSession
from tcal_compiler.runtime.tokenizer import ByteTokenizer, read_tokenizer

TEXTS = Path(data.__file__).parents[1] / "assets/text"
TABLES = ("Gather", "GroupQueryAttention")  # read a row for each token of what else they could read


def weight_bytes(model: Path) -> int:
    """Bytes of weights that one step of one token reads in ONNX Runtime, which widens stored float16 matrices."""
    import onnx

    loaded = onnx.load(model, load_external_data=False)
    readers: dict[str, list[Any]] = {}
    for node in loaded.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    total = 0
    for t in loaded.graph.initializer:
        kinds = {n.op_type for n in readers.get(t.name, [])} - set(TABLES)
        if kinds:
            width = onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize
            widened = t.data_type == onnx.TensorProto.FLOAT16 and kinds == {"Cast"}
            total += int(np.prod(t.dims, dtype=np.int64)) * (4 if widened else width)
    return total


def read_bandwidth(megabytes: int = 512, repeats: int = 7) -> float:
    """Bytes per second that one thread reads from memory: the best of two vectorised reductions."""
    block: NDArray[np.float32] = np.ones(megabytes << 18, np.float32)
    best = 0.0
    for _ in range(repeats):
        for reduction in (np.max, lambda x: np.dot(x, x)):
            start = time.perf_counter()
            reduction(block)
            best = max(best, block.nbytes / (time.perf_counter() - start))
    return best


def text_ids(folder: Path, text: Path, sequences: int, length: int) -> NDArray[np.int64]:
    """Sequences [N, T] of a text, in the tokens of the model in `folder`."""
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
    named = (folder / "tokenizer.json").is_file()
    eos, bos = config.get("eos_token_id"), config.get("bos_token_id")
    tokenizer = read_tokenizer(folder, eos_token_id=eos, bos_token_id=bos) if named else ByteTokenizer()
    return data.text_rows(text, tokenizer, sequences=sequences, length=length).numpy()


def written(
    name: str, source: Path, work: Path, dtypes: Iterable[str], blocks: list[int], ids: NDArray[np.int64]
) -> dict[str, Path]:
    """The folder of every variant of one student, by "name dtype", and the block size behind it where that is not the
    first of several. ids: what caches are measured on."""
    folders = {}
    for dtype in dtypes:
        for i, block in enumerate(blocks if dtype in ("int8", "int8-caches") else blocks[:1]):
            folder = source if dtype == "fp32" else work / f"{name}-{dtype}-{block}"
            if folder != source:
                quantize(source / "model.onnx", folder, dtype, block=block, ids=ids)  # type: ignore[arg-type]
                shutil.copyfile(source / "genai_config.json", folder / "genai_config.json")
            folders[f"{name} {dtype}" + f" in blocks of {block}" * bool(i)] = folder
    return folders


def quality(folder: Path, source: Path, ids: NDArray[np.int64], threads: int) -> dict[str, Any]:
    size = sum(f.stat().st_size for f in folder.iterdir() if f.name.startswith("model.onnx"))
    found = divergence(OnnxSession(source, threads=threads), OnnxSession(folder, threads=threads), ids)
    return {"size_mb": size / 1e6, **asdict(found)}


def decode(folders: dict[str, Path], contexts: list[int], steps: int, turns: int, speed: float) -> dict[str, Any]:
    """Rows by model and context. A model's time is against the first of `folders` with the same weights."""
    sessions = {n: OnnxSession(f, threads=1) for n, f in folders.items()}
    weights = {n: weight_bytes(f / "model.onnx") for n, f in folders.items()}
    table: dict[str, dict[str, Any]] = {n: {} for n in sessions}
    for context in contexts:
        times: dict[str, list[float]] = {n: [] for n in sessions}
        for _ in range(turns):
            for name, session in sessions.items():
                times[name] += step_times(session, filled_state(session, context), steps)
        for name, session in sessions.items():
            median = statistics.median(times[name])
            base = next(n for n in sessions if n.partition(" ")[2] == name.partition(" ")[2])
            session.restore(filled_state(session, context))
            moved = weights[name] + session.step_bytes
            session.reset()
            row = {
                "median_ms": 1e3 * median,
                "tokens_per_s": 1 / median,
                "speedup_over_first": statistics.median(times[base]) / median,
                "moved_mb": moved / 1e6,
                "bound_ms": 1e3 * moved / speed,
                "share_of_bound": moved / speed / median,
            }
            table[name][str(context)] = {k: round(v, 4) for k, v in row.items()}
            print(f"context {context:6} {name:16}", "  ".join(f"{k} {v:.3f}" for k, v in row.items()), flush=True)
    return table


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", action="append", required=True, metavar="NAME=RUN")
    p.add_argument("--dtypes", nargs="+", default=["fp32", "fp16", "int8", "int4"], choices=["fp32", *WEIGHT_TYPES])
    p.add_argument("--blocks", type=int, nargs="+", default=[BLOCKS[0]])
    p.add_argument("--contexts", type=int, nargs="+", default=[128, 7900])
    p.add_argument("--steps", type=int, default=10, help="steps of a turn")
    p.add_argument("--turns", type=int, default=3)
    p.add_argument("--text", type=Path, default=TEXTS / "heldout.txt")
    p.add_argument("--calibration", type=Path, default=TEXTS / "calibration.txt")
    p.add_argument("--sequences", type=int, default=8)
    p.add_argument("--length", type=int, default=128)
    p.add_argument("--threads", type=int, default=1, help="of the scoring; decode is measured on one")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    scores: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as work:
        folders: dict[str, Path] = {}
        for item in args.model:
            name, path = item.split("=", 1)
            source = Path(path) / "onnx"
            sample = text_ids(source, args.calibration, 8, 128)
            mine = written(name, source, Path(work), args.dtypes, args.blocks, sample)
            ids = text_ids(source, args.text, args.sequences, args.length)
            for variant, folder in mine.items():
                scores[variant] = quality(folder, source, ids, args.threads)
                print(f"{variant:16}", "  ".join(f"{k} {v:.5g}" for k, v in scores[variant].items()), flush=True)
            folders |= mine
        speed = read_bandwidth()
        print(f"one thread reads {speed / 1e9:.1f} GB/s", flush=True)
        table = decode(folders, args.contexts, args.steps, args.turns, speed)
        speed_after = read_bandwidth()
    if args.json:
        import onnxruntime

        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        commit = os.environ.get("TCAL_COMMIT", head)  # set it for a copy of the tree without its history
        where = {"machine": platform.machine(), "onnxruntime": onnxruntime.__version__, "threads": 1, "commit": commit}
        body = {"environment": where, "steps": args.steps * args.turns, "text": args.text.name}
        body |= {"bandwidth_gb_s": [speed / 1e9, speed_after / 1e9], "variants": scores, "variant_decode": table}
        args.json.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
