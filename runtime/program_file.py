"""Files on disk: which kind of model file is this, and is it a program that torch.export saved?"""

from __future__ import annotations

import importlib
import io
import logging
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch.export import ExportedProgram

from tcal_compiler.errors import TeacherError
from tcal_compiler.passes.capture import logits_of

from .program_archive import check_archive

FileKind = Literal["program", "torchscript", "compiled", "pickle", "gguf", "safetensors", "damaged-zip", "unknown"]

EXPORT_HINT = """export the model where its class can be imported:
    import torch
    from torch.export import Dim, export, save
    ids = torch.zeros(2, 8, dtype=torch.int64)
    dims = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}  # any batch, any length
    program = export(model.float().eval(), (ids,), dynamic_shapes=(dims,), strict=False)
    save(program, "teacher.pt2")"""

_OP_MODULES = ("tcal_compiler.kernels.gated_delta_rule", "tcal_compiler.kernels.gated_rms_norm")


_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ProgramFacts:
    """What the border of a program says. context_length is None when the length has no upper bound."""

    vocab_size: int
    context_length: int | None
    has_positions: bool


def sniff(path: Path) -> FileKind:
    """The kind of a model file, from its content and never from its name. Reads only the head and the zip directory.

    Raises:
        TeacherError: the file cannot be read or is empty.
    """
    if path.exists() and not path.is_file():
        raise TeacherError(str(path), "is no plain file", "a file of a model, or its folder")
    try:
        with path.open("rb") as f:
            head = f.read(64)
    except OSError as e:
        raise TeacherError(str(path), f"cannot be read: {e.strerror or e}") from e
    if not head:
        raise TeacherError(str(path), "is empty (0 bytes)", "copy or download the file again")
    if head.startswith(b"GGUF"):
        return "gguf"
    if head.startswith(b"PK\x03\x04"):
        return _sniff_zip(path)
    if head[0] == 0x80 and len(head) > 1 and head[1] in range(2, 6):
        return "pickle"  # torch.save before 1.6, or the pickle module
    if len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40:
        return "safetensors"
    return "unknown"


def _sniff_zip(path: Path) -> FileKind:
    try:
        with zipfile.ZipFile(path) as z:
            names = z.namelist()
            start = min((i.header_offset for i in z.infolist()), default=0)
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError):
        return "damaged-zip"
    if start > 0:
        return "damaged-zip"  # cut off just behind an archive inside the archive, whose directory was found instead
    inner = {name.partition("/")[2] for name in names}
    if "serialized_exported_program.json" in names:
        return "program"  # torch <= 2.7
    if "archive_format" in inner:
        is_program = any(n.startswith("models/") and n.endswith(".json") for n in inner)
        return "program" if is_program else "compiled"
    if "constants.pkl" in inner:
        return "torchscript"
    return "pickle" if "data.pkl" in inner else "unknown"


