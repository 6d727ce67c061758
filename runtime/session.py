"""Runs an exported student in ONNX Runtime: prefill, one token at a time, with its state in reused buffers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tcal_compiler.errors import DataError, ExportError
from tcal_compiler.passes.make_stateful import StatefulGraph

from .onnx_export import CONFIG_FILE, MODEL_FILE
from .sampling import Sampler

LEAST_RUNTIME = (1, 25)  # the first with the LinearAttention kernel
_PAST, _PRESENT = "past_key_values.", "present."
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_PREFILL_LOGITS = 1 << 24  # logits computed in one prefill run; bounds its memory
_LONGEST_CHUNK = 512


@dataclass(frozen=True)
class SessionState:
    """A copy of everything a session remembers of its tokens. length: tokens seen, padding included."""

    length: int
    mask: NDArray[np.int64]
    values: tuple[NDArray[Any], ...]


@dataclass
class _Slot:
    """One state tensor: a fixed-size buffer pair that is swapped after each run, or a cache that grows (spare None).

    ONNX Runtime does not promise that a graph may write an output over its own input, hence a pair and not one buffer.
    """

    past: str
    present: str
    shape: tuple[int | None, ...]  # None: the dimension that grows
    dtype: Any
    value: Any = None
    spare: Any = None

    @property
    def grows(self) -> bool:
        return None in self.shape

    def set(self, array: NDArray[Any]) -> None:
        from onnxruntime import OrtValue

        self.value = OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
        self.spare = None if self.grows else OrtValue.ortvalue_from_numpy(np.zeros_like(array))

    def clear(self, batch: int) -> None:
        self.set(np.zeros([batch, *(0 if d is None else d for d in self.shape[1:])], self.dtype))


class OnnxSession:
    """One running student: feed tokens with `forward`, `prefill` or `step`; its state is kept between calls.

    Args:
        path: the exported folder, or its model.onnx.
        threads: of ONNX Runtime; None lets it choose.
        optimized_path: where ONNX Runtime writes the graph that it really runs; None nowhere.

    Raises:
        ExportError: missing, damaged or foreign model, or an ONNX Runtime that cannot run it.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None, optimized_path: Path | None = None) -> None:
        given = Path(path)
        self.path = given / MODEL_FILE if given.is_dir() else given
        if not self.path.is_file():
            raise ExportError(str(self.path), "no such file", "tcal export writes it")
        self._config = _read_config(self.path.with_name(CONFIG_FILE))
        self._session = _load(self.path, threads, optimized_path)
        self._slots = _find_slots(self._session, str(self.path))
        vocab = self._session.get_outputs()[0].shape[2]
        self.vocab_size: int = vocab if isinstance(vocab, int) else int(self._config["vocab_size"])
        self.context_length: int | None = self._config.get("context_length")
        self.eos_token_id: int | None = self._config.get("eos_token_id")
        self.reset()

    @property
    def length(self) -> int:
        """Tokens seen so far, padding included."""
        return self._mask.shape[1]

    @property
    def state_bytes(self) -> int:
        """Bytes of the state that must be kept between two tokens."""
        return sum(int(np.prod(s.value.shape())) * np.dtype(s.dtype).itemsize for s in self._slots)

    def reset(self, *, batch: int = 1) -> None:
        """Forgets all tokens; the next ones come in this many rows. Raises ExportError when memory cannot hold them."""
        self._batch = batch
        try:
            self._mask: NDArray[np.int64] = np.zeros((batch, 0), np.int64)
            for slot in self._slots:
                slot.clear(batch)
        except (MemoryError, ValueError) as e:  # numpy's for shapes beyond memory and beyond its index
            raise ExportError(str(self.path), f"its state of {batch} rows cannot be held: {e}", "fewer rows") from e

    def snapshot(self) -> SessionState:
        return SessionState(self.length, self._mask.copy(), tuple(s.value.numpy().copy() for s in self._slots))

    def restore(self, state: SessionState) -> None:
        """Back to a snapshot, of this or of another session of the same model; a snapshot can be restored many times.

        Raises ExportError when it does not fit this model.
        """
        shapes = [(len(state.mask), *s.shape[1:]) for s in self._slots]
        fits = len(state.values) == len(shapes) and all(
            len(v.shape) == len(s) and all(d in (None, n) for d, n in zip(s, v.shape, strict=True))
            for s, v in zip(shapes, state.values, strict=True)
        )
        if not fits:
            raise ExportError(str(self.path), "the snapshot is of another model")
        self._batch, self._mask = len(state.mask), state.mask.copy()
        for slot, array in zip(self._slots, state.values, strict=True):
            slot.set(array)

    def forward(self, ids: NDArray[np.int64], mask: NDArray[np.int64] | None = None) -> NDArray[Any]:
        """Logits [B, T, V] of the next ids [B, T]. mask [B, T]: 0 for padding, which leaves the state as it is.

        Raises DataError for ids outside the vocabulary, another batch than `reset` said, or a full context, and
        ExportError when the runtime fails: beyond the end of a position table, or out of memory. The state stays.
        """
        ids = np.ascontiguousarray(ids, dtype=np.int64)
        if ids.ndim != 2 or ids.shape[0] != self._batch or ids.shape[1] == 0:
            raise DataError("token ids", f"have shape {ids.shape}; want [{self._batch}, at least 1]")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise DataError("token ids", f"{ids.min()}..{ids.max()} are outside the vocabulary of {self.vocab_size}")
        self._check_room(ids.shape[1])
        new = np.ones_like(ids) if mask is None else np.asarray(mask, np.int64)
        mask = np.concatenate([self._mask, new], 1)
        logits = self._run(ids, mask)
        self._mask = mask
        return logits

    def prefill(self, ids: Sequence[int]) -> NDArray[Any]:
        """Feeds a prompt and returns the logits [V] behind its last token. Raises DataError when it is empty."""
        if len(ids) == 0:
            raise DataError("prompt", "is empty: there is no token to continue from", "at least one token")
        self._check_room(len(ids))
        size = max(1, min(_LONGEST_CHUNK, _PREFILL_LOGITS // self.vocab_size))
        row = np.asarray(ids, np.int64)[None]
        for start in range(0, len(ids), size):
            logits = self.forward(row[:, start : start + size])
        return logits[0, -1]

    def step(self, token: int) -> NDArray[Any]:
        """Feeds one token and returns the logits [V] behind it."""
        return self.forward(np.array([[token]], np.int64))[0, -1]

    def generate(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        *,
        eos: int | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> Iterator[int]:
        """Continues the tokens seen so far and `ids`, token by token; stops behind eos, which is still yielded.

        Raises, before the first token: DataError for an empty prompt or too little room in the context, ConfigError
        for sampling options out of range.
        """
        sampler = Sampler(temperature, top_k, top_p)
        if len(ids) == 0:
            raise DataError("prompt", "is empty: there is no token to continue from", "at least one token")
        self._check_room(len(ids) + max(0, max_new_tokens - 1))
        return self._generate(ids, max_new_tokens, eos, sampler, np.random.default_rng(seed))

    def _generate(
        self, ids: Sequence[int], count: int, eos: int | None, sampler: Sampler, rng: np.random.Generator
    ) -> Iterator[int]:
        logits = self.prefill(ids)
        for i in range(count):
            token = sampler(logits, rng)
            yield token
            if token == eos:
                return
            if i + 1 < count:
                logits = self.step(token)

    def _check_room(self, new: int) -> None:
        if self.context_length is not None and self.length + new > self.context_length:
            what = f"{self.length} tokens and {new} more do not fit in the context of {self.context_length}"
            raise DataError("context", what, "a shorter prompt, fewer new tokens, or export with a larger max_length")

    def _run(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[Any]:
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", mask)
        binding.bind_output("logits", "cpu")
        for slot in self._slots:
            binding.bind_ortvalue_input(slot.past, slot.value)
            if slot.grows:
                binding.bind_output(slot.present, "cpu")
            else:
                binding.bind_ortvalue_output(slot.present, slot.spare)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as e:  # ONNX Runtime raises its own types, which share no base
            what = f"onnxruntime failed behind {self.length} tokens: {' '.join(str(e).split())[:300]}"
            raise ExportError(str(self.path), what, "stay within the teacher's own context length") from e
        logits, *present = binding.get_outputs()  # in the order of binding, not of the graph
        for slot, value in zip(self._slots, present, strict=True):
            if slot.grows:
                slot.value = value
            else:
                slot.value, slot.spare = slot.spare, slot.value
        return logits.numpy()


def _read_config(path: Path) -> dict[str, Any]:
    """The "model" part of genai_config.json; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        if not isinstance(model["context_length"], int) or not isinstance(model["vocab_size"], int):
            raise TypeError("context_length and vocab_size must be whole numbers")
        return model
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise ExportError(str(path), f"is damaged: {type(e).__name__}: {e}", "export again") from e


def _load(path: Path, threads: int | None, optimized_path: Path | None) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions
    options.intra_op_num_threads = threads or 0
    if optimized_path is not None:
        options.optimized_model_filepath = str(optimized_path)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # ONNX Runtime raises its own types, which share no base
        version = tuple(int(p) for p in ort.__version__.split(".")[:2])
        newer = f"onnxruntime {LEAST_RUNTIME[0]}.{LEAST_RUNTIME[1]} or newer"
        hint = "export again" if version >= LEAST_RUNTIME else newer
        what = f"onnxruntime {ort.__version__} cannot load it: {' '.join(str(e).split())[:300]}"
        raise ExportError(str(path), what, hint) from e


def _find_slots(session: Any, where: str) -> list[_Slot]:
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
            raise ExportError(where, f"{name} is {inputs[name].type}; only float and float16 states can be fed")
        shape = tuple(d if isinstance(d, int) else None for d in inputs[name].shape)
        slots.append(_Slot(name, partners[name], (0, *shape[1:]), dtype))
    return slots


def torch_generate(
    stateful: StatefulGraph, ids: Sequence[int], max_new_tokens: int
) -> tuple[list[int], NDArray[np.float32]]:
    """Greedy tokens of the stateful torch graph, and the logits [n, V] that they were chosen from."""
    state = stateful.empty_state(1)
    new, mask = torch.tensor([list(ids)]), torch.ones(1, len(ids), dtype=torch.int64)
    tokens: list[int] = []
    rows = []
    with torch.no_grad():
        for _ in range(max_new_tokens):
            logits, *present = stateful.gm(new, mask, *state)
            state = tuple(present)
            rows.append(logits[0, -1].numpy())
            tokens.append(int(rows[-1].argmax()))
            new, mask = torch.tensor([tokens[-1:]]), torch.ones(1, mask.shape[1] + 1, dtype=torch.int64)
    return tokens, np.stack(rows)
