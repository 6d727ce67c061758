"""Assertions shared by tests."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from tcal_compiler.kernels.attention_stats.reference import sums_of_outputs
from tcal_compiler.runtime.statistics import OutputSums


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def assert_within_budget(name: str, *, actual: Tensor, exact: Tensor, naive: Tensor, factor: float = 2.0) -> None:
    """`actual` may err at most `factor` times as much as `naive`, plain PyTorch in the same dtype; `exact` is float64.

    Where the naive result happens to be nearly exact, four roundings of the dtype are allowed.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.isfinite().all(), f"{name}: not finite"
    actual, exact, naive, eps = actual.cpu(), exact.cpu(), naive.cpu(), torch.finfo(actual.dtype).eps
    error, budget = _rms(actual - exact), max(factor * _rms(naive - exact), 4 * eps * _rms(exact))
    assert error <= budget, f"{name}: rms error {error:.2e} over budget {budget:.2e}"


def sums_of(context: Tensor, o: Tensor) -> OutputSums:
    """The sums for a context [B, T, H, D] that no attention gave."""
    return OutputSums(o.shape[0] * o.shape[1], *sums_of_outputs(context, o))


def allocated(run: Callable[[], None]) -> int:
    """Most bytes at once that PyTorch's allocator gave out."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        run()
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
