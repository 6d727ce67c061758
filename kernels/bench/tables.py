"""Markdown tables of a benchmark's JSON, for docs/kernels.md: `python -m tcal_compiler.kernels.bench --table FILE`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Result = dict[str, Any]


def tables(body: dict[str, Any]) -> str:
    """Where and when, then for each op and kind of ours the times beside those of others, memory and errors."""
    said = [f"{name} {value}" for name, value in body.items() if name not in ("results", "packages")]
    said += [f"{name} {version}" for name, version in body.get("packages", {}).items()]
    found = [", ".join(said) + ".", ""]
    for op in dict.fromkeys(r["op"] for r in body["results"]):
        some = [r for r in body["results"] if r["op"] == op and "wrong" not in r]
        for kind in _kinds(some, "tcal"):
            found += [f"{op}, {kind}, milliseconds (multiple of ours; ours: part of the bound):", ""]
            found += [*_rows(some, list(_times(some, kind))), ""]
        if any("peak_bytes" in t for r in some for t in r["times"]["tcal"].values() if isinstance(t, dict)):
            found += [f"{op}, memory at the peak beyond the inputs, MB:", "", *_rows(some, list(_memory(some))), ""]
        found += [f"{op}, worst error over rms against float64:", "", *_rows(some, list(_errors(some))), ""]
    return "\n".join(found)


Column = tuple[str, list[str]]


def _rows(some: list[Result], columns: list[Column]) -> Iterator[str]:
    yield "| shape | " + " | ".join(name for name, _ in columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for result, *cells in zip(some, *(cells for _, cells in columns), strict=True):
        yield f"| {', '.join(map(str, result['shape']))} | " + " | ".join(cells) + " |"


def _kinds(some: list[Result], name: str) -> list[str]:
    return list(dict.fromkeys(k for r in some for k in r["times"].get(name, {}) if k != "failed"))


def _names(some: list[Result]) -> list[str]:
    return list(dict.fromkeys(name for r in some for name in r["times"]))


def _times(some: list[Result], kind: str) -> Iterator[Column]:
    if bounds := [r["bounds"].get(kind, {}).get("bound_ms") for r in some]:
        yield "bound", [f"{ms:.4f}" if ms else "" for ms in bounds]
    for name in _names(some):
        for own in [kind] if kind in _kinds(some, name) else []:
            yield name, [_cell(r, name, own, kind) for r in some]
        if not set(_kinds(some, name)) & set(_kinds(some, "tcal")):
            for own in _kinds(some, name):
                yield f"{name}, {own}", [_cell(r, name, own, kind) for r in some]


def _cell(r: Result, name: str, own: str, kind: str) -> str:
    theirs, ours = r["times"].get(name, {}).get(own), r["times"]["tcal"].get(kind)
    if not theirs:
        return ""
    least = r["bounds"].get(kind, {}).get("bound_ms")
    if name == "tcal":
        beside = f" ({least / theirs['ms']:.0%})" if least else ""
    else:
        beside = f" ({theirs['ms'] / ours['ms']:.2f}x)" if ours else ""
    return f"{theirs['ms']:.4f}{beside}"


def _memory(some: list[Result]) -> Iterator[Column]:
    for name in _names(some):
        for kind in _kinds(some, name):
            peaks = [r["times"].get(name, {}).get(kind, {}).get("peak_bytes") for r in some]
            if any(peaks):
                yield f"{name}, {kind}", [f"{peak / 1e6:.0f}" if peak else "" for peak in peaks]


def _errors(some: list[Result]) -> Iterator[Column]:
    yield "tcal", [_worst(r["errors"]) for r in some]
    for name in dict.fromkeys(name for r in some for name in r.get("errors_beside", {})):
        yield name, [_worst(r.get("errors_beside", {}).get(name, {})) for r in some]


def _worst(errors: dict[str, Any]) -> str:
    numbers = [error for name, error in errors.items() if name != "failed"]
    return f"{max(numbers):.1e}{' (forward)' if 'failed' in errors else ''}" if numbers else ""
