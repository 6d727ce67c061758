"""Is an archive safe to hand to torch.export.load? It trusts all that it finds, and unpickles what it cannot read.

Only entries that torch.export.save writes are let through, and they have to be the same for Python's reader of
archives, which checks them, and for torch's, which loads them: two tables of contents in one file may be read apart.
"""

from __future__ import annotations

import importlib
import io
import re
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import torch

from tcal_compiler.errors import TeacherError
from tcal_compiler.passes.json_text import TABLES, read_json

from .program_strings import unsafe_text

SAVE_AGAIN = "export the model again, with torch.export.save"
TRUST = "export with plain tensors as parameters, buffers and inputs, or --allow-pickle if you trust it"
_ENTRY = re.compile(  # behind the archive's own name
    r"""models/[^/]+\.json | extra/.+ | \.data/[a-z_]+ | \.?[a-z_]+
    | data/(sample_inputs | weights | constants)/[^/]+\.pt
    | data/weights/(weight_\d+ | [^/]+_weights_config\.json)
    | data/constants/(tensor_\d+ | [^/]+_constants_config\.json)""",
    re.VERBOSE,
)
_OLD_PROGRAM = "serialized_exported_program.json"  # until torch 2.7
_OLD_ENTRY = re.compile(rf"{_OLD_PROGRAM}|serialized_(state_dict|constants|example_inputs)\.pt|version|extra_files/.+")
_OBJECTS = re.compile(r"data/constants/(custom|opaque)_obj_\d+")
_TENSOR = re.compile(r"(weight|tensor)_\d+")


def check_archive(path: Path, *, allow_pickle: bool) -> None:
    """Checksums of every entry, no pickle and no text that becomes code. Raises TeacherError."""
    try:
        with zipfile.ZipFile(path) as z:
            _check_sizes(z.infolist(), path)
            bad, names = z.testzip(), z.namelist()
            checked = {n: z.read(n) for n in names if n.endswith((".json", ".pt"))}
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, RuntimeError) as e:
        raise TeacherError(str(path), f"is damaged: {e}", "copy the file again") from e
    if bad is not None:
        raise TeacherError(str(path), f"is damaged: wrong checksum of {bad}", "copy the file again")
    _check_names(names, path, allow_pickle=allow_pickle)
    for name, content in checked.items():
        if b"transformers." in content:
            importlib.import_module("transformers.modeling_outputs")  # registers its output classes as pytrees
        if b"torch.ops.transformers." in content:
            importlib.import_module("transformers.integrations.moe")  # registers the products of its experts
        if name.endswith(".json") and (_inner(name).startswith(("models/", "data/")) or "/" not in name):
            _check_text(name, content, path)
        if pickled := [] if allow_pickle else _pickled_in(name, content):
            raise TeacherError(
                str(path),
                f"{name} holds pickled objects, which can run any code when loaded: {pickled[:3]}",
                TRUST,
            )
    _check_torch_reads_the_same(names, checked, path)


def _check_sizes(entries: list[zipfile.ZipInfo], path: Path) -> None:
    """torch compresses nothing, so entries that are larger than the file are no work of its."""
    packed = [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED]
    total, size = sum(e.file_size for e in entries), path.stat().st_size
    if packed or total > size:
        what = f"{packed[0]} is compressed" if packed else f"its entries have {total} bytes and the file {size}"
        raise TeacherError(str(path), f"is an archive that torch did not write: {what}", SAVE_AGAIN)


def _inner(name: str) -> str:
    return name.partition("/")[2]


def _check_names(names: list[str], path: Path, *, allow_pickle: bool) -> None:
    """torch finds some entries blind to case, takes any below models/ for a program, and runs compiled code."""
    if twice := [n for n, count in Counter(n.lower() for n in names).items() if count > 1]:
        raise TeacherError(str(path), f"holds entries of the same name: {twice[:3]}", SAVE_AGAIN)
    objects = {n for n in names if _OBJECTS.fullmatch(_inner(n))}
    old = _OLD_PROGRAM in names
    known = {n for n in names if (_OLD_ENTRY.fullmatch(n) if old else _ENTRY.fullmatch(_inner(n)))}
    if odd := sorted(set(names) - known - objects):
        raise TeacherError(str(path), f"holds entries that torch.export.save does not write: {odd[:3]}", SAVE_AGAIN)
    if objects and not allow_pickle:
        what = f"holds pickled objects, which can run any code when loaded: {sorted(objects)[:3]}"
        raise TeacherError(str(path), what, TRUST)


def _check_torch_reads_the_same(names: list[str], checked: dict[str, bytes], path: Path) -> None:
    """Of old archives torch's reader can make nothing, and torch too takes Python's."""
    with path.open("rb") as f:
        try:
            reader = torch._C.PyTorchFileReader(f)
            same = sorted(reader.get_all_records()) == sorted(map(_inner, names))
            same = same and all(reader.get_record(_inner(n)) == content for n, content in checked.items())
        except RuntimeError:
            same = _OLD_PROGRAM in names
        else:
            same = same and _OLD_PROGRAM not in names
    if not same:
        raise TeacherError(str(path), "is an archive that torch reads otherwise than it should", SAVE_AGAIN)


def _check_text(name: str, content: bytes, path: Path) -> None:
    try:
        unsafe = unsafe_text(content)
    except (ValueError, RecursionError) as e:
        raise TeacherError(str(path), f"is damaged: {name} cannot be read as JSON: {e}", "copy the file again") from e
    if unsafe:
        what = f"{name} holds text that torch never writes and that could run as code: {unsafe[:3]}"
        raise TeacherError(str(path), what, "export the model again from a source that you trust")


def _pickled_in(name: str, content: bytes) -> list[str]:
    """Names of what only an unsafe load could read."""
    if name.endswith(".pt"):
        try:
            torch.load(io.BytesIO(content), weights_only=True)
        except Exception as e:  # refused by the safe loader, or damaged
            return [" ".join(str(e).split())[:80]]
    if not name.endswith("_config.json"):
        return []
    try:
        entries = read_json(content, times=TABLES)["config"]
        return sorted(k for k, v in entries.items() if v["use_pickle"] or not _TENSOR.fullmatch(v["path_name"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return ["a table that cannot be read"]
