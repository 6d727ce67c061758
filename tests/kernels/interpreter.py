"""Tests that run Triton kernels in its interpreter, on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from addresses import checked_addresses

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled")


@contextmanager
def interpreter_or_skip() -> Iterator[set[str]]:
    """Inside, each address of a kernel is checked (`addresses`); yields the names of the kernels that ran.

    Skips where this Triton's interpreter does not run at all: that of 3.6 cannot count a loop under numpy 2.4.
    """
    try:
        with checked_addresses() as kernels:
            yield kernels
    except Exception as e:
        if "0-dimensional" not in repr(e):
            raise
        pytest.skip(f"this Triton's interpreter does not run here: {e!r}")