class _Sink(io.RawIOBase):
    """A file for torch's archive writer, whose destructor aborts the process when a write to a full disk has failed.

    It is told that every write went well; the first error is kept and later bytes are dropped.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.error = file, None  # type: BinaryIO, OSError | None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as e:
                self.error = e
        return len(data)

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return offset  # torch goes back to the start when all is written


def save_program(program: ExportedProgram, path: Path) -> None:
    """torch.export.save that raises OSError when the disk is full.

    Equal programs become equal bytes: what tells memory addresses and paths of this machine is dropped.
    """
    for node in program.graph.nodes:
        for key in ("from_node", "stack_trace"):
            node.meta.pop(key, None)
    with path.open("wb") as f:
        sink = _Sink(f)
        torch.export.save(program, sink)  # type: ignore[arg-type]
        if sink.error is not None:
            raise sink.error


def load_program(path: Path, *, allow_pickle: bool) -> tuple[ExportedProgram, ProgramFacts]:
    """Load an exported program and check its border: int64 [B, T] in, float [B, T, V] out, B and T dynamic.

    Args:
        allow_pickle: accept weights that were stored as pickles (tensor subclasses): loading them can run any code.

    Raises:
        TeacherError: damaged, saved by a torch this one cannot read, or with another border.
    """
    check_archive(path, allow_pickle=allow_pickle)
    for name in _OP_MODULES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as e:
            if e.name is None or not name.startswith(e.name):
                raise
    try:
        with _quiet_export(), path.open("rb") as f:
            program = torch.export.load(f)
    except Exception as e:
        raise TeacherError(
            str(path),
            f"torch {torch.__version__} cannot load this exported program: {type(e).__name__}: {_reason(e)}",
            "export it again with this version of torch, and import the modules that define its custom operators",
        ) from e
    return program, check_program(program, str(path))


@contextmanager
def _quiet_export() -> Iterator[None]:
    """torch.export logs a stack trace before it raises: the raised error is enough."""
    loggers = [logging.getLogger(n) for n in ("torch.export", "torch.export.pt2_archive._package")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


def _reason(e: BaseException) -> str:
    """The innermost message: torch.export hides it behind 'error when deserializing'."""
    while (inner := e.__cause__ or e.__context__) is not None and "deserializing" in str(e):
        e = inner
    return " ".join(str(e).split())[:300]


def check_program(program: ExportedProgram, where: str) -> ProgramFacts:
    """Read vocabulary and length bound off a program's border.

    Raises:
        TeacherError: inputs, outputs, dynamic dimensions or weight dtypes are not what a teacher needs.
    """
    signature = program.graph_signature
    vals = {n.name: n.meta.get("val") for n in program.graph.nodes}
    names = [n for n in signature.user_inputs if isinstance(n, str) and isinstance(vals.get(n), torch.Tensor)]
    inputs = [(n, vals[n]) for n in names]
    seen = ", ".join(f"{n} {_describe(v)}" for n, v in inputs) or "no tensor"
    if not inputs or len(inputs) > 2 or any(v.dtype != torch.int64 or v.dim() != 2 for _, v in inputs):
        raise TeacherError(where, f"its inputs are {seen}; expected input_ids int64 [B, T]", EXPORT_HINT)
    if len(inputs) == 2 and ("pos" not in names[1] or _dims(inputs[0][1]) != _dims(inputs[1][1])):
        raise TeacherError(where, f"its inputs are {seen}; a second input must be position_ids [B, T]", EXPORT_HINT)
    batch, length = inputs[0][1].shape
    fixed = [f"{n} is fixed at {d}" for n, d in (("batch", batch), ("length", length)) if isinstance(d, int)]
    if not fixed and str(batch) == str(length):
        fixed = ["batch and length are one and the same dimension"]
    if fixed:
        raise TeacherError(where, f"{' and '.join(fixed)} ({seen}); both must be dynamic", EXPORT_HINT)
    out = vals.get(logits_of(torch.utils._pytree.tree_unflatten(signature.user_outputs, program.call_spec.out_spec)))
    if (
        not isinstance(out, torch.Tensor)
        or out.dim() != 3
        or not out.is_floating_point()
        or _dims(out)[:2] != _dims(inputs[0][1])
    ):
        raise TeacherError(
            where,
            f"its first output is {_describe(out)}; expected logits float [B, T, V]",
            EXPORT_HINT,
        )
    if not isinstance(out.shape[2], int):
        raise TeacherError(where, f"its vocabulary size is not fixed: output {_describe(out)}", EXPORT_HINT)
    floats = {k: v.dtype for k, v in program.state_dict.items() if v.dtype in (torch.float64, *_HALF)}
    if other := sorted(k for k, dtype in floats.items() if dtype == torch.float64 or k in signature.parameters):
        what = f"{len(other)} weights are {str(floats[other[0]]).removeprefix('torch.')}, such as {other[0]}"
        raise TeacherError(where, what, "model.float() before export")
    return ProgramFacts(out.shape[2], upper_bound(program, length), len(inputs) == 2)


def _dims(t: torch.Tensor) -> list[str]:
    return [str(d) for d in t.shape]


def _describe(t: Any) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} [{', '.join(_dims(t))}]" if isinstance(t, torch.Tensor) else str(t)


def upper_bound(program: ExportedProgram, dim: Any) -> int | None:
    bounds = {str(symbol): str(r.upper) for symbol, r in program.range_constraints.items()}
    upper = bounds.get(str(dim), "")
    return int(upper) if upper.isdigit() and int(upper) < 1 << 40 else None
