"""Memory that is given back, and what running out of it looks like, whichever library runs out of it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import resource
from pathlib import Path

from tcal_compiler.errors import StageError

_WORDS = (
    "not enough memory",
    "allocate memory",
    "failed to map segment",
    "bad_alloc",
    "bad allocation",
    "out of memory",
)
_ALMOST_NONE = 1 << 24  # bytes
HINT = "fewer --calib-sequences, a smaller --batch, or more memory"


def give_back() -> None:
    """Frees what only cycles hold, and returns to the system what glibc, where that allocates, keeps of freed blocks.

    Training leaves hundreds of megabytes of both.
    """
    gc.collect()
    with contextlib.suppress(AttributeError):  # of another C library
        ctypes.CDLL(None).malloc_trim(0)


def is_out_of_memory(e: BaseException) -> bool:
    """Whether e, or an error that led to it, means that no memory was left.

    Libraries that are loaded, PyTorch and ONNX Runtime say so in words only. Others turn what they did not get into
    errors of another kind: with a limit on the address space of which next to nothing is left, any error counts.
    """
    seen: set[int] = set()
    current: BaseException | None = e
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, MemoryError) or (isinstance(current, OSError) and current.errno == errno.ENOMEM):
            return True
        if any(words in str(current) for words in _WORDS):
            return True
        current = current.__cause__ or current.__context__
    return _address_space_left() < _ALMOST_NONE


def _address_space_left() -> float:
    """Bytes; infinite where there is no limit, or no way to know what is used."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError, ValueError):
            return limit - int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return float("inf")


def out_of_memory_error(where: str, e: BaseException) -> StageError:
    first, *_ = str(e).splitlines() or [""]
    return StageError(where, f"out of memory: {first or type(e).__name__}", HINT)
