"""A file of tensors and a note that knows its own sha256: replaced atomically, damage found when it is read."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tcal_compiler.errors import RunFolderError

from .durable import replace_atomic
from .teacher import fingerprint

_NOTE, _HASH = "tcal", "sha256"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes contiguous tensors on the CPU, of which none shares memory, without a copy of them. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), str(path), metadata=metadata)
    except SafetensorError as e:  # of what the system said it keeps the words
        raise OSError(errno.EIO, str(e)) from e
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors keeps it to its owner, unlike the other files


def save_hashed(path: Path, tensors: Mapping[str, Tensor], note: str) -> None:
    """Writes tensors and note, with the sha256 of both. Raises OSError; the old file is then as it was."""
    plain = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    metadata = {_NOTE: note, _HASH: fingerprint(plain, note)}
    replace_atomic(path, lambda new: save_tensors(new, plain, metadata))


def load_hashed(path: Path, *, hint: str) -> tuple[dict[str, Tensor], str]:
    """Tensors and note of a file that save_hashed wrote; nothing in it is run.

    Raises RunFolderError, with the hint, when it is no such file or its sha256 is not the one that it holds.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as f:
            note, sha = f.metadata()[_NOTE], f.metadata()[_HASH]
            tensors = {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118
        if fingerprint(tensors, note) != sha:
            raise ValueError("another sha256 than when it was written")
    except (OSError, MemoryError, SafetensorError, KeyError, TypeError, ValueError) as e:
        raise RunFolderError(str(path), f"cannot be read: {e}", hint) from e
    return tensors, note
