"""Decode time of ONNX models against context length, in ONNX Runtime on the CPU.

    python examples/bench_onnx.py --model teacher=run-all --model hybrid=run --contexts 128 4096 --json out.json

Each NAME=RUN is a run folder (or a folder with model.onnx). The state of a context is filled with small random numbers,
since decode time does not depend on their values. Every turn takes all models through all contexts, so that a machine
whose speed drifts treats them alike. Medians of single-token steps are given, and the median over the turns of a turn's
time behind a context against the same turn's behind the first. Beyond a student's own context its rotary tables are
repeated. --operators adds where the time of a step behind the first context goes, by ONNX Runtime's profiler.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from tcal_compiler.runtime.session import OnnxSession
from tcal_compiler.runtime.session_state import SessionState


def with_positions(folder: Path, positions: int) -> None:
    """Makes room in an exported folder for so many positions; rotary tables are repeated."""
    import onnx

    path = folder / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config["model"]["context_length"] >= positions:
        return
    config["model"]["context_length"] = positions
    model = onnx.load(folder / "model.onnx")
    for node in model.graph.node:
        names = list(node.input[7:9]) if node.op_type == "GroupQueryAttention" else []
        for t in (t for t in model.graph.initializer if t.name in names and t.dims[0] < positions):
            array = onnx.numpy_helper.to_array(t)
            rows = np.resize(array, (positions, array.shape[1]))
            t.CopyFrom(onnx.numpy_helper.from_array(rows, t.name))
    onnx.save(model, folder / "model.onnx")
    path.write_text(json.dumps(config), encoding="utf-8")


def model_folder(path: Path) -> Path:
    return path / "onnx" if (path / "onnx").is_dir() else path


def opened(path: Path, positions: int, threads: int | None) -> OnnxSession:
    """A session with room for so many positions."""
    folder = model_folder(path)
    session = OnnxSession(folder, threads=threads)
    if session.context_length is None or session.context_length >= positions:
        return session
    with tempfile.TemporaryDirectory() as work:
        copy = Path(shutil.copytree(folder, Path(work, "onnx")))
        with_positions(copy, positions)
        return OnnxSession(copy, threads=threads)


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


def measure(sessions: dict[str, OnnxSession], contexts: list[int], steps: int, turns: int) -> dict[str, Any]:
    """Rows by model and context."""
    states = {(n, c): filled_state(s, c) for n, s in sessions.items() for c in contexts}
    times: dict[tuple[str, int], list[list[float]]] = {key: [] for key in states}
    for _ in range(turns):
        for name, context in times:
            times[name, context].append(step_times(sessions[name], states[name, context], steps))
    table: dict[str, dict[str, Any]] = {n: {} for n in sessions}
    first = next(iter(sessions))
    for (name, context), turned in times.items():
        base = statistics.median(chain(*times[first, context]))
        ms = sorted(1e3 * t for t in chain(*turned))
        pairs = zip(turned, times[name, contexts[0]], strict=True)
        ratios = sorted(statistics.median(here) / statistics.median(there) for here, there in pairs)
        row = {
            "median_ms": statistics.median(ms),
            "p10_ms": ms[len(ms) // 10],
            "p90_ms": ms[len(ms) * 9 // 10],
            "speedup_over_first": base * 1e3 / statistics.median(ms),
            "over_first_context": statistics.median(ratios),
            "over_first_context_p25": ratios[len(ratios) // 4],
            "over_first_context_p75": ratios[len(ratios) * 3 // 4],
        }
        sessions[name].restore(states[name, context])
        row["state_mb"] = sessions[name].state_bytes / 1e6
        table[name][str(context)] = {k: round(v, 3) for k, v in row.items()}
    return table


def operators(path: Path, context: int, steps: int, threads: int | None) -> dict[str, dict[str, float]]:
    """Nodes and milliseconds of each operator in a step, the most expensive first: sums of the medians of nodes."""
    with tempfile.TemporaryDirectory() as work:
        session = OnnxSession(model_folder(path), threads=threads, profile_prefix=f"{work}/profile")
        step_times(session, filled_state(session, context), steps)
        del session  # which writes the file
        events = json.loads(next(Path(work).iterdir()).read_text(encoding="utf-8"))
    nodes: dict[tuple[str, str], list[float]] = {}
    for e in (e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")):
        nodes.setdefault((e["args"]["op_name"], e["name"]), []).append(e["dur"] / 1e3)
    found: dict[str, dict[str, float]] = {}
    for (kind, _), times in nodes.items():
        row = found.setdefault(kind, {"nodes": 0, "ms": 0.0})
        row["nodes"], row["ms"] = row["nodes"] + 1, row["ms"] + statistics.median(times)
    return dict(sorted(found.items(), key=lambda item: -item[1]["ms"]))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", action="append", required=True, metavar="NAME=RUN")
    p.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 4096, 7900])
    p.add_argument("--steps", type=int, default=12, help="steps of a turn")
    p.add_argument("--turns", type=int, default=3)
    p.add_argument("--threads", type=int)
    p.add_argument("--operators", action="store_true")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    room = max(args.contexts) + args.steps + 1
    paths = {name: Path(path) for name, path in (item.split("=", 1) for item in args.model)}
    sessions = {name: opened(path, room, args.threads) for name, path in paths.items()}
    table = measure(sessions, args.contexts, args.steps, args.turns)
    for name, rows in table.items():
        for context, row in rows.items():
            print(f"context {context:>6} {name:10}", "  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    body: dict[str, Any] = {"steps": args.steps * args.turns, "decode": table}
    if args.operators:
        sessions.clear()
        given = (args.contexts[0], args.steps * args.turns, args.threads)
        body["operators"] = {name: operators(path, *given) for name, path in paths.items()}
        for name, kinds in body["operators"].items():
            print(name, *(f"{kind} {row['nodes']}: {row['ms']:.3f} ms" for kind, row in kinds.items()), sep="\n  ")
    if args.json:
        import onnxruntime

        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        where = {
            "machine": platform.machine(),
            "onnxruntime": onnxruntime.__version__,
            "threads": args.threads,
            "commit": commit,
        }
        args.json.write_text(json.dumps({"environment": where} | body, indent=1) + "\n")


if __name__ == "__main__":
    main()
