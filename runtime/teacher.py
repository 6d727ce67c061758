"""Teachers: one function that accepts every form a user may have, and says what is wrong with the others."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.export import ExportedProgram

from tcal_compiler import errors
from tcal_compiler.errors import DataError, TeacherError

from .declared_size import check_folder, gguf_shell
from .program_file import EXPORT_HINT, load_program, sniff
from .tokenizer import (
    BYTES,
    ByteTokenizer,
    TokenizerLike,
    check_tokenizer,
    find_tokenizer,
    quiet_transformers,
    read_tokenizer,
)

__all__ = [
    "Teacher",
    "check_tokenizer",
    "find_tokenizer",
    "fingerprint",
    "live_teacher",
    "load_teacher",
    "load_tokenizer",
]

EMBEDDED = "embedded"
TeacherKind = Literal["program", "transformers", "gguf", "factory", "pickle"]
_GGUF_HINT = "pip install 'tcal-compile[gguf]'"
_CAUSAL_CLASS = re.compile(r"(ForCausalLM|LMHeadModel)$")
_CHUNK = 1 << 24  # bytes hashed at a time


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher: exactly one of module (eval mode, float32) and program is set.

    Attributes:
        source: what to give to load_teacher to get it again: an absolute path, "embedded" or module:factory.
        tokenizer_dir: folder with tokenizer files; None when there is none, or when it is bytes or inside the GGUF.
        info: vocab_size, bos_token_id, eos_token_id, context_length (tokens), family, each None where unknown; and
            tokenizer: "dir", "gguf", "bytes" or None.
    """

    source: str
    kind: TeacherKind
    module: nn.Module | None
    program: ExportedProgram | None
    tokenizer_dir: Path | None
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Loaded:
    kind: TeacherKind
    model: nn.Module | ExportedProgram
    info: dict[str, Any]
    tokenizer_dir: Path | None = None  # only where the model itself names it


def load_teacher(spec: str, *, tokenizer: str | None = None, allow_pickle: bool = False) -> Teacher:
    """Load a teacher from an exported program, a transformers folder, a .gguf file, module:factory or "embedded".

    Args:
        spec: path of a file or folder, "embedded" for the one that ships, or module:factory.
        tokenizer: folder with tokenizer files, or "bytes"; None looks beside the model.
        allow_pickle: load a pickled nn.Module, which runs whatever code its author put in; warns.

    Raises:
        TeacherError: missing, truncated, of an unknown format, unsafe, or not a causal language model.
        DataError: the tokenizer that was asked for is missing.
    """
    path = Path(errors.__file__).parent / "assets" / "teacher" if spec == EMBEDDED else Path(os.path.expanduser(spec))
    if spec == EMBEDDED and not path.is_dir():
        raise TeacherError(spec, "this installation lacks the teacher that ships", "install from a full checkout")
    if not spec or not os.path.exists(path):  # unlike Path.exists, False for a name that no file can have
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", spec):
            raise TeacherError(spec or "teacher", "no such file or folder", "a path, module:factory or 'embedded'")
        loaded, source, beside = _load_factory(spec), spec, None
    else:
        path = path.resolve()
        loaded = _load_folder(path) if path.is_dir() else _load_file(path, allow_pickle=allow_pickle)
        source, beside = spec if spec == EMBEDDED else str(path), path
    folder = loaded.tokenizer_dir
    if tokenizer is not None or (folder is None and loaded.kind != "gguf"):
        folder = find_tokenizer(beside, tokenizer)
    kind = BYTES if tokenizer == BYTES else "dir" if folder else "gguf" if loaded.kind == "gguf" else None
    is_program = isinstance(loaded.model, ExportedProgram)
    return Teacher(
        source=source,
        kind=loaded.kind,
        module=None if is_program else loaded.model.eval().float(),  # type: ignore[union-attr]
        program=loaded.model if is_program else None,  # type: ignore[arg-type]
        tokenizer_dir=folder,
        info=_info() | loaded.info | {"tokenizer": kind},
    )


def live_teacher(module: nn.Module, source: str) -> Teacher:
    """A module in memory as a teacher without a tokenizer: as it is, in its own mode and dtype."""
    return Teacher(source, "factory", module, None, None, _info() | _config_info(module) | {"tokenizer": None})


