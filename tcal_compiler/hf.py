"""A student as a transformers model: `generate`, beam search, evaluation harnesses, fine-tuning.

    model = StudentForCausalLM.from_pretrained("run")

Two graphs share their weights. A plain call runs the run folder's own student graph, on the whole sequence: the same
bits, and gradients. With a cache, as `generate` calls it, the stateful graph runs, without gradients.

B rows of a batch, T new tokens, P tokens in the cache, padding included in both, V entries of the vocabulary.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from .errors import ConfigError, DataError, RunFolderError
from .passes.files import read_small
from .passes.graph import move_to
from .passes.json_text import read_json
from .passes.make_stateful import make_stateful
from .runtime.hf_cache import StudentCache, full_mask
from .runtime.hf_files import (
    GRAPH_FILE,
    WEIGHTS_FILE,
    OpenStudent,
    load_student,
    new_files_of,
    open_program,
    save_student,
)
from .runtime.hf_inputs import check_kept, check_labels
from .runtime.manifest import MANIFEST_NAME
from .runtime.onnx_export import CONFIG_FILE
from .runtime.program_file import load_program
from .runtime.run_files import os_error
from .runtime.run_folder import RunFolder
from .runtime.session import prefill_size, read_genai_config

WHERE = "StudentForCausalLM"
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"  # by version
# What from_pretrained may be told beside the folder: what holds anyway. AutoModel and harnesses say some of it.
_KNOWN: dict[str, tuple[Any, ...]] = {
    "dtype": (None, "auto", "float32", torch.float32),
    "torch_dtype": (None, "auto", "float32", torch.float32),
    "trust_remote_code": (None, False),
    "revision": (None, "main"),
    "subfolder": (None, ""),
    "local_files_only": (None, False, True),
    "use_safetensors": (None, True),
    "low_cpu_mem_usage": (None, False, True),
}


class StudentConfig(PreTrainedConfig):
    """Sizes of a student; its graph says the rest. max_position_embeddings: the longest sequence."""

    model_type = "tcal_student"
    vocab_size: int = 0
    max_position_embeddings: int = 0
    num_hidden_layers: int = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None


class StudentForCausalLM(PreTrainedModel, GenerationMixin):
    """A student with transformers' interface, in float32, on a CPU or a CUDA device.

    Attributes:
        graph: the student's graph; its parameters are the model's.
    """

    config_class = StudentConfig
    main_input_name = "input_ids"
    _is_stateful = True  # a recurrent state cannot take tokens back: no assisted generation

    def __init__(self, config: StudentConfig, student: OpenStudent | None = None) -> None:
        super().__init__(config)
        if student is None:
            what = "a configuration alone makes no student"
            raise ConfigError(WHERE, what, "StudentForCausalLM.from_pretrained(folder)")
        self.graph = student.capture.gm
        self._files = student
        self._stateful = make_stateful(student.capture, verify=False, max_length=config.max_position_embeddings)
        config.num_hidden_layers = self._stateful.depth
        self.post_init()
        self.eval()

    def _init_weights(self, module: Any) -> None:
        """Weights come with the graph."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any
    ) -> StudentForCausalLM:
        """The student of a run folder that is exported, or of a folder that save_pretrained wrote; nothing else.

        options: device_map, a device for the whole model; of transformers' others, those that ask for nothing else
        than float32 weights from a folder here without remote code.

        Raises:
            RunFolderError: no such folder, not complete, damaged, or of another kind.
            ConfigError: an option that asks for something else.
        """
        for name in ("config", "adapter_kwargs"):  # AutoModel's own: read from the same folder, and of adapters
            options.pop(name, None)
        device = _device_of(options.pop("device_map", None))
        for name, value in options.items():
            if value not in _KNOWN.get(name, (None,)):
                what = f"{name}={value!r} cannot be had: a student is loaded in float32 from a folder of its own"
                raise ConfigError(f"{WHERE}.from_pretrained", what, f"leave {name} out")
        folder = Path(pretrained_model_name_or_path)
        if os.path.lexists(folder / MANIFEST_NAME):
            student, config = _of_run(folder)
        elif (folder / WEIGHTS_FILE).is_file() or (folder / GRAPH_FILE).is_file():
            config = _read_config(folder)
            student = load_student(folder, context=config.max_position_embeddings)
        else:
            what = "is no run folder and holds no saved student" if folder.is_dir() else "no such folder"
            raise RunFolderError(str(folder), what, "a run folder, or one that save_pretrained wrote; no download")
        if config.vocab_size != student.capture.vocab_size:
            what = f"vocab_size is {config.vocab_size}, the graph's is {student.capture.vocab_size}"
            raise RunFolderError(str(folder), what, "the files that were written together")
        config.name_or_path = str(folder)
        model = cls(config, student)
        if (folder / "generation_config.json").is_file():
            model.generation_config = _read_generation_config(folder)
        return model if device is None else model.to(device)  # type: ignore[arg-type]

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:  # type: ignore[override]
        """Writes graph.pt2, model.safetensors, config.json and generation_config.json; no tokenizer.

        All four are written below .saving first: a folder that held a student before holds it until they are there.

        Raises RunFolderError for a run folder or one that cannot be written, StageError when no space is left, and
        ConfigError for configurations that transformers cannot write.
        """
        folder = Path(save_directory)
        if unknown := [n for n, v in options.items() if v not in (None, False) and n != "safe_serialization"]:
            raise ConfigError(f"{WHERE}.save_pretrained", f"{unknown[0]} is not known", "the folder alone")
        if not os.fspath(save_directory):
            raise ConfigError(f"{WHERE}.save_pretrained", "the folder's name is empty", "a folder of its own")
        if os.path.lexists(folder / MANIFEST_NAME):
            raise RunFolderError(str(folder), "is a run folder", "another folder")
        config = copy.deepcopy(self.config)
        config.architectures = [type(self).__name__]
        config.dtype = "float32"
        try:
            with new_files_of(folder) as new:
                try:
                    config.save_pretrained(new)
                    self.generation_config.save_pretrained(new)
                except (ValueError, TypeError) as e:  # transformers checks a generation configuration as it writes it
                    what = f"a configuration cannot be written: {' '.join(str(e).split())[:200]}"
                    raise ConfigError(f"{WHERE}.save_pretrained", what, "see model.generation_config") from e
                save_student(self._files, new, context=config.max_position_embeddings)
        except OSError as e:
            raise os_error(e, folder) from e

    def new_cache(self, slots: int | None = None) -> StudentCache:
        """An empty state for this model; slots: tokens that caches of kept layers have room for from the start."""
        if slots is not None and not 0 < slots <= self.config.max_position_embeddings:
            what = f"{slots} tokens; a static cache holds 1 to {self.config.max_position_embeddings}"
            raise ConfigError("cache", what, "fewer tokens, or export with a larger max_length")
        return StudentCache(self, self._stateful, slots=slots)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: StudentCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: StudentCache | None = None,
        **others: Any,
    ) -> Any:
        """Logits [B, T, V] of the new ids, their loss where labels are given, and the cache where there is one.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, P + T], 0 for padding, on any side; None: none since the cache was empty.
            cache, past_key_values: two names of one thing, by version of transformers: what `new_cache` made or an
                earlier call returned. It is changed in place.
            labels: [B, T], -100 where no loss counts; shifted inside.
            use_cache: True makes a cache where none is given.
            logits_to_keep: only of so many last tokens, or of these; 0: of all, which labels need.

        Raises:
            DataError: ids or labels outside the vocabulary, a mask or labels of another shape, logits of tokens that
                are not there, or more tokens than the context holds.
            ConfigError: another model's cache, or an argument that the graph has no use for.
        """
        if asked := [n for n, v in others.items() if v is not None and v is not False]:
            what = f"{asked[0]} is given; a student's graph takes token ids and gives logits"
            raise ConfigError(f"{WHERE}.forward", what, "input_ids, attention_mask, labels, use_cache, logits_to_keep")
        state = past_key_values if cache is None else cache
        if state is not None and not isinstance(state, StudentCache):
            what = f"is a {type(state).__name__}, which cannot hold a student's state"
            raise ConfigError("cache", what, "model.new_cache(), or none")
        if state is None and use_cache:
            state = self.new_cache()
        past = 0 if state is None else state.get_seq_length()
        ids, mask = self._inputs(input_ids, attention_mask, past)
        check_kept(logits_to_keep, ids.shape[1])
        if labels is not None:
            check_labels(labels, ids, logits_to_keep, self.config.vocab_size)
        if state is None:
            logits = _keep(self._whole(ids, mask), logits_to_keep)
        else:
            logits = self._continue(ids, mask, state, logits_to_keep)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        left: dict[str, Any] = {_CACHE: None if use_cache is False else state}
        out = CausalLMOutputWithPast(loss=loss, logits=logits, **left)
        return out if return_dict is None or return_dict else out.to_tuple()

    def _inputs(self, ids: Tensor | None, mask: Tensor | None, past: int) -> tuple[Tensor, Tensor | None]:
        """Checked ids, 0 where padding is, and the mask."""
        if ids is None or ids.dim() != 2 or ids.is_floating_point() or ids.numel() == 0:
            seen = "missing" if ids is None else f"{ids.dtype} {list(ids.shape)}"
            raise DataError(
                "input_ids", f"are {seen}; want int64, at least 1 row and token", "the tokenizer's input_ids"
            )
        ids, (context, vocab) = ids.long(), (self.config.max_position_embeddings, self.config.vocab_size)
        if past + ids.shape[1] > context:
            what = f"{past} tokens and {ids.shape[1]} more do not fit in the context of {context}"
            raise DataError("input_ids", what, "fewer tokens, or export with a larger max_length")
        if mask is not None:
            if list(mask.shape) != (want := [len(ids), past + ids.shape[1]]):
                what = f"has shape {list(mask.shape)}; want {want}: {past} tokens seen and {ids.shape[1]} new ones"
                raise DataError("attention_mask", what, "one column for each token since the cache was empty, or none")
            mask = mask.to(ids.device)
            ids = ids.masked_fill(mask[:, -ids.shape[1] :] == 0, 0)
        if ids.device.type == "cpu" or ids.shape[1] > 1:  # a generated token is one of the vocabulary
            low, high = (int(x) for x in ids.aminmax())
            if low < 0 or high >= vocab:
                what = f"{low}..{high} are outside the vocabulary of {vocab}"
                raise DataError("input_ids", what, "the tokenizer in run/onnx")
        return ids, mask

    def _whole(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """The student's own graph on whole sequences, each row's real tokens first: none sees what is behind it."""
        capture = self._files.capture
        if mask is None or bool((mask != 0).all()):
            return self.graph(*capture.inputs(ids))
        order = (mask == 0).long().argsort(dim=1, stable=True)
        logits = self.graph(*capture.inputs(ids.gather(1, order)))
        return logits.gather(1, order.argsort(1)[:, :, None].expand_as(logits))

    @torch.no_grad()
    def _continue(self, ids: Tensor, mask: Tensor | None, cache: StudentCache, keep: int | Tensor) -> Tensor:
        """The stateful graph behind what the cache has seen; in pieces where only the last logits are wanted."""
        cache.check(self, len(ids), ids.shape[1])
        mask = full_mask(cache, ids, mask)
        state, past = cache.start(self._stateful, ids), cache.get_seq_length()
        last = keep if isinstance(keep, int) else 0
        size = prefill_size(len(ids) * self.config.vocab_size) if last else ids.shape[1]
        logits = None
        for start in range(0, ids.shape[1], size):
            part = ids[:, start : start + size]
            new, *rest = self._stateful.gm(part, mask[:, : past + start + part.shape[1]], *state)
            state = tuple(rest)
            logits = new if logits is None else torch.cat([logits, new], 1)
            logits = logits[:, -last:]
        cache.states, cache.mask = state, mask
        assert logits is not None
        return logits if last else _keep(logits, keep)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: Any, *args: Any, **more: Any) -> Any:
        """What generate calls for a cache: transformers' own classes cannot hold a student's state."""
        kind = generation_config.cache_implementation
        if model_kwargs.get(_CACHE) is not None or generation_config.use_cache is False:
            prepare: Any = GenerationMixin._prepare_cache_for_generation
            return prepare(self, generation_config, model_kwargs, *args, **more)
        if kind not in (None, "dynamic", "static"):
            raise ConfigError("cache_implementation", f"{kind!r} is not known to a student", "dynamic or static")
        slots = None
        if kind == "static":
            slots = max(generation_config.max_length - 1, getattr(generation_config, "max_cache_len", None) or 0)
        model_kwargs[_CACHE] = self.new_cache(slots)
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StudentForCausalLM:
        """`.to` and its kin: both graphs name devices, and compute in float32."""
        before = self.device
        after = fn(torch.empty(0, device=before))
        if after.dtype != torch.float32:
            raise ConfigError(WHERE, f"{after.dtype} is asked for; a student runs in float32", "a device alone")
        super()._apply(fn, recurse)
        self._stateful.gm._apply(fn)
        if after.device != before:
            for gm in (self.graph, self._stateful.gm):
                move_to(gm, after.device)
        return self


