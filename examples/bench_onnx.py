"""Decode time of ONNX models against context length, in ONNX Runtime on the CPU.

    python examples/bench_onnx.py --model teacher=run-all --model hybrid=run --contexts 128 4096 --json out.json

Each NAME=RUN is a run folder (or a folder with model.onnx). The state of a context is filled with small random numbers,
since decode time does not depend on their values. Models take turns within a context, so that a machine whose speed
drifts treats them alike; medians of single-token steps are given, each step from the same context length.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tcal_compiler.runtime.session import OnnxSession
from tcal_compiler.runtime.session_state import SessionState


def filled_state(session: OnnxSession, context: int) -> SessionState:
    """A state as after `context` tokens of one sequence."""
    session.reset()
    empty, rng = session.snapshot(), np.random.default_rng(0)
    pairs = zip(empty.values, session.state_shapes(context), strict=True)
    values = tuple((0.01 * rng.standard_normal(shape)).astype(v.dtype) for v, shape in pairs)
    return replace(empty, length=context, mask=np.ones((1, context), np.int64), values=values)


def step_times(session: OnnxSession, state: SessionState, count: int) -> list[float]:
    """Seconds of `count` single-token steps after one that warms up."""
    session.restore(state)
    session.step(1)
    times = []
    for _ in range(count):
        start = time.perf_counter()
        session.step(1)
        times.append(time.perf_counter() - start)
    return times


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", action="append", required=True, metavar="NAME=RUN")
    p.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 4096, 7900])
    p.add_argument("--steps", type=int, default=12, help="steps of a turn")
    p.add_argument("--turns", type=int, default=3)
    p.add_argument("--threads", type=int)
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    sessions = {}
    for item in args.model:
        name, path = item.split("=", 1)
        folder = Path(path) / "onnx" if (Path(path) / "onnx").is_dir() else Path(path)
        sessions[name] = OnnxSession(folder, threads=args.threads)
    table: dict[str, dict[str, Any]] = {n: {} for n in sessions}
    for context in args.contexts:
        states = {n: filled_state(s, context) for n, s in sessions.items()}
        times: dict[str, list[float]] = {n: [] for n in sessions}
        for _ in range(args.turns):
            for name, session in sessions.items():
                times[name] += step_times(session, states[name], args.steps)
        first = statistics.median(next(iter(times.values())))
        for name, session in sessions.items():
            session.restore(states[name])
            ms = sorted(1e3 * t for t in times[name])
            row = {
                "median_ms": statistics.median(ms),
                "p10_ms": ms[len(ms) // 10],
                "p90_ms": ms[len(ms) * 9 // 10],
                "speedup_over_first": first * 1e3 / statistics.median(ms),
                "state_mb": session.state_bytes / 1e6,
            }
            table[name][str(context)] = {k: round(v, 3) for k, v in row.items()}
            print(f"context {context:6} {name:10}", "  ".join(f"{k} {v:.3f}" for k, v in row.items()), flush=True)
        del states
    if args.json:
        import onnxruntime

        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        where = {
            "machine": platform.machine(),
            "onnxruntime": onnxruntime.__version__,
            "threads": args.threads,
            "commit": commit,
        }
        args.json.write_text(
            json.dumps({"environment": where, "steps": args.steps * args.turns, "decode": table}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
