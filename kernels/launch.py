"""Launches of Triton kernels, and the compilation of several of them at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, reduce
from operator import or_
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

MOST_THREADS = 16
KEPT = 128  # sizes of an operator whose launches are kept
ALIGNED = 16  # bytes; Triton compiles for addresses that are multiples of this

P = ParamSpec("P")
T = TypeVar("T")

_launched: ContextVar[list[Any] | None] = ContextVar("launched", default=None)  # where nothing is to run
_kept: list[Any] = []


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; Triton's own also serves inside kernels and takes microseconds."""
    return -(-a // b)


def per_size(make: Callable[P, T]) -> Callable[P, T]:
    """What make returns for the last KEPT arguments: launches, which are made once for all calls of one size."""
    kept = lru_cache(maxsize=KEPT)(make)
    _kept.append(kept)
    return kept  # type: ignore[return-value]


def forget() -> None:
    """Launches are made anew: for whoever changes what they were made of."""
    for kept in _kept:
        kept.cache_clear()


class Launch:
    """kernel[(programs,)](*tensors, *numbers, **options), of which all but the tensors are given once.

    At every call Triton finds by all arguments what it has compiled for them, which takes longer than a short kernel.
    Here only the tensors can differ between calls: their dtypes, their device, and whether their addresses are aligned.
    The kernel's parameters are tensors, then numbers, then constants.
    """

    def __init__(self, kernel: Any, programs: int, *numbers: float, **options: Any) -> None:
        self._kernel, self._grid = kernel, (programs, 1, 1)
        self._numbers, self._options = numbers, options
        constants = [name for name in kernel.arg_names if name in options]
        assert constants == list(kernel.arg_names[-len(constants) :]), kernel
        self._rest = (*numbers, *(options[name] for name in constants))
        self._compiled: dict[tuple[object, ...], Callable[..., None]] = {}

    def __call__(self, *tensors: Tensor) -> None:
        """For `compiled_at_once` no more than the compilation. The tensors lie on the current device."""
        launched = _launched.get()
        addresses = [x.data_ptr() for x in tensors]
        aligned = reduce(or_, addresses) % ALIGNED == 0
        key = (tensors[0].get_device(), *[x.dtype for x in tensors])
        if aligned and launched is None and key in self._compiled:
            self._compiled[key](*addresses, *self._rest)
            return
        grid, warmup = self._grid, launched is not None
        found = self._kernel.run(*tensors, *self._numbers, grid=grid, warmup=warmup, **self._options)
        if launched is not None:
            launched.append(found)
        elif aligned and found is not None:  # None is the interpreter's
            self._compiled[key] = found[grid]


@contextmanager
def compiled_at_once(run: Callable[[], object], device: torch.device) -> Iterator[None]:
    """On CUDA what run() launches is compiled on several threads while what stands inside goes on; none of it runs. At
    the end all is ready to be loaded, but for what does not compile, which says the run that follows.

    Threads compile, for the card and for the host, and never touch the device: whoever runs a kernel loads it. What
    run() launches may not depend on what it launches.
    """
    if device.type != "cuda":
        yield
        return
    import triton  # late: what imports this file must not need it

    launcher = triton.runtime.driver.active.launcher_cls  # Triton 3.6 compiles one in C, and keeps it on disk

    def prepare(compilation: Future[Any]) -> None:
        if compilation.exception() is None:
            kernel = compilation.result()
            launcher(kernel.src, kernel.metadata)

    threads = min(MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for compilation in _compilations(run):
            pool.submit(prepare, compilation)  # which is ahead of it in the pool's queue
        yield


def _compilations(run: Callable[[], object]) -> list[Future[Any]]:
    """Those that run() starts; it launches nothing."""
    launched: list[Any] = []
    token = _launched.set(launched)
    try:
        run()
    finally:
        _launched.reset(token)
    return list({id(k): k.future for k in launched if getattr(k, "future", None)}.values())