def _keep(logits: Tensor, keep: int | Tensor) -> Tensor:
    return logits[:, keep] if isinstance(keep, Tensor) else logits[:, -keep:]


def _device_of(device_map: Any) -> torch.device | None:
    """The one device of transformers' device_map. Raises ConfigError for a map to several."""
    if device_map is None:
        return None
    one = next(iter(device_map.values())) if isinstance(device_map, dict) and set(device_map) == {""} else device_map
    hint = "cpu or cuda, for the whole model"
    try:
        device = torch.device(one)
    except (RuntimeError, TypeError) as e:
        raise ConfigError("device_map", f"{device_map!r} is no device", hint) from e
    count = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(device.type, 0)
    if (device.index or 0) >= count:
        raise ConfigError("device_map", f"{device} is not here: {count} devices of type {device.type}", hint)
    return device


def _of_run(path: Path) -> tuple[OpenStudent, StudentConfig]:
    with RunFolder.open_existing(path) as run:
        run.require("export")
        program, _ = load_program(run.path / "student.pt2", allow_pickle=False)
        known, _ = read_genai_config(run.path / "onnx" / CONFIG_FILE)
    if not known:
        raise RunFolderError(str(path / "onnx" / CONFIG_FILE), "is missing", "export again")
    student = open_program(program)
    config = StudentConfig(
        vocab_size=student.capture.vocab_size,
        max_position_embeddings=known["context_length"],
        bos_token_id=known.get("bos_token_id"),
        eos_token_id=known.get("eos_token_id"),
    )
    return student, config


