"""Teachers: one function that accepts every form a user may have, and says what is wrong with the others."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
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

from .checkpoints import Progress, load_folder, load_gguf, say, shell_of, sizes_in, sizes_of
from .program_file import EXPORT_HINT, load_program, sniff
from .tokenizer import (
    BYTES,
    ByteTokenizer,
    TokenizerLike,
    check_tokenizer,
    find_tokenizer,
    read_tokenizer,
)

__all__ = [
    "Teacher",
    "check_tokenizer",
    "declared_sizes",
    "find_tokenizer",
    "fingerprint",
    "live_teacher",
    "load_teacher",
    "load_tokenizer",
]

EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(errors.__file__).parent / "assets" / "teacher"
TeacherKind = Literal["program", "transformers", "gguf", "factory", "pickle"]
_CHUNK = 1 << 24  # bytes hashed at a time


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher: exactly one of module (eval mode, float32) and program is set.

    Attributes:
        source: what to give to load_teacher to get it again: an absolute path, "embedded" or module:factory.
        tokenizer_dir: folder with tokenizer files; None when there is none, or when it is bytes or inside the GGUF.
        info: vocab_size, bos_token_id, eos_token_id, context_length (tokens), family, sizes (`declared_sizes`), each
            None where unknown; and tokenizer: "dir", "gguf", "bytes" or None.
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


def load_teacher(
    spec: str, *, tokenizer: str | None = None, allow_pickle: bool = False, progress: Progress | None = None
) -> Teacher:
    """Load a teacher from an exported program, a transformers folder, a .gguf file, module:factory or "embedded".

    Args:
        spec: path of a file or folder, "embedded" for the one that ships, or module:factory.
        tokenizer: folder with tokenizer files, or "bytes"; None looks beside the model.
        allow_pickle: load a pickled nn.Module, which runs whatever code its author put in; warns.
        progress: is called with what is read of a folder or a .gguf file, what there is, and the unit of both.

    Raises:
        TeacherError: missing, truncated, of an unknown format, unsafe, or not a causal language model.
        DataError: the tokenizer that was asked for is missing.
    """
    path = EMBEDDED_FOLDER if spec == EMBEDDED else Path(os.path.expanduser(spec))
    if spec == EMBEDDED and not path.is_dir():
        raise TeacherError(spec, "this installation lacks the teacher that ships", "install from a full checkout")
    if not spec or not os.path.exists(path):  # unlike Path.exists, False for a name that no file can have
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", spec):
            raise TeacherError(spec or "teacher", "no such file or folder", "a path, module:factory or 'embedded'")
        loaded, source, beside = _load_factory(spec), spec, None
    else:
        path = path.resolve()
        loaded = _load_path(path, allow_pickle=allow_pickle, progress=progress)
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


def configured_path(spec: str) -> Path:
    """The folder or file of a teacher that a shell can be made of. Raises TeacherError for any other form."""
    path = (EMBEDDED_FOLDER if spec == EMBEDDED else Path(os.path.expanduser(spec))).resolve()
    if not path.is_dir() and not (path.is_file() and sniff(path) == "gguf"):
        what = "has no configuration that a model can be made of without its weights"
        hint = "a transformers folder with config.json, or a .gguf file; for others tcal-compile --dry-run measures"
        raise TeacherError(spec, what, hint)
    return path


def declared_sizes(spec: str) -> dict[str, int]:
    """What a teacher's configuration says of the shapes of its weights; empty for a form that has none.

    Raises TeacherError for a configuration that is damaged, or of another kind of model.
    """
    try:
        path = configured_path(spec)
    except TeacherError:
        return {}
    return sizes_in(path)


def shell_teacher(spec: str, *, layers: int | None = None) -> Teacher:
    """The teacher of a transformers folder or a .gguf file as a shell without weights, from its configuration alone.

    layers: how many of its layers it has; default: all.

    Raises TeacherError, also for any other form of teacher.
    """
    path = configured_path(spec)
    kind: TeacherKind = "transformers" if path.is_dir() else "gguf"
    model = shell_of(path, layers=layers)
    return Teacher(str(path), kind, model.eval(), None, None, _info() | _config_info(model) | {"tokenizer": None})


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
    names = ("vocab_size", "bos_token_id", "eos_token_id", "context_length", "family", "sizes")
    return dict.fromkeys(names) | {k: v for k, v in known.items() if k in names}


def _load_path(path: Path, *, allow_pickle: bool, progress: Progress | None) -> _Loaded:
    if path.is_dir():
        return _transformers("transformers", load_folder(path, progress))
    kind = sniff(path)
    if kind == "program":
        program, facts = load_program(path, allow_pickle=allow_pickle)
        return _Loaded("program", program, _info(vocab_size=facts.vocab_size, context_length=facts.context_length))
    if kind == "gguf":
        return _transformers("gguf", load_gguf(path, progress))
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


def _transformers(kind: TeacherKind, model: nn.Module) -> _Loaded:
    return _Loaded(kind, model, _config_info(model))


def _head(path: Path) -> bytes:
    with path.open("rb") as f:
        return f.read(8)


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
        sizes=sizes_of(config),
    )


def _first(value: Any) -> int | None:
    value = value[0] if isinstance(value, list | tuple) and value else value
    return value if isinstance(value, int) else None


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
        except (Exception, SystemExit) as e:  # the user's own code may raise anything
            hint = "a module that can be imported from the working directory, and a function in it without arguments"
            raise TeacherError(spec, f"the factory failed: {say(e)}", hint) from e
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
    except (Exception, SystemExit) as e:
        raise TeacherError(str(path), f"cannot be unpickled: {say(e)}", EXPORT_HINT) from e
    if not isinstance(model, nn.Module):
        raise TeacherError(str(path), f"holds a {type(model).__name__}, not a torch.nn.Module", EXPORT_HINT)
    return _Loaded("pickle", model, _config_info(model))
