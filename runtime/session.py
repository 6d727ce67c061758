"""Runs an exported student in ONNX Runtime: prefill, one token at a time, with its state in reused buffers.

B rows of a batch, T new tokens, P tokens seen before, V entries of the vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tcal_compiler.errors import ConfigError, DataError, ExportError
from tcal_compiler.passes.files import read_small
from tcal_compiler.passes.json_text import read_json

from .onnx_export import (
    CONFIG_FILE,
    FINGERPRINT,
    INT8_CACHES,
    LOWERINGS,
    MODEL_FILE,
    check_runtime,
    runtime_version,
)
from .sampling import Sampler
from .session_state import SessionState, find_slots

_PREFILL_LOGITS = 1 << 24  # logits computed in one prefill run; bounds its memory
_LONGEST_CHUNK = 512


class OnnxSession:
    """One running student: feed tokens with `forward`, `prefill` or `step`; its state is kept between calls.

    Args:
        path: the exported folder, or its model.onnx.
        threads: of ONNX Runtime; None lets it choose.
        optimized_path: where ONNX Runtime writes the graph that it really runs; None nowhere.
        profile_prefix: how the file is named that it writes the time of every node to when the session is dropped.

    Raises:
        ExportError: missing, damaged or foreign model, or an ONNX Runtime that cannot run it.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int | None = None,
        optimized_path: Path | None = None,
        profile_prefix: str | None = None,
    ) -> None:
        given = Path(path)
        self.path = given / MODEL_FILE if given.is_dir() else given
        if not self.path.is_file():
            raise ExportError(str(self.path), "no such file", "tcal export writes it")
        self._config, shares_buffers = read_genai_config(self.path.with_name(CONFIG_FILE))
        self._session = load_model(self.path, threads, optimized_path, profile_prefix)
        capacity = self._config["context_length"] if shares_buffers else None
        try:
            self.fingerprint: str = self._session.get_modelmeta().custom_metadata_map.get(FINGERPRINT, "")
            self._slots = find_slots(self._session, str(self.path), capacity)
        except UnicodeDecodeError as e:
            raise ExportError(str(self.path), f"is damaged: a name in it is no text: {e}", "export again") from e
        if any(s.dtype == np.int8 for s in self._slots):
            check_runtime("ort", INT8_CACHES)
        vocab = self._session.get_outputs()[0].shape[2]
        self.vocab_size: int = vocab if isinstance(vocab, int) else int(self._config["vocab_size"])
        self.context_length: int | None = self._config.get("context_length")
        self.eos_token_id: int | None = self._config.get("eos_token_id")
        self._bound: dict[int, Any] = {}
        self._turn = 0
        self.reset()

    @property
    def length(self) -> int:
        """Tokens seen so far, padding included."""
        return self._mask.shape[1]

    @property
    def state_bytes(self) -> int:
        """Bytes of what is remembered of the tokens seen."""
        return sum(s.used(self.length).nbytes for s in self._slots)

    @property
    def step_bytes(self) -> int:
        """Bytes of state that the next token needs at least: keys and values once, recurrent states in and out."""
        return sum(s.used(self.length).nbytes * (2 if s.is_recurrent else 1) for s in self._slots)

    @property
    def state_names(self) -> tuple[str, ...]:
        """The inputs that a snapshot's values are for, in its order."""
        return tuple(s.past for s in self._slots)

    def state_shapes(self, length: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of a snapshot's values behind `length` tokens of one row."""
        return tuple(s.used_shape(1, length) for s in self._slots)

    def reset(self, *, batch: int = 1) -> None:
        """Forgets all tokens; the next ones come in this many rows. Raises ExportError when memory cannot hold them."""
        self._batch = batch
        self._forget_bindings()
        try:
            self._mask: NDArray[np.int64] = np.zeros((batch, 0), np.int64)
            for slot in self._slots:
                slot.clear(batch)
        except (MemoryError, ValueError) as e:  # numpy's for shapes beyond memory and beyond its index
            raise ExportError(str(self.path), f"its state of {batch} rows cannot be held: {e}", "fewer rows") from e

    def snapshot(self) -> SessionState:
        """A copy of the state, to go back to, to save, or to continue elsewhere."""
        values = tuple(s.used(self.length).copy() for s in self._slots)
        return SessionState(self.length, self._mask.copy(), values, self.fingerprint)

    def restore(self, state: SessionState) -> None:
        """Back to a snapshot, of this or of another session of the same model; a snapshot can be restored many times.

        Raises ExportError when it is of another model, of the same in another form, or longer than the context.
        """
        if state.model != self.fingerprint:
            what = f"the snapshot is of another model: weights {_form(state.model)}, here {_form(self.fingerprint)}"
            hint = "a snapshot of this very export; where another version or --dtype made it, its tokens again"
            raise ExportError(str(self.path), what, hint)
        batch, length = state.mask.shape if state.mask.ndim == 2 else (0, -1)
        fits = len(state.values) == len(self._slots) and length == state.length
        if not fits or not all(s.fits(v, batch, length) for s, v in zip(self._slots, state.values, strict=True)):
            what = "the snapshot is of these weights, but its tensors are not those of the model's state"
            raise ExportError(str(self.path), what, "a snapshot of this very export")
        if self.context_length is not None and length > self.context_length:
            raise ExportError(str(self.path), f"the snapshot holds {length} tokens, the context {self.context_length}")
        self._batch, self._mask = batch, state.mask.copy()
        self._forget_bindings()
        for slot, array in zip(self._slots, state.values, strict=True):
            slot.set(array)

    def fork(self) -> OnnxSession:
        """An independent session that has seen the same tokens; the model is loaded once for both."""
        other = copy.copy(self)
        other._slots = [replace(s, value=None, spare=None) for s in self._slots]
        other.restore(self.snapshot())
        return other

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
        size = prefill_size(self.vocab_size)
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
        self._check_room(len(ids), max_new_tokens)
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

    def generate_batch(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, eos: int | None = None, padding: str = "left"
    ) -> list[list[int]]:
        """Greedy continuations of several prompts from an empty state, one row each; forgets what was seen before.

        A row stops behind eos, which it keeps; the others go on. padding: "left" or "right", which side shorter prompts
        are filled on; the tokens do not depend on it.

        Raises, before anything runs: DataError for no prompt, an empty one or too little room in the context,
        ConfigError for another side.
        """
        if padding not in ("left", "right"):
            raise ConfigError("padding", f"{padding!r} is no side", "left or right")
        if not prompts or not all(len(p) for p in prompts):
            what = f"{len(prompts)} prompts of {[len(p) for p in prompts]} tokens"
            raise DataError("prompts", what, "at least one prompt of at least one token")
        self.reset(batch=len(prompts))
        longest = max(len(p) for p in prompts)
        self._check_room(longest, max_new_tokens)
        ids: NDArray[np.int64] = np.zeros((len(prompts), longest), np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            place = slice(longest - len(prompt), longest) if padding == "left" else slice(len(prompt))
            ids[row, place], mask[row, place] = prompt, 1
        last = [longest - 1 if padding == "left" else len(p) - 1 for p in prompts]
        tokens: list[list[int]] = [[] for _ in prompts]
        going = np.full(len(prompts), max_new_tokens > 0)
        logits = self.forward(ids, mask)[np.arange(len(prompts)), last] if going.any() else None
        while logits is not None:
            chosen = logits.argmax(-1)
            for row in np.flatnonzero(going).tolist():
                tokens[row].append(int(chosen[row]))
                going[row] = chosen[row] != eos and len(tokens[row]) < max_new_tokens
            logits = self.forward(chosen[:, None], going[:, None])[:, -1] if going.any() else None
        return tokens

    def _check_room(self, prompt: int, new: int = 0) -> None:
        """The last of the new tokens is not read any more."""
        if self.context_length is None or self.length + prompt + max(0, new - 1) <= self.context_length:
            return
        before, behind = f"{self.length} tokens seen, " if self.length else "", f" and {new} new ones" if new else ""
        what = f"{before}{prompt} tokens of prompt{behind} do not fit in the context of {self.context_length}"
        room = self.context_length - self.length - prompt + 1
        hint = f"at most {room} new tokens" if new and room > 0 else "a shorter prompt"
        raise DataError("context", what, hint)

    def _run(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[Any]:
        """Runs all rows at once; the chunks behind the first of a batch row by row where there is attention.

        The fused attention takes several tokens behind a past for one row only.
        """
        behind, caches = self.length > 0, any(s.is_cache or s.is_window for s in self._slots)
        apart = behind and caches and self._batch > 1 and ids.shape[1] > 1
        rows = range(self._batch) if apart else (None,)
        outputs = [self._run_rows(ids, mask, row) for row in rows]
        for i, slot in enumerate(self._slots):
            slot.advance([o[i + 1] for o in outputs] if slot.grows else [])
        self._turn = 1 - self._turn
        logits = [o[0].numpy() for o in outputs]
        return logits[0] if len(logits) == 1 else np.concatenate(logits)

    def _run_rows(self, ids: NDArray[np.int64], mask: NDArray[np.int64], row: int | None) -> Any:
        """Logits and present states, in this order, of all rows or of one."""
        part = slice(None) if row is None else slice(row, row + 1)
        binding = self._state_binding(row)
        binding.bind_cpu_input("input_ids", ids[part])
        binding.bind_cpu_input("attention_mask", mask[part])
        binding.bind_output("logits", "cpu")  # new memory each time: the caller keeps the last one's
        try:
            self._session.run_with_iobinding(binding)
        except Exception as e:  # ONNX Runtime raises its own types, which share no base
            what = f"onnxruntime failed behind {self.length} tokens: {' '.join(str(e).split())[:300]}"
            raise ExportError(str(self.path), what, "stay within the teacher's own context length") from e
        return binding.get_outputs_as_ortvaluevector()  # in the order of binding, not of the graph

    def _state_binding(self, row: int | None) -> Any:
        """The states bound to their memory. Recurrent states swap two buffers, so two bindings serve every step."""
        keep = row is None and not any(s.grows for s in self._slots)
        if keep and self._turn in self._bound:
            return self._bound[self._turn]
        binding = self._session.io_binding()
        binding.bind_output("logits", "cpu")
        for slot in self._slots:
            slot.bind(binding, row)
        if keep:
            self._bound[self._turn] = binding
        return binding

    def _forget_bindings(self) -> None:
        """For when states move to other memory."""
        self._bound = {}
        self._turn = 0


def _form(fingerprint: str) -> str:
    """What a model's fingerprint says, for a message: its weights, and what a smaller variant made of them."""
    weights, _, form = fingerprint.partition("-")
    return (weights[:16] or "unknown") + (f" as {form}" if form else "")


def prefill_size(per_token: int) -> int:
    """Tokens of a prefill run of which each has so many logits."""
    return max(1, min(_LONGEST_CHUNK, _PREFILL_LOGITS // per_token))


def read_genai_config(path: Path) -> tuple[dict[str, Any], bool]:
    """The "model" part of genai_config.json and whether caches are written in place; empty when there is no file.

    Raises ExportError when the file is damaged.
    """
    if not path.is_file():
        return {}, False
    try:
        config = read_json(read_small(path))
        model, search = config["model"], config.get("search", {})
        for name in ("context_length", "vocab_size"):
            if type(model[name]) is not int or not 0 < model[name] < 1 << 40:
                raise ValueError(f"{name} is {model[name]!r} and no number of tokens")
        return model, bool(search.get("past_present_share_buffer", False))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ExportError(str(path), f"is damaged: {type(e).__name__}: {e}", "export again") from e


def load_model(
    path: Path, threads: int | None, optimized_path: Path | None = None, profile_prefix: str | None = None
) -> Any:
    """The model as a session of ONNX Runtime; see `OnnxSession`."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions
    options.intra_op_num_threads = threads or 0
    if optimized_path is not None:
        options.optimized_model_filepath = str(optimized_path)
    if profile_prefix is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile_prefix
    try:
        # Its fallback would try the same provider again, and print that to stdout.
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as e:  # ONNX Runtime raises its own types, which share no base
        needed = {
            ".".join(map(str, row.runtime)): name for name, row in LOWERINGS.items() if runtime_version() < row.runtime
        }
        newer = ", ".join(f"onnxruntime {version} or newer for profile {name}" for version, name in needed.items())
        hint = newer or "export again"
        what = f"onnxruntime {ort.__version__} cannot load it: {' '.join(str(e).split())[:300]}"
        raise ExportError(str(path), what, hint) from e
