"""Causal language models of transformers from a folder or a GGUF file, with their weights or as shells without any."""

from __future__ import annotations

import copy
import importlib.util
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from tcal_compiler.errors import TeacherError
from tcal_compiler.passes.files import unreadable

from .declared_size import check_folder, gguf_shell
from .gguf_reader import plain_gguf_reader
from .manifest import MANIFEST_NAME
from .tokenizer import quiet_transformers

_GGUF_HINT = "pip install gguf"
_CAUSAL_CLASS = re.compile(r"(ForCausalLM|LMHeadModel)$")
Progress = Callable[[float, float, str], None]  # what is read, what there is, unit of both
_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
MOST_LAYERS = 1024  # of a model; the deepest that are published have some 130


def say(e: BaseException) -> str:
    """An error of another library in one line."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"


def _check_names(folder: Path) -> None:
    """Raises TeacherError for a folder without config.json."""
    if (folder / "config.json").is_file():
        return
    seen = sorted(p.name for p in folder.iterdir())
    hint = "the folder that transformers' save_pretrained wrote"
    if MANIFEST_NAME in seen:
        what = "is a run folder, not a teacher"
        raise TeacherError(str(folder), what, f"the teacher that it was made from, with -o {shlex.quote(str(folder))}")
    if "adapter_config.json" in seen:
        hint = "merge the adapter into its base model (merge_and_unload) and save that"
    elif any(name.endswith((".gguf", ".pt2")) for name in seen):
        hint = f"the file itself: {next(n for n in seen if n.endswith(('.gguf', '.pt2')))}"
    raise TeacherError(str(folder), f"a folder without config.json; seen: {seen[:8]}", hint)


def folder_config(folder: Path) -> Any:
    """The configuration in a folder. Raises TeacherError when there is none, or none of a causal language model."""
    _check_names(folder)
    from transformers import AutoConfig

    if wrong := unreadable(folder):
        raise TeacherError(str(folder), wrong, "the files as they were saved")
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            config._attn_implementation = "eager"  # the file may name one that would be downloaded
    except Exception as e:  # ValueError, OSError, KeyError, JSON errors: whatever the file makes transformers do
        raise TeacherError(str(folder / "config.json"), f"cannot be read: {say(e)}", "no remote code is run") from e
    _check_causal(config, folder)
    _check_sizes(config, folder / "config.json")
    return config


def load_folder(folder: Path, progress: Progress | None = None) -> nn.Module:
    """The model of a folder in float32. progress: is told how many tensors are read. Raises TeacherError."""
    config = folder_config(folder)
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM  # its annotations know nothing of output_loading_info
    options = {"dtype": torch.float32, "output_loading_info": True, "local_files_only": True}
    try:
        with quiet_transformers(), _counting(progress):
            check_folder(config, folder)
            model, report = _with_attention(
                lambda kind: loader.from_pretrained(
                    str(folder), config=config, attn_implementation=kind, trust_remote_code=False, **options
                )
            )
    except TeacherError:
        raise
    except Exception as e:  # safetensors and torch raise their own types for damaged shards
        files = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".bin")}
        raise TeacherError(
            str(folder), f"cannot load the weights: {say(e)}; files and bytes: {files}", "copy it again"
        ) from e
    _check_complete(report, folder)
    return model


@contextmanager
def _counting(progress: Progress | None) -> Iterator[None]:
    """Inside, progress is told how far the loops are that transformers would show a bar for."""
    from transformers.utils import logging as hf_logging

    def bar(make: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return _counted(args[0], progress) if progress and args else make(*args, **options)

    before = hf_logging.set_tqdm_hook(bar)
    try:
        yield
    finally:
        hf_logging.set_tqdm_hook(before)


def _counted(items: Collection[Any], progress: Progress) -> Iterator[Any]:
    for done, item in enumerate(items):
        progress(done, len(items), "tensors")
        yield item


def _counted_bytes(tensors: Collection[Any], progress: Progress) -> Iterator[Any]:
    total, done = sum(int(t.n_bytes) for t in tensors) / 1e6, 0.0
    for tensor in tensors:
        progress(done, total, "MB")
        yield tensor
        done += int(tensor.n_bytes) / 1e6


def _with_attention(make: Any) -> Any:
    """make("sdpa"), or make("eager") for a model that has no other."""
    try:
        return make("sdpa")
    except ValueError as e:
        if "scaled_dot_product_attention" not in str(e):
            raise
        return make("eager")


def load_gguf(path: Path, progress: Progress | None = None) -> nn.Module:
    """The route of transformers' own GGUF support, without its requirement of the accelerate package.

    progress: is told how many megabytes are read. Raises TeacherError.
    """
    from transformers import modeling_gguf_pytorch_utils as gguf_utils

    def bar(tensors: Any, **_: object) -> Iterator[Any]:
        return _counted_bytes(tensors, progress) if progress else iter(tensors)

    try:
        with quiet_transformers():
            config, model_class = _gguf_config(path)
            shell = gguf_shell(config, model_class, path)
            with plain_gguf_reader(), mock.patch.object(gguf_utils, "tqdm", bar, create=True):
                tensors = gguf_utils.load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=shell)[
                    "tensors"
                ]
            model, report = model_class.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=torch.float32,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
    except TeacherError:
        raise
    except Exception as e:  # the readers raise IndexError, ValueError, KeyError, ... for damaged files
        raise _bad_gguf(path, e) from e
    _check_complete(report, path)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are no longer quantised
    return model


def _gguf_config(path: Path) -> tuple[Any, Any]:
    """Configuration and class of the model in a GGUF file."""
    if importlib.util.find_spec("gguf") is None:
        raise TeacherError(str(path), "reading GGUF needs the gguf package", _GGUF_HINT)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    state = path.stat()
    config = copy.deepcopy(_read_gguf_config(path, state.st_mtime_ns, state.st_size))
    _check_causal(config, path)
    _check_sizes(config, path)
    return config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


@lru_cache(maxsize=1)
def _read_gguf_config(path: Path, changed: int, size: int) -> Any:
    """The header names every token: of a large vocabulary it takes seconds, and it is asked for several times."""
    from transformers import AutoConfig

    with plain_gguf_reader():
        return AutoConfig.from_pretrained(
            str(path.parent), gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )


def _bad_gguf(path: Path, e: Exception) -> TeacherError:
    what = f"cannot read this GGUF file of {path.stat().st_size} bytes: {say(e)}"
    return TeacherError(str(path), what, "copy it again")


def shell_of(path: Path, *, layers: int | None = None) -> nn.Module:
    """The model that a folder's config.json or a GGUF file describes: its buffers as they are, its weights without
    memory, all values 0. No weight file is opened, and none needs to be there. layers: only the first ones.

    Raises TeacherError.
    """
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers():
            config, model_class = _config_of(path)
            if model_class is not None:
                gguf_shell(config, model_class, path)
            _keep_layers(config, layers)
            with _on_meta():
                model = _with_attention(
                    lambda kind: AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=kind)
                )
    except TeacherError:
        raise
    except Exception as e:
        if path.is_file():
            raise _bad_gguf(path, e) from e
        raise TeacherError(str(path), f"no model can be made of its configuration: {say(e)}") from e
    _spread_zeros(model)
    return model


def _config_of(path: Path) -> tuple[Any, Any]:
    """The configuration of a folder or a GGUF file, and of a GGUF file the class of its model. Raises TeacherError."""
    if path.is_dir():
        return folder_config(path), None
    try:
        with quiet_transformers():
            return _gguf_config(path)
    except TeacherError:
        raise
    except Exception as e:
        raise _bad_gguf(path, e) from e


def sizes_of(config: Any) -> dict[str, int]:
    """What the shapes of a model's weights follow from, as far as its configuration has it."""
    text = config.get_text_config()
    return {n: v for n in _SIZES if type(v := getattr(text, n, None)) is int}


