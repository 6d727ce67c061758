"""Launches of Triton kernels, and the compilation of several of them at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

MOST_THREADS = 16

_launched: ContextVar[list[Any] | None] = ContextVar("launched", default=None)  # where nothing is to run


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; Triton's own also serves inside kernels and takes microseconds."""
    return -(-a // b)


def launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """kernel[(programs,)](*args, **options); for `compiled_at_once` no more than its compilation."""
    launched = _launched.get()
    found = kernel.run(*args, grid=(programs,), warmup=launched is not None, **options)
    if launched is not None:
        launched.append(found)


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