def load_tokenizer(teacher: Teacher) -> TokenizerLike:
    """The teacher's tokenizer, checked against its vocabulary.

    Raises:
        DataError: there is none, it is damaged, or its ids exceed the teacher's vocabulary.
    """
    kind, ids = teacher.info.get("tokenizer"), {k: teacher.info.get(k) for k in ("eos_token_id", "bos_token_id")}
    if kind == BYTES:
        found: TokenizerLike = ByteTokenizer()
    elif kind == "gguf":
        path = Path(teacher.source)
        found = read_tokenizer(path.parent, gguf_file=path.name, **ids)
    elif teacher.tokenizer_dir is not None:
        found = read_tokenizer(teacher.tokenizer_dir, **ids)
    else:
        hint = "--tokenizer FOLDER" + (' or --tokenizer "bytes"' if teacher.info.get("vocab_size") == 256 else "")
        raise DataError(teacher.source, "there is no tokenizer beside the teacher", hint)
    if teacher.info.get("vocab_size") is not None:
        check_tokenizer(found, teacher.info["vocab_size"])
    return found


def fingerprint(state: Mapping[str, torch.Tensor], code: str) -> str:
    """sha256 (hex) of names, dtypes, shapes and raw bytes in the order of the names, then of code.

    Streams: beyond the tensors it holds one contiguous copy of the tensor at hand, and none when that is contiguous.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        t = state[name].detach()
        digest.update(f"{len(name)} {name} {t.dtype} {tuple(t.shape)} ".encode())
        raw = t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        for start in range(0, raw.size, _CHUNK):
            digest.update(raw[start : start + _CHUNK].data)
    digest.update(f"code {len(code)} {code}".encode())
    return digest.hexdigest()


def _info(**known: Any) -> dict[str, Any]:
    names = ("vocab_size", "bos_token_id", "eos_token_id", "context_length", "family")
    return dict.fromkeys(names) | {k: v for k, v in known.items() if k in names}


def _load_file(path: Path, *, allow_pickle: bool) -> _Loaded:
    kind = sniff(path)
    if kind == "program":
        program, facts = load_program(path, allow_pickle=allow_pickle)
        return _Loaded("program", program, _info(vocab_size=facts.vocab_size, context_length=facts.context_length))
    if kind == "gguf":
        return _load_gguf(path)
    if kind == "pickle":
        return _load_pickle(path, allow_pickle=allow_pickle)
    what = {
        "torchscript": ("is a TorchScript archive, which has no graph that can be converted", EXPORT_HINT),
        "compiled": ("is an archive of compiled code without an exported program", EXPORT_HINT),
        "safetensors": ("holds weights without a model", f"the folder that holds its config.json: {path.parent}"),
        "damaged-zip": (
            f"is truncated or damaged: {path.stat().st_size} bytes of a zip without a directory",
            "copy it again",
        ),
        "unknown": (
            f"is of an unknown format (starts with {_head(path)!r})",
            "an exported program (.pt2), a transformers folder, a .gguf file or module:factory",
        ),
    }[kind]
    raise TeacherError(str(path), *what)


def _head(path: Path) -> bytes:
    with path.open("rb") as f:
        return f.read(8)


def _load_folder(folder: Path) -> _Loaded:
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (folder / "config.json").is_file():
        seen = sorted(p.name for p in folder.iterdir())
        hint = "the folder that transformers' save_pretrained wrote"
        if "adapter_config.json" in seen:
            hint = "merge the adapter into its base model (merge_and_unload) and save that"
        elif any(name.endswith((".gguf", ".pt2")) for name in seen):
            hint = f"the file itself: {next(n for n in seen if n.endswith(('.gguf', '.pt2')))}"
        raise TeacherError(str(folder), f"a folder without config.json; seen: {seen[:8]}", hint)
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(str(folder), **local)
    except Exception as e:  # ValueError, OSError, KeyError, JSON errors: whatever the file makes transformers do
        raise TeacherError(str(folder / "config.json"), f"cannot be read: {_say(e)}", "no remote code is run") from e
    _check_causal(config, folder)
    loader: Any = AutoModelForCausalLM  # its annotations know nothing of output_loading_info
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "output_loading_info": True,
        "attn_implementation": "sdpa",
        **local,
    }
    try:
        with quiet_transformers():
            check_folder(config, folder)
            try:
                model, report = loader.from_pretrained(str(folder), **options)
            except ValueError as e:
                if "scaled_dot_product_attention" not in str(e):
                    raise
                options["attn_implementation"] = "eager"
                model, report = loader.from_pretrained(str(folder), **options)
    except TeacherError:
        raise
    except Exception as e:  # safetensors and torch raise their own types for damaged shards
        files = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".bin")}
        raise TeacherError(
            str(folder), f"cannot load the weights: {_say(e)}; files and bytes: {files}", "copy it again"
        ) from e
    _check_complete(report, folder)
    return _Loaded("transformers", model, _config_info(model))


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


def _config_info(model: Any) -> dict[str, Any]:
    """What a transformers model knows about itself; empty for any other module."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return {}
    text = config.get_text_config()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    return _info(
        vocab_size=weight.shape[0] if isinstance(weight, torch.Tensor) else getattr(text, "vocab_size", None),
        bos_token_id=_first(getattr(text, "bos_token_id", None)),
        eos_token_id=_first(getattr(text, "eos_token_id", None)),
        context_length=next((v for n in names if isinstance(v := getattr(text, n, None), int)), None),
        family=getattr(config, "model_type", None),
    )


