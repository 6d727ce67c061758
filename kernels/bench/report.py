"""What the benchmarks say to a reader: where they ran, each result, and what all of them come to."""

from __future__ import annotations

import datetime
import math
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .peers import versions

FLOAT32 = {"state", "dg", "dbeta", "d_initial_state"}  # results that are not rounded to the inputs' dtype


def environment(device: str) -> dict[str, Any]:
    """Hardware, versions, commit and time. TCAL_COMMIT stands for the commit of a copy without its history."""
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    found: dict[str, Any] = {"device": where, "torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda":
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
        found |= {"cuda": torch.version.cuda, "driver": driver[0] if driver else "unknown"}
    else:
        found["processor"] = _processor()
    found |= {"packages": versions(), "commit": os.environ.get("TCAL_COMMIT") or _commit()}
    return found | {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")}


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parent).stdout
    except OSError:
        return ""


def _commit() -> str:
    changed = " with changes" if _output("git", "status", "--porcelain", "--untracked-files=no") else ""
    return (_output("git", "rev-parse", "HEAD").strip() or "unknown") + changed


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1] for line in path.read_text().splitlines() if "model name" in line] if path.exists() else []
    )
    return names[0].strip() if names else platform.processor()


def lines(result: dict[str, Any]) -> list[str]:
    """One result: the worst error and the bounds, then an implementation a line, with each kind's milliseconds and
    quartiles, the part of the bound, the multiple of our time, memory, and its own worst error; then those that were
    compared and not timed."""
    head = f"{result['op']:10} {result['shape']!s:24} worst error {_worst(result['errors'])}"
    if "wrong" in result:
        return [f"{head} {result['wrong']}"]
    least = {kind: b["bound_ms"] for kind, b in result["bounds"].items() if "bound_ms" in b}
    if least:
        head += " | bound: " + ", ".join(f"{kind} {ms:.4f}" for kind, ms in least.items())
    found, ours = [head], result["times"].get("tcal", {})
    for name, kinds in result["times"].items():
        parts = [_time(kind, t, least.get(kind), ours.get(kind) if name != "tcal" else None)
                 for kind, t in kinds.items() if kind != "failed"]  # fmt: skip
        if name in result.get("errors_beside", {}):
            parts.append(f"worst error {_worst(result['errors_beside'][name])}")
        parts += [f"failed: {kinds['failed']}"] if "failed" in kinds else []
        found.append(f"    {name:16} " + "; ".join(parts))
    others = (item for item in result.get("errors_beside", {}).items() if item[0] not in result["times"])
    return found + [f"    {name:16} worst error {_worst(errors)}" for name, errors in others]


def _worst(errors: dict[str, Any]) -> str:
    numbers = {name: error for name, error in errors.items() if name != "failed"}
    if not numbers:
        return f"none: {errors['failed']}"
    worst = max(numbers, key=lambda name: math.inf if math.isnan(numbers[name]) else numbers[name])
    return f"{numbers[worst]:.1e} ({worst}){' of its forward' if 'failed' in errors else ''}"


def _time(kind: str, t: dict[str, float], bound: float | None, ours: dict[str, float] | None) -> str:
    said = f"{kind} {t['ms']:.4f} [{t['low']:.4f} {t['high']:.4f}]"
    said += f" ({bound / t['ms']:.0%})" if bound else ""
    said += f" {t['ms'] / ours['ms']:.2f}x" if ours else ""
    said += f" {t['peak_bytes'] / 1e6:.0f} MB" if "peak_bytes" in t else ""
    return said + (f", host {t['host_ms']:.4f}" if "host_ms" in t else "")


def summary(results: list[dict[str, Any]]) -> list[str]:
    """Over all shapes of an op: how near its bounds ours comes, times and memory of others as multiples of ours, our
    errors as multiples of theirs, apart for results in the inputs' dtype and in float32: what stands as pytorch
    multiplies in float32 whatever the dtype, so that its error is the one rounding of a result, or next to none."""
    found: list[str] = []
    for op in dict.fromkeys(r["op"] for r in results):
        some = [r for r in results if r["op"] == op and "wrong" not in r]
        found += _parts(op, some)
        pairs = dict.fromkeys((name, kind) for r in some for name, kinds in r["times"].items()
                              for kind in kinds if name != "tcal" and kind != "failed")  # fmt: skip
        for name, kind in pairs:
            # flash attention's forward stands beside kinds of ours that it has no name for
            for own in [kind] if any(kind in r["times"]["tcal"] for r in some) else list(some[0]["times"]["tcal"]):
                found += _multiples(op, some, name, kind, own)
        found += _error_multiples(op, some)
        found += [f"{op}: NOT RIGHT at {r['shape']}: {r['wrong']}" for r in results if r["op"] == op and "wrong" in r]
    return found


def _parts(op: str, some: list[dict[str, Any]]) -> Iterator[str]:
    for kind in dict.fromkeys(kind for r in some for kind in r["times"]["tcal"] if kind != "failed"):
        parts = [r["bounds"][kind]["bound_ms"] / r["times"]["tcal"][kind]["ms"] for r in some
                 if kind in r["times"]["tcal"] and "bound_ms" in r["bounds"].get(kind, {})]  # fmt: skip
        if parts:
            yield f"{op}, {kind}: {min(parts):.0%} to {max(parts):.0%} of the bound"


def _multiples(op: str, some: list[dict[str, Any]], name: str, kind: str, own: str) -> Iterator[str]:
    pairs = [(r["times"][name][kind], r["times"]["tcal"][own]) for r in some
             if kind in r["times"].get(name, {}) and own in r["times"]["tcal"]]  # fmt: skip
    for field, what in (("ms", "time"), ("peak_bytes", "memory")):
        values = [theirs[field] / ours[field] for theirs, ours in pairs if field in theirs and ours.get(field)]
        if values:
            yield f"{op}, {own}: {what} of {name}{'' if own == kind else ', ' + kind} {_range(values)} of ours"


def _error_multiples(op: str, some: list[dict[str, Any]]) -> Iterator[str]:
    for name in dict.fromkeys(n for r in some for n in r.get("errors_beside", {})):
        pairs = [(part, r["errors"][part] / max(error, 1e-30)) for r in some
                 for part, error in r["errors_beside"].get(name, {}).items() if part != "failed"]  # fmt: skip
        whose = "of pytorch's float32 computation" if name == "pytorch" else f"of {name}'s"
        for kept, what in ((False, "results in the inputs' dtype"), (True, "float32 results")):
            if values := [value for part, value in pairs if (part.split(",")[0] in FLOAT32) == kept]:
                yield f"{op}: our errors in {what} {_range(values)} {whose}"


def _range(values: list[float]) -> str:
    mean = math.exp(sum(map(math.log, values)) / len(values)) if min(values) > 0 else math.nan
    return f"{min(values):.2f} to {max(values):.2f} times, geometric mean {mean:.2f} of {len(values)},"
