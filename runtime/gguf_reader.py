"""GGUF files read without a memmap object for every value of their header."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray


@contextlib.contextmanager
def plain_gguf_reader() -> Iterator[None]:
    """Inside, transformers reads GGUF files through plain arrays over the mapped file; it needs the gguf package.

    The package's reader keeps two or three slices of the file for every token of the vocabulary. Slices of np.memmap
    take four times as long as those of an array, and more than twice the memory.
    """
    import gguf

    class PlainReader(gguf.GGUFReader):
        @property  # type: ignore[override]
        def data(self) -> NDArray[np.uint8]:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = mapped.view(np.ndarray)

    with mock.patch.object(gguf, "GGUFReader", PlainReader):
        yield