def _first(value: Any) -> int | None:
    value = value[0] if isinstance(value, list | tuple) and value else value
    return value if isinstance(value, int) else None


def _load_gguf(path: Path) -> _Loaded:
    """The route of transformers' own GGUF support, without its requirement of the accelerate package."""
    if importlib.util.find_spec("gguf") is None:
        raise TeacherError(str(path), "reading GGUF needs the gguf package", _GGUF_HINT)
    from transformers import AutoConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
            _check_causal(config, path)
            model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            shell = gguf_shell(config, model_class, path)
            tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=shell)["tensors"]
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
        size = path.stat().st_size
        raise TeacherError(str(path), f"cannot read this GGUF file of {size} bytes: {_say(e)}", "copy it again") from e
    _check_complete(report, path)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are no longer quantised
    return _Loaded("gguf", model, _config_info(model))


@contextlib.contextmanager
def _working_directory_first() -> Iterator[None]:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)


def _load_factory(spec: str) -> _Loaded:
    module_name, _, path = spec.partition(":")
    with _working_directory_first():
        try:
            made: Any = importlib.import_module(module_name)
            for part in path.split("."):
                made = getattr(made, part)
            made = made()
        except Exception as e:  # the user's own code may raise anything
            hint = "a module that can be imported from the working directory, and a function in it without arguments"
            raise TeacherError(spec, f"the factory failed: {_say(e)}", hint) from e
    model, folder = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise TeacherError(
            spec, f"returned {type(model).__name__}, not a torch.nn.Module", "a function that builds the model"
        )
    where = None if folder is None else find_tokenizer(None, str(folder))
    return _Loaded("factory", model, _config_info(model), where)


def _load_pickle(path: Path, *, allow_pickle: bool) -> _Loaded:
    try:
        weights = torch.load(path, map_location="meta", weights_only=True)
    except Exception:  # not plain weights, as expected of a pickled module; damage shows below
        weights = None
    if isinstance(weights, Mapping):
        keys = [str(k) for k in weights][:3]
        raise TeacherError(
            str(path),
            f"holds weights (a dictionary of {len(weights)} entries: {keys}), not a model",
            "module:factory, a function that builds the model and calls load_state_dict",
        )
    if not allow_pickle:
        raise TeacherError(str(path), "is a pickle, which can run any code when loaded; it was not loaded", EXPORT_HINT)
    warnings.warn(f"{path}: loading a pickle runs code from the file", stacklevel=3)
    try:
        with _working_directory_first():
            model = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as e:
        raise TeacherError(str(path), f"cannot be unpickled: {_say(e)}", EXPORT_HINT) from e
    if not isinstance(model, nn.Module):
        raise TeacherError(str(path), f"holds a {type(model).__name__}, not a torch.nn.Module", EXPORT_HINT)
    return _Loaded("pickle", model, _config_info(model))


def _say(e: BaseException) -> str:
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