def _read_generation_config(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as e:  # strict dataclasses, JSON and files: each with a type of its own
        what = f"its generation configuration is damaged: {' '.join(str(e).split())[:200]}"
        raise RunFolderError(str(folder), what, "save_pretrained writes it") from e


def _read_config(folder: Path) -> StudentConfig:
    """Of config.json only what says something of a student: transformers takes any other value for its own."""
    try:
        known = read_json(read_small(folder / "config.json"))
        kind, sizes = known["model_type"], {n: known[n] for n in ("vocab_size", "max_position_embeddings")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        what = f"its configuration is damaged or missing: {type(e).__name__}: {str(e)[:200]}"
        raise RunFolderError(str(folder), what, "save_pretrained writes it") from e
    words = {n: known.get(n) for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
    wrong = {n: v for n, v in sizes.items() if type(v) is not int or v < 1}
    for name, value in () if wrong else words.items():
        ids = value if name == "eos_token_id" and isinstance(value, list) else [value]
        if value is not None and not all(type(i) is int and 0 <= i < sizes["vocab_size"] for i in ids):
            wrong[name] = value
    if kind != StudentConfig.model_type:
        wrong = {"model_type": kind}
    for name, value in wrong.items():
        what = f"{name} is {str(value)[:100]!r} in its config.json"
        raise RunFolderError(str(folder), what, "the file that save_pretrained wrote")
    return StudentConfig(**sizes, **words)


AutoConfig.register(StudentConfig.model_type, StudentConfig, exist_ok=True)
AutoModelForCausalLM.register(StudentConfig, StudentForCausalLM, exist_ok=True)