def sizes_in(path: Path) -> dict[str, int]:
    """`sizes_of` a folder or a GGUF file, of which no weight is read. Raises TeacherError."""
    return sizes_of(_config_of(path)[0])


def _per_layer(config: Any) -> list[str]:
    """Names of the lists in a configuration that have an entry for every layer."""
    return [n for n, v in vars(config).items() if isinstance(v, list) and len(v) == config.num_hidden_layers]


def _keep_layers(config: Any, layers: int | None) -> None:
    text = config.get_text_config()
    if layers is not None:
        for name in _per_layer(text):
            setattr(text, name, getattr(text, name)[:layers])
        text.num_hidden_layers = layers


def repeated_layers(path: Path) -> tuple[int, int]:
    """How many layers a model has, and after how many their kinds repeat, by its configuration; 0, 1: unknown.

    path: as for `shell_of`. Raises TeacherError.
    """
    text = _config_of(path)[0].get_text_config()
    count = getattr(text, "num_hidden_layers", 0)
    if not isinstance(count, int):
        return 0, 1
    lists = [getattr(text, n) for n in _per_layer(text)]
    periods = (p for p in range(1, count + 1) if all(v[i] == v[i % p] for v in lists for i in range(count)))
    return count, next(periods, 1)


@contextmanager
def _on_meta() -> Iterator[None]:
    """Parameters that modules register are on the meta device; buffers, whose values capture reads, are not."""

    def without_memory(module: nn.Module, name: str, p: nn.Parameter | None) -> nn.Parameter | None:
        return None if p is None or p.is_meta else nn.Parameter(p.detach().to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(without_memory)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _spread_zeros(model: nn.Module) -> None:
    """Every parameter becomes one zero that all its elements share: a tensor for the CPU with 4 bytes of memory."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                if id(p) not in made:
                    zero: Tensor = torch.zeros((), dtype=p.dtype).expand(p.shape)
                    made[id(p)] = nn.Parameter(zero, requires_grad=False)
                module._parameters[name] = made[id(p)]


def _check_causal(config: Any, where: Path) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    given = getattr(config, "architectures", None)
    names = [n for n in given if isinstance(n, str)] if isinstance(given, list) else []
    causal_class = any(_CAUSAL_CLASS.search(n) for n in names)
    encoder = getattr(config, "is_decoder", True) is False and not causal_class
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not encoder and not getattr(config, "is_encoder_decoder", False):
        return
    raise TeacherError(
        str(where),
        f"is not a causal language model: model_type {config.model_type!r}, architectures {names}",
        "a decoder-only model, saved with its language-model head",
    )


def _check_sizes(config: Any, where: Path) -> None:
    """Sizes that a model would be built from for hours, or not at all."""
    text = config.get_text_config()
    layers, context = getattr(text, "num_hidden_layers", None), getattr(text, "max_position_embeddings", None)
    if isinstance(layers, int) and not 0 < layers <= MOST_LAYERS:
        raise TeacherError(str(where), f"num_hidden_layers is {layers}", f"a model of 1 to {MOST_LAYERS} layers")
    if isinstance(context, int) and context < 1:
        raise TeacherError(str(where), f"max_position_embeddings is {context}", "the tokens of its context, 1 or more")


def _check_complete(report: Mapping[str, Any], where: Path) -> None:
    """transformers fills weights that are not in the files with random numbers; a teacher must not have any."""
    for problem in ("missing_keys", "mismatched_keys"):
        names = sorted(str(k) for k in report.get(problem) or ())
        if names:
            raise TeacherError(
                str(where),
                f"{len(names)} weights of the model are not in its files ({problem}): {names[:4]}",
                "a complete checkpoint of the whole language model, with its head",
            )
