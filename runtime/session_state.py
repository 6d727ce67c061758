"""What a running student remembers: its state tensors in ONNX Runtime's memory, and copies of them.

B rows of a batch, S slots of a cache.
"""

from __future__ import annotations

import io
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcal_compiler.errors import ExportError

from .durable import write_atomic

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
_PAST, _PRESENT = "past_key_values.", "present."


@dataclass(frozen=True)
class SessionState:
    """A copy of everything a session remembers of its tokens.

    length: tokens seen, padding included. mask [B, length]. values: state tensors in the model's order, caches of
    `length` slots, windows of no more than that. model: fingerprint of the model that made it.
    """

    length: int
    mask: NDArray[np.int64]
    values: tuple[NDArray[Any], ...]
    model: str = ""

    def save(self, path: str | Path) -> None:
        """Writes the state as an .npz file, whole or not at all. Raises ExportError when it cannot be written."""
        buffer = io.BytesIO()
        arrays = {f"value_{i}": v for i, v in enumerate(self.values)}
        np.savez(buffer, mask=self.mask, model=np.array(self.model), **arrays)  # type: ignore[arg-type]
        try:
            write_atomic(Path(path), buffer.getvalue())
        except OSError as e:
            raise ExportError(
                str(path), f"cannot be written: {e.strerror or e}", "free space, or another folder"
            ) from e

    @classmethod
    def load(cls, path: str | Path) -> SessionState:
        """A state that `save` wrote. Raises ExportError for a file that is missing, damaged or of another kind."""
        try:
            if not Path(path).is_file():
                raise FileNotFoundError("no such file, or no plain one")
            with np.load(Path(path), allow_pickle=False) as file:
                _check_archive(file.zip, Path(path).stat().st_size)
                count = len(file.files) - 2
                mask, model = file["mask"], str(file["model"])
                values = tuple(file[f"value_{i}"] for i in range(count))
        except Exception as e:  # numpy reads headers as Python text: damage makes it raise nearly anything
            what = f"is no saved state: {type(e).__name__}: {e}"
            raise ExportError(str(path), what, "a file that SessionState.save wrote") from e
        return cls(mask.shape[-1], mask, values, model)


def _check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """Raises ValueError unless the arrays' bytes lie in the file as they are, as many as their shapes say."""
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
            raise ValueError(f"{entry.filename} is compressed or larger than the file")
        with archive.open(entry) as f:
            if np.lib.format.read_magic(f) != (1, 0):
                raise ValueError(f"{entry.filename} is of another version of the format")
            shape, _, dtype = np.lib.format.read_array_header_1_0(f)
            if math.prod(shape) * dtype.itemsize != entry.file_size - f.tell():
                raise ValueError(f"{entry.filename} says shape {shape}, which is not what it holds")


@dataclass
class Slot:
    """One state tensor of the graph, in memory that ONNX Runtime reads and writes directly.

    Three kinds. A recurrent state is a pair of buffers that swap after each run, since no runtime promises that a
    graph may write an output over its own input; so is a window beside it, and so are keys and values [B, K, R, D] of a
    kept layer's window, which fill from the first slot on. A cache with capacity is one buffer [B, K, capacity, D] that
    the fused attention does write in place. A cache without is a new tensor after each run, one chunk longer.
    """

    past: str
    present: str
    shape: tuple[int | None, ...]  # without the batch; None: the slots of a cache
    dtype: Any
    capacity: int | None = None
    value: Any = None  # numpy array
    spare: Any = None

    @property
    def is_cache(self) -> bool:
        return None in self.shape

    @property
    def is_recurrent(self) -> bool:
        return self.past.endswith(".recurrent_state")

    @property
    def is_window(self) -> bool:
        return not self.is_cache and self.past.endswith((".key", ".value"))

    @property
    def grows(self) -> bool:
        return self.is_cache and self.capacity is None

    def empty(self, batch: int, slots: int) -> NDArray[Any]:
        return np.zeros([batch, *(slots if d is None else d for d in self.shape)], self.dtype)

    def clear(self, batch: int) -> None:
        if self.capacity is not None and self.value is not None and len(self.value) == batch:
            return  # slots behind the last token are never read
        self.value = self.empty(batch, self.capacity or 0)  # untouched pages of it take no memory
        self.spare = None if self.is_cache else self.empty(batch, 0)

    def used_shape(self, batch: int, length: int) -> tuple[int, ...]:
        """The shape of `used`."""
        sizes = [length if d is None else d for d in self.shape]
        if self.is_window:
            sizes[1] = min(sizes[1], length)
        return batch, *sizes

    def fits(self, array: NDArray[Any], batch: int, length: int) -> bool:
        return array.shape == self.used_shape(batch, length) and array.dtype == self.dtype

    def set(self, array: NDArray[Any]) -> None:
        """Takes over a copy of an array as `used` gives it."""
        if self.grows:
            self.value = np.array(array, order="C")
            return
        self.clear(len(array))
        self.value[:, :, : array.shape[2]] = array

    def used(self, length: int) -> NDArray[Any]:
        """What is remembered of `length` tokens; not a copy."""
        return self.value[:, :, :length] if self.capacity is not None or self.is_window else self.value

    def bind(self, binding: Any, row: int | None) -> None:
        """Binds past and present for all rows, or for one."""
        from onnxruntime import OrtValue

        def part(array: NDArray[Any]) -> Any:  # shares the array's memory
            return OrtValue.ortvalue_from_numpy(array if row is None else array[row : row + 1])

        past = part(self.value)
        binding.bind_ortvalue_input(self.past, past)
        if self.capacity is not None:
            binding.bind_ortvalue_output(self.present, past)
        elif self.grows:
            binding.bind_output(self.present, "cpu")
        else:
            binding.bind_ortvalue_output(self.present, part(self.spare))

    def advance(self, presents: list[Any]) -> None:
        """After a run: presents are the new caches of one that grows, one of all rows or one of each."""
        if not self.is_cache:
            self.value, self.spare = self.spare, self.value
        elif self.grows:
            arrays = [p.numpy() for p in presents]
            self.value = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def find_slots(session: Any, where: str, capacity: int | None) -> list[Slot]:
    """The state tensors of a loaded model, in its order.

    capacity: slots of a cache that is written in place, None for caches that grow.

    Raises ExportError for a model that is no student, or whose state cannot be fed.
    """
    inputs = {i.name: i for i in session.get_inputs()}
    outputs = [o.name for o in session.get_outputs()]
    states = [n for n in inputs if n.startswith(_PAST)]
    partners = {n: _PRESENT + n.removeprefix(_PAST) for n in states}
    expected = {"input_ids", "attention_mask", *states}
    if set(inputs) != expected or outputs[:1] != ["logits"] or set(outputs[1:]) != set(partners.values()) or not states:
        seen = f"inputs {sorted(inputs)[:6]}, outputs {sorted(outputs)[:6]}"
        raise ExportError(where, f"is not a student of ours: {seen}", "a folder that tcal export wrote")
    slots = []
    for name in states:
        dtype = _DTYPES.get(inputs[name].type)
        if dtype is None:
            raise ExportError(where, f"{name} is {inputs[name].type}; only float, float16 and int8 states can be fed")
        shape = tuple(d if isinstance(d, int) else None for d in inputs[name].shape[1:])
        slots.append(Slot(name, partners[name], shape, dtype, capacity if None in shape else None))
    return slots
