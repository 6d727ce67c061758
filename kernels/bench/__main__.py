"""Times our operators: correctness first, then medians beside what the hardware allows.

    python -m tcal_compiler.kernels.bench [--ops rule step norm gates attention] [--shapes ...]
                                          [--dtype bfloat16] [--repeat 30] [--json FILE]
    python -m tcal_compiler.kernels.bench --table FILE
    python -m tcal_compiler.kernels.bench --tune [--ops rule step] [--shapes ...] [--dtype bfloat16] [--seconds 400]
                                          [--json kernels/tuning.json]

On a GPU: our kernels, their plain-PyTorch form, flash attention, and fla, FlashQLA and FlashInfer where they are
installed, each with its errors against float64 and its memory, and bounds from bytes and operations for an H100 or H200
(other cards: bytes and operations only). On a CPU: the PyTorch forms, beside transformers'. Every time is a median of
one process with its quartiles; nothing is timed when a result of ours is wrong.

--tune measures launch settings of the rule's and the step's kernels on this card instead, for --seconds at most or
little more, and writes the table that the kernels read: into the package, or into FILE. Tune with nothing else on the
card.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from tcal_compiler.kernels import tuning

from . import attention, gates, norm, report, rule, step
from .tables import tables
from .timing import SEED, Benchmark

OPS: dict[str, Benchmark] = {
    "rule": rule.BENCHMARK,
    "step": step.BENCHMARK,
    "norm": norm.BENCHMARK,
    "gates": gates.BENCHMARK,
    "attention": attention.BENCHMARK,
}

TUNED = ("rule", "step")


def parse(argv: list[str] | None, device: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tcal_compiler.kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=OPS, metavar="OP", help=f"of {', '.join(OPS)}")
    parser.add_argument("--shapes", nargs="+", metavar="B,T,H,D", help="in place of its own, for one op")
    parser.add_argument(
        "--dtype", default="bfloat16" if device == "cuda" else "float32", choices=["float32", "bfloat16"]
    )
    parser.add_argument("--repeat", type=int, default=30 if device == "cuda" else 9)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--table", metavar="FILE", help="print a --json FILE as Markdown, and time nothing")
    parser.add_argument("--tune", action="store_true", help="measure launch settings of the kernels")
    parser.add_argument("--seconds", type=float, default=400, help="that tuning may take")
    options = parser.parse_args(argv)
    if options.tune:
        options.ops = [op for op in options.ops if op in TUNED]
        if not options.ops:
            parser.error(f"--tune is for {' and '.join(TUNED)}")
        if device != "cuda":
            parser.error("--tune needs a CUDA device")
    if options.shapes and len(options.ops) != 1:
        parser.error("--shapes needs --ops with the one op that they are for")
    if options.repeat < 2:
        parser.error("--repeat: quartiles need 2 runs at least")
    options.work = []
    for op in options.ops:
        for text in options.shapes or OPS[op].shapes[device].split():
            shape = tuple(int(n) if n.isdecimal() else 0 for n in text.split(","))
            if len(shape) != len(OPS[op].sizes.split(",")) or min(shape) < 1:
                parser.error(f"--shapes: want {OPS[op].sizes}, each 1 at least; got {text!r}")
            options.work.append((op, shape))
    return options


def main(argv: list[str] | None = None) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = parse(argv, device)
    if options.table:
        print(tables(json.loads(Path(options.table).read_text())))
        return 0
    if options.tune:
        from .tune import tune  # needs Triton

        path = Path(options.json or tuning.TABLE)
        tune(options.work, getattr(torch, options.dtype), options.repeat, path, options.seconds)
        return 0
    found = report.environment(device)
    body: dict[str, Any] = found | {"dtype": options.dtype, "repeat": options.repeat, "seed": SEED, "results": []}
    print(" | ".join(f"{name} {value}" for name, value in body.items() if name != "results"))
    print("milliseconds: median [quartiles] (part of the bound) multiple of ours, memory", flush=True)
    for op, shape in options.work:
        result = OPS[op].time_shape(shape, getattr(torch, options.dtype), device, options.repeat)
        body["results"].append(result)
        print("\n".join(report.lines(result)), flush=True)
        if options.json:  # after every result, and whole: the next shape may end the process
            part = Path(f"{options.json}.part")
            part.write_text(json.dumps(body, indent=1))
            part.replace(options.json)
    print("\n".join(report.summary(body["results"])))
    return int(any("wrong" in r for r in body["results"]))


if __name__ == "__main__":
    sys.exit(main())
