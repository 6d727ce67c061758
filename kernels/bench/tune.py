"""Measures launch settings on this card, for the table that the kernels read (`tuning`).

Every candidate is first compiled and proved in a process of its own, many at once, since compilation takes longer than
measurement and a kernel that accesses illegal memory ends its process's use of the card. Then the candidates that ran
are timed one after another.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from tcal_compiler.kernels import tuning
from tcal_compiler.kernels.gated_delta_rule import dispatch
from tcal_compiler.kernels.gated_delta_rule.triton_backward import gated_delta_rule_triton_backward
from tcal_compiler.kernels.gated_delta_rule.triton_forward import gated_delta_rule_triton
from tcal_compiler.kernels.gated_delta_step import op as step_op
from tcal_compiler.kernels.gated_delta_step.triton_kernel import gated_delta_step_triton
from tcal_compiler.kernels.launch import forget
from tcal_compiler.kernels.self_check import ALLOWED, relative_errors

from . import rule, step
from .timing import Run, median_in_graph

GAIN = 0.02  # of the time; less may be noise
PROCESSES = 14  # that compile at once; each holds some GB of the card's memory
Fields = tuning.Fields
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Trial:
    """Candidates that are tried together, each beside what was chosen before, on the times of some kinds."""

    kinds: tuple[str, ...]
    candidates: tuple[Fields, ...]


def one(name: str, *values: int) -> tuple[Fields, ...]:
    return tuple({name: value} for value in values)


@dataclass(frozen=True)
class Target(ABC):
    """What one entry of the table is for: an operator at one dtype and head dim, over shapes."""

    dtype: torch.dtype
    shapes: tuple[Shape, ...]
    op = ""

    @property
    def dim(self) -> int:
        return self.shapes[0][3]

    @property
    def key(self) -> str:
        return tuning.key(self.op, self.dtype, self.dim, self.dim)

    @abstractmethod
    def trials(self) -> tuple[Trial, ...]: ...

    @abstractmethod
    def errors(self, device: torch.device) -> dict[str, float]:
        """Against float64, of a small case."""

    @abstractmethod
    def runs(self, shape: Shape, kind: str) -> list[Run]:
        """What is timed: each gives its results."""

    @contextmanager
    def entry(self, fields: Fields) -> Iterator[None]:
        """With these fields in the table, where the kernels look."""
        entries = tuning.table().setdefault(tuning.place(_device()), {})
        before = entries.get(self.key)
        entries[self.key] = fields
        forget()
        try:
            yield
        finally:
            entries.pop(self.key) if before is None else entries.update({self.key: before})
            forget()


class Rule(Target):
    op = "gated_delta_rule"

    def trials(self) -> tuple[Trial, ...]:
        most = max(16, triton.next_power_of_2(self.dim))

        def fits(fields: Fields) -> bool:
            blocks = ("solve_keys", "value_block", "key_part", "read_columns")
            return all(value <= most for name, value in fields.items() if name in blocks)

        both, forward, backward = ("forward", "backward"), ("forward",), ("backward",)
        eight = (8,) if self.dtype == torch.bfloat16 and self.dim <= 128 else ()  # not float32 kernels: docs/kernels.md
        walks = (
            *({"read_columns": 128, "read_warps": 8, "read_stages": n} for n in (1, 2, 3)),
            *({"read_columns": 64, "read_programs": 2, "read_stages": n} for n in (1, 2)),
            *({"read_columns": 64, "read_programs": 1, "read_stages": n} for n in (2, 3)),
        )
        found = (
            Trial(forward, walks),
            Trial(both, one("solve_warps", 8)),
            Trial(both, one("solve_keys", 32, 64)),
            Trial(backward, ({"value_block": 128, "warps": 8},)),
            Trial(backward, one("pair_warps", 2, *eight)),
            Trial(backward, one("key_part", 32, 128)),
            Trial(backward, one("stages", 1, 3)),
        )
        return tuple(Trial(t.kinds, tuple(filter(fits, t.candidates))) for t in found)

    def errors(self, device: torch.device) -> dict[str, float]:
        packed = dispatch.packed_self_check(device, self.dtype, self.dim, self.dim)
        found = {f"packed {name}": error for name, error in packed.items()}
        return dispatch.self_check(device, self.dtype, self.dim, self.dim) | found

    def runs(self, shape: Shape, kind: str) -> list[Run]:
        batch, tokens, heads, dim = shape
        inputs = rule.make_inputs(batch, tokens, heads, dim, self.dtype, _device().type)
        gen = torch.Generator(_device()).manual_seed(1)
        seeds = [torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=gen) for x in (inputs[2], inputs[5])]
        if kind == "forward":
            return [lambda: gated_delta_rule_triton(*inputs, scale=dim**-0.5)]
        return [lambda: gated_delta_rule_triton_backward(*seeds, *inputs, scale=dim**-0.5)]


class Step(Target):
    op = "gated_delta_step"
    normed = False

    def trials(self) -> tuple[Trial, ...]:
        kinds = ("step",)
        tiles = [(32, 4, 64), (32, 4, 255), (32, 8, 64), (64, 4, 128), (64, 8, 64), (16, 2, 64), (128, 8, 128)]
        tiles = [tile for tile in tiles if tile[0] <= max(8, triton.next_power_of_2(self.dim))]
        parts = tuple(dict(zip(("BV", "num_warps", "maxnreg"), tile, strict=True)) for tile in tiles)
        whole = ({"num_warps": 4, "maxnreg": 168}, {"num_warps": 4, "maxnreg": 255}, {"num_warps": 16, "maxnreg": 64})
        found = (*whole, {"apart": 1}, *({"apart": 1} | part for part in parts)) if self.normed else parts
        return Trial(kinds, tuple(found)), Trial(kinds, one("streams", 1))

    def errors(self, device: torch.device) -> dict[str, float]:
        given = (device, self.dtype, self.dim, self.dim)
        return step_op.self_check(*given, normalize=self.normed, normed=self.normed)

    def runs(self, shape: Shape, kind: str) -> list[Run]:
        inputs, norm = step.make_inputs(shape, self.dtype, _device().type)
        *given, state = inputs
        states = [state.clone() for _ in range(step.count_for(state, _device().type))]
        rest: dict[str, Any] = dict(scale=shape[3] ** -0.5, normalize=self.normed, in_place=True)
        each: step.Step = gated_delta_step_triton
        return [partial(each, *given, s, *(norm if self.normed else ()), **rest) for s in states]


class NormedStep(Step):
    op = "gated_delta_step with norm"
    normed = True


TARGETS: dict[str, tuple[type[Target], ...]] = {"rule": (Rule,), "step": (Step, NormedStep)}


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _results(target: Target, shape: Shape, kind: str) -> tuple[Tensor, ...]:
    """Of one run on fresh inputs."""
    run, *_ = target.runs(shape, kind)
    return tuple(x.clone() for x in run())


Part = tuple[Shape, str] | None  # one run of a target; None: its comparison with float64


def parts(target: Target, kinds: tuple[str, ...]) -> list[Part]:
    return [None, *((shape, kind) for shape in target.shapes for kind in kinds)]


def prepare(target: Target, fields: Fields, some: Sequence[Part]) -> str:
    """Compiles and runs these once; says what failed. In a process of its own."""
    try:
        with target.entry(fields):
            for part in some:
                if part:
                    _results(target, *part)
                else:
                    target.errors(_device())
        torch.cuda.synchronize()
    except Exception as e:  # whatever a compiler or a launch can raise
        return repr(e)[:200]
    return ""


def prepare_all(targets: Sequence[Target], until: float) -> dict[tuple[str, str], str]:
    """What failed of every candidate of every target, by key and `spelled` fields; not ready in time is a failure."""
    jobs: list[tuple[Target, Fields, list[Part]]] = []
    for target in targets:
        every = dict.fromkeys(kind for trial in target.trials() for kind in trial.kinds)
        jobs += [(target, {}, [part]) for part in parts(target, tuple(every))]
    for target in targets:
        jobs += [(target, c, parts(target, t.kinds)) for t in target.trials() for c in t.candidates]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    failed: dict[tuple[str, str], str] = {}
    with context.Pool(min(PROCESSES, len(os.sched_getaffinity(0)), len(jobs)), maxtasksperchild=1) as pool:
        waiting = [(job[0].key, spelled(job[1]), pool.apply_async(prepare, job)) for job in jobs]
        for key, text, result in waiting:
            try:
                why = result.get(timeout=max(0.0, until - time.monotonic()))
            except multiprocessing.TimeoutError:
                why = "not compiled in time"
            if why:
                failed[key, text] = why
                print(f"  {key} | {text}: {why}", flush=True)
    return failed


def spelled(fields: Fields) -> str:
    return json.dumps(fields, sort_keys=True)


class Measure:
    """Times settings of one target; the results of each, at every shape, must be those of the usual setting."""

    def __init__(self, target: Target, repeat: int) -> None:
        self.target, self.repeat = target, repeat
        self.expected: dict[tuple[Shape, str], tuple[Tensor, ...]] = {}

    def __call__(self, fields: Fields, kinds: tuple[str, ...]) -> float | None:
        """Geometric mean over shapes and kinds in milliseconds; None for what does not run or is wrong. Shows it."""
        try:
            with self.target.entry(fields):
                errors = self.target.errors(_device())
                times = [self._time(shape, kind, errors) for shape in self.target.shapes for kind in kinds]
        except Exception as e:  # whatever a compiler or a launch can raise
            print(f"  {fields}: {repr(e)[:200]}", flush=True)
            torch.cuda.synchronize()  # raises where the kernel ended this process's use of the card
            return None
        found = {n: e for n, e in errors.items() if not e <= ALLOWED[self.target.dtype]}
        if found:
            print(f"  {fields}: wrong, {found}", flush=True)
            return None
        mean = math.exp(sum(map(math.log, times)) / len(times))
        print(f"  {fields}: {mean:.4f} ms of {', '.join(f'{ms:.4f}' for ms in times)}", flush=True)
        return mean

    def _time(self, shape: Shape, kind: str, errors: dict[str, float]) -> float:
        results = _results(self.target, shape, kind)
        exact = self.expected.setdefault((shape, kind), results)
        names = [f"result {i} of {kind} at {shape}" for i in range(len(results))]
        errors |= relative_errors(names, results, [x.double() for x in exact])
        return median_in_graph(self.target.runs(shape, kind), "cuda", self.repeat)["ms"]


def search(
    trials: Sequence[Trial], measure: Callable[[Fields, tuple[str, ...]], float | None], until: float = math.inf
) -> Iterator[Fields]:
    """After every trial the fields chosen so far: its best candidate where that takes GAIN less than none of them.

    measure gives a time, None for what does not run or is wrong. Nothing more is tried after `until`.
    """
    chosen: Fields = {}
    times: dict[tuple[str, ...], float] = {}  # of what is chosen
    for trial in trials:
        if trial.kinds not in times:
            usual = measure(chosen, trial.kinds)
            if usual is None:
                raise RuntimeError("the settings that are used without a table do not run or are wrong here")
            times[trial.kinds] = usual
        best, least = chosen, times[trial.kinds]
        for candidate in trial.candidates:
            if time.monotonic() > until:
                break
            ms = measure(chosen | candidate, trial.kinds)
            if ms is not None and ms < min(least, times[trial.kinds] * (1 - GAIN)):
                best, least = chosen | candidate, ms
        if best != chosen:
            chosen, times = best, {trial.kinds: least}
        yield chosen


def targets_of(work: Sequence[tuple[str, Shape]], dtype: torch.dtype) -> list[Target]:
    """Steps first, whose candidates take least time; then the largest head dims."""
    shapes: dict[type[Target], dict[int, list[Shape]]] = {}
    for op, shape in sorted(work, key=lambda item: (item[0] != "step", -item[1][3])):
        for kind in TARGETS[op]:
            shapes.setdefault(kind, {}).setdefault(shape[3], []).append(shape)
    return [kind(dtype, tuple(some)) for kind, by_dim in shapes.items() for some in by_dim.values()]


def tune(work: Sequence[tuple[str, Shape]], dtype: torch.dtype, repeat: int, path: Path, seconds: float) -> None:
    """Adds the best fields for every operator and head dim to the table and writes it to `path` after each trial."""
    begin, place = time.monotonic(), tuning.place(_device())
    targets = targets_of(work, dtype)
    entries = tuning.table().setdefault(place, {})
    for target in targets:
        entries.pop(target.key, None)
    failed = prepare_all(targets, begin + seconds / 2)
    print(f"{place}: compiled after {time.monotonic() - begin:.0f} s", flush=True)
    for i, target in enumerate(targets):
        now = time.monotonic()
        until = now + (begin + seconds - now) / (len(targets) - i)
        print(f"{target.key} | {target.shapes}", flush=True)
        ready = [
            Trial(t.kinds, tuple(c for c in t.candidates if (target.key, spelled(c)) not in failed))
            for t in target.trials()
        ]
        for chosen in search(ready, Measure(target, repeat), until):
            if chosen:
                entries[target.key] = chosen
            path.write_text(json.dumps(tuning.table(), indent=1, sort_keys=True) + "\n")
        print(f"chosen after {time.monotonic() - begin:.0f} s: {entries.get(target.key, {})}", flush=True)
