"""Measures launch settings of the gated delta rule on this card, for the table that the kernels read (`tuning`)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from tcal_compiler.kernels import tuning
from tcal_compiler.kernels.gated_delta_rule import dispatch
from tcal_compiler.kernels.gated_delta_rule.triton_backward import gated_delta_rule_triton_backward
from tcal_compiler.kernels.gated_delta_rule.triton_forward import gated_delta_rule_triton
from tcal_compiler.kernels.self_check import ALLOWED

from . import rule
from .timing import median_in_graph

OP = "gated_delta_rule"
GAIN = 0.02  # of the time; less may be noise
VALUES = {  # of fields of Setting, tried in this order
    "solve_warps": (1, 2, 4, 8),
    "solve_keys": (16, 32, 64),
    "value_block": (16, 32, 64, 128),
    "warps": (4, 8),
    "stages": (1, 2, 3),
    "key_part": (32, 64, 128),
    "pair_warps": (2, 4, 8),
}
Fields = tuning.Fields


def search(values: dict[str, tuple[int, ...]], measure: Callable[[Fields], float | None]) -> Fields:
    """One field after another, the value that takes least; a field stays unset where none takes GAIN less than that.

    measure gives a time, None for what does not run or is wrong.
    """
    chosen: Fields = {}
    least = measure(chosen)
    if least is None:
        raise RuntimeError("the settings that are used without a table do not run or are wrong here")
    for field, options in values.items():
        times = {value: measure(chosen | {field: value}) for value in options}
        value, best = min(times.items(), key=lambda item: math.inf if item[1] is None else item[1])
        if best is not None and best < least * (1 - GAIN):
            chosen, least = chosen | {field: value}, best
    return chosen


def values_for(dim: int) -> dict[str, tuple[int, ...]]:
    """Those of VALUES that fit a head dim."""
    most = max(16, triton.next_power_of_2(dim))
    blocks = ("solve_keys", "value_block", "key_part")
    return {name: tuple(v for v in some if name not in blocks or v <= most) for name, some in VALUES.items()}


def measure(fields: Fields, shapes: list[tuple[int, ...]], dtype: torch.dtype, repeat: int) -> float | None:
    """Geometric mean over shapes of one head dim, forward and backward, in milliseconds; shows what it finds."""
    dim, device = shapes[0][-1], torch.device("cuda", torch.cuda.current_device())
    entries = tuning.table().setdefault(tuning.place(device), {})
    name = tuning.key(OP, dtype, dim, dim)
    before = entries.get(name)
    entries[name] = fields  # where the kernels look
    try:
        found = {n: e for n, e in _errors(device, dtype, dim).items() if not e <= ALLOWED[dtype]}
        times = [ms for shape in shapes for ms in _times(shape, dtype, repeat)] if not found else []
    except Exception as e:  # whatever a compiler or a launch can raise
        print(f"  {fields}: {repr(e)[:120]}", flush=True)
        torch.cuda.synchronize()  # raises where the kernel ended this process's use of the card
        return None
    finally:
        entries.pop(name) if before is None else entries.update({name: before})
    if found:
        print(f"  {fields}: wrong, {found}", flush=True)
        return None
    mean = math.exp(sum(map(math.log, times)) / len(times))
    print(f"  {fields}: {mean:.4f} ms of {', '.join(f'{ms:.4f}' for ms in times)}", flush=True)
    return mean


def _errors(device: torch.device, dtype: torch.dtype, dim: int) -> dict[str, float]:
    packed = dispatch.packed_self_check(device, dtype, dim, dim)
    return dispatch.self_check(device, dtype, dim, dim) | {f"packed {n}": e for n, e in packed.items()}


def _times(shape: tuple[int, ...], dtype: torch.dtype, repeat: int) -> tuple[float, float]:
    batch, tokens, heads, dim = shape
    inputs = rule.make_inputs(batch, tokens, heads, dim, dtype, "cuda")
    seeds, scale = (torch.randn_like(inputs[2]), torch.randn_like(inputs[5])), dim**-0.5
    runs: tuple[Callable[[], Any], ...] = (
        lambda: gated_delta_rule_triton(*inputs, scale=scale),
        lambda: gated_delta_rule_triton_backward(*seeds, *inputs, scale=scale),
    )
    forward, backward = (median_in_graph([run], "cuda", repeat)["ms"] for run in runs)
    return forward, backward


def tune(shapes: list[tuple[int, ...]], dtype: torch.dtype, repeat: int, path: Path) -> None:
    """Adds the best fields for every head dim of `shapes` to the table and writes it to `path` after each."""
    place = tuning.place(torch.device("cuda", torch.cuda.current_device()))
    for dim in sorted({shape[-1] for shape in shapes}):
        some = [shape for shape in shapes if shape[-1] == dim]
        print(f"{place} | {dtype} | head dim {dim} | {some}", flush=True)
        entries = tuning.table().setdefault(place, {})
        name = tuning.key(OP, dtype, dim, dim)
        entries.pop(name, None)
        chosen = search(values_for(dim), lambda fields, some=some: measure(fields, some, dtype, repeat))  # type: ignore[misc]
        if chosen:
            entries[name] = chosen
        print(f"chosen: {chosen}", flush=True)
        path.write_text(json.dumps(tuning.table(), indent=1, sort_keys=True) + "\n")
