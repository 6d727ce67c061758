"""Triton's interpreter with addresses that are checked: it shows what a card answers with an illegal memory access, or
not at all.

Each pointer that a launch is given gets a range of made-up addresses of its own, far from all others, so that an access
one element beyond its tensor is seen even where another tensor lies. Programs of a launch run in any order, so that
one may not touch what another one writes. Kernels with atomics are not known here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from torch import Tensor

RANGE = 44  # bits of the addresses of one pointer, which points to their middle
NOBODY, SEVERAL = -1, -2


class Launch:
    """The tensors of one launch, and which of its programs wrote and read which of their numbers."""

    def __init__(self, kernel: str, names: list[str]) -> None:
        self.kernel, self.names, self.converted = kernel, names, 0
        self.given: list[tuple[str, Tensor]] = []
        self.seen: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # of each storage: writers and readers

    def address(self, tensor: Tensor) -> int:
        self.given.append((self.names[self.converted], tensor))
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen[storage.data_ptr()] = tuple(np.full(storage.nbytes(), NOBODY) for _ in range(2))
        return (len(self.given) << RANGE) + (1 << (RANGE - 1))

    def checked(self, addresses: np.ndarray, mask: np.ndarray, size: int, program: int, *, store: bool) -> np.ndarray:
        """The true addresses of those that are made up. Raises AssertionError."""
        flat = addresses.ravel().astype(np.int64)
        there = np.broadcast_to(mask, addresses.shape).ravel().astype(bool)
        offset = (flat & ((1 << RANGE) - 1)) - (1 << (RANGE - 1))
        true = np.zeros_like(flat)
        for number in np.unique(flat[there] >> RANGE):
            place = f"{self.kernel}, program {program}, {'store to' if store else 'load from'}"
            assert 0 < number <= len(self.given), f"{place} {number}, which is no pointer"
            name, tensor = self.given[number - 1]
            mine = there & (flat >> RANGE == number)
            extent = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            nbytes = extent * size if tensor.numel() else 0
            low, high = offset[mine].min(), offset[mine].max() + size
            assert low >= 0 and high <= nbytes, f"{place} {name}: bytes {low} to {high} of {nbytes}"
            self._note(tensor, offset[mine], program, f"{place} {name}", store=store)
            true[mine] = tensor.data_ptr() + offset[mine]
        return true.astype(np.uint64).reshape(addresses.shape)

    def _note(self, tensor: Tensor, offset: np.ndarray, program: int, place: str, *, store: bool) -> None:
        storage = tensor.untyped_storage().data_ptr()
        writers, readers = self.seen[storage]
        at = offset + (tensor.data_ptr() - storage)
        for users, kind in ((writers, "wrote"), (readers, "read"))[: 1 + store]:
            others = users[at][(users[at] != NOBODY) & (users[at] != program)]
            assert not others.size, f"{place}: another program of the launch {kind} it"
        if store:
            writers[at] = program
        else:
            readers[at] = np.where((readers[at] == NOBODY) | (readers[at] == program), program, SEVERAL)


@contextmanager
def checked_addresses() -> Iterator[set[str]]:
    """Inside, each load and store of an interpreted kernel is checked. Yields the names of the kernels that ran."""
    from triton.language import pointer_type, tensor
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    call, convert = interpreter.GridExecutor.__call__, interpreter._implicit_cvt
    load, store = builder.create_masked_load, builder.create_masked_store
    kernels: set[str] = set()
    current: Launch

    def launch(self: Any, *args: Any, **options: Any) -> None:
        nonlocal current
        current = Launch(self.fn.__name__, [name for name in self.arg_names if name not in self.constexprs])
        kernels.add(self.fn.__name__)
        call(self, *args, **options)

    def converted(arg: Any) -> Any:
        found = convert(arg)
        if isinstance(arg, Tensor):
            handle = interpreter.TensorHandle(np.array([current.address(arg)], dtype=np.uint64), found.handle.dtype)
            found = tensor(handle, found.type)
        current.converted += 1
        return found

    def true(self: Any, pointers: Any, mask: Any, *, store: bool) -> Any:
        element = pointers.get_element_ty()
        assert not isinstance(element, pointer_type)
        x, y, z = self.grid_idx
        _, rows, layers = self.grid_dim
        program, size = (x * rows + y) * layers + z, max(8, element.primitive_bitwidth) // 8
        data = current.checked(pointers.data, mask.data, size, program, store=store)
        return interpreter.TensorHandle(data, pointers.dtype)

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        return load(self, true(self, pointers, mask, store=False), mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, true(self, pointers, mask, store=True), value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launch)
        patch.setattr(interpreter, "_implicit_cvt", converted)
        patch.setattr(builder, "create_masked_load", checked_load)
        patch.setattr(builder, "create_masked_store", checked_store)
        yield kernels
