"""Launches of Triton kernels, and the compilation of several of them at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")
MOST_THREADS = 16

_compiled: ContextVar[list[Any] | None] = ContextVar("compiled", default=None)  # where nothing is to run


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; Triton's own also serves inside kernels and takes microseconds."""
    return -(-a // b)


def launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """kernel[(programs,)](*args, **options); inside `_compiling` no more than its compilation."""
    compiled = _compiled.get()
    found = kernel.run(*args, grid=(programs,), warmup=compiled is not None, **options)
    if compiled is not None:
        compiled.append(found)


@contextmanager
def _compiling() -> Iterator[None]:
    """Inside, kernels are compiled on several threads; none runs. At the end all are ready to be loaded, but for those
    that do not compile, which says the run that follows.

    Threads compile, for the card and for the host, and never touch the device: whoever runs a kernel loads it.
    """
    import triton  # late: what imports this file must not need it

    compiled: list[Any] = []
    token = _compiled.set(compiled)
    try:
        with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
            with triton.AsyncCompileMode(pool, ignore_errors=True):
                yield
            kernels = (f.kernel if isinstance(f, triton.FutureKernel) else f for f in compiled)
            launcher = triton.runtime.driver.active.launcher_cls  # Triton 3.6 compiles one in C, and keeps it on disk
            list(pool.map(lambda k: launcher(k.src, k.metadata), {id(k): k for k in kernels if k is not None}.values()))
    finally:
        _compiled.reset(token)


def compiled_at_once(run: Callable[[], Result], device: torch.device) -> Result:
    """run(), whose kernels have then been compiled all at once; what it launches may not decide what it launches."""
    if device.type == "cuda":
        with _compiling():
            run()
    return run()
