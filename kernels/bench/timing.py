"""What every benchmark shares: medians, bounds, and the form of a result.

A result is plain JSON: {"op", "shape", "errors": {name: rms error over rms against float64}, "bounds": {kind: {"bytes",
"operations", "bound_ms"}}, "times": {implementation: {kind: {"ms", "low", "high", "peak_bytes", "host_ms"}}}}, and
where others compute the same "errors_beside": {implementation: errors}; instead of bounds and times "wrong", where an
error is more than self_check allows. On CUDA outside graphs peak_bytes: what a run allocates at its peak beyond what
was there, its results among it; host_ms: what a call to an idle card takes until it returns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tcal_compiler.kernels.self_check import ALLOWED

BANDWIDTH = {"H100": 3.0e12, "H200": 4.3e12}  # bytes a second, as copies on such cards moved them
SEED = 0  # of all inputs
RATE = 790e12  # dense bfloat16 operations a second, as large products on both ran

Run = Callable[[], Any]
Times = dict[str, float]


@dataclass(frozen=True)
class Benchmark:
    """One operator: time_shape(shape, dtype, device, repeat) -> result. sizes: the letters of a shape."""

    sizes: str
    shapes: dict[str, str]  # by device
    time_shape: Callable[[tuple[int, ...], torch.dtype, str, int], dict[str, Any]]


def bound(num_bytes: float, operations: float, device: str) -> dict[str, float]:
    """Least time on a known card: bytes at its memory's speed or operations at its products', whichever is longer."""
    least = {"bytes": float(num_bytes), "operations": float(operations)}
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    for card, bandwidth in BANDWIDTH.items():
        if card in name:
            least["bound_ms"] = max(num_bytes / bandwidth, operations / RATE) * 1e3
    return least


def median(run: Run, device: str, repeat: int) -> Times:
    """Milliseconds: median and quartiles of `repeat` runs after three."""
    for _ in range(3):
        run()
    times, peak = [], {}
    if device == "cuda":
        peak = {"peak_bytes": float(peak_bytes(run)), "host_ms": host(run, repeat)}
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeat)]
        for start, end in events:
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) for start, end in events]
    else:
        for _ in range(repeat):
            begin = time.perf_counter()
            run()
            times.append((time.perf_counter() - begin) * 1e3)
    low, middle, high = statistics.quantiles(times, n=4)
    return {"ms": middle, "low": low, "high": high} | peak


def host(run: Run, repeat: int) -> float:
    """Milliseconds until a call returns, median."""
    times = []
    for _ in range(repeat):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def peak_bytes(run: Run) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def median_in_graph(runs: Sequence[Run], device: str, repeat: int) -> Times:
    """`median` of one of several runs that lie in one CUDA graph, so that nothing waits for the CPU between them."""
    for run in runs:
        run()  # what is compiled or proved on first use may not lie in a graph
    if device != "cuda":
        times = median(lambda: [run() for run in runs], device, repeat)
    else:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for run in runs:
                run()
        times = median(graph.replay, device, repeat)
    return {name: times[name] / len(runs) for name in ("ms", "low", "high")}


def attempt(times: dict[str, Any], name: str, kind: str, measure: Callable[[], Times]) -> None:
    """Adds a time, or why there is none: a peer may refuse a card, a dtype or a shape."""
    kinds = times.setdefault(name, {})
    try:
        kinds[kind] = measure()
    except Exception as e:
        kinds["failed"] = "; ".join(filter(None, (kinds.get("failed"), f"{kind}: {e!r}"[:300])))


def new_result(op: str, shape: tuple[int, ...], errors: dict[str, float], dtype: torch.dtype) -> dict[str, Any]:
    """A result without times; "wrong" says that there may be none."""
    result: dict[str, Any] = {"op": op, "shape": shape, "errors": errors}
    if not all(error <= ALLOWED[dtype] for error in errors.values()):
        return result | {"wrong": f"more than {ALLOWED[dtype]:.0e}: not timed"}
    return result
