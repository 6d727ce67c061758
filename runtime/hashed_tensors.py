"""A file of tensors and a note that knows its own sha256: replaced atomically, damage found when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tcal_compiler.errors import RunFolderError

from .durable import write_atomic
from .teacher import fingerprint

_NOTE, _HASH = "tcal", "sha256"


def save_hashed(path: Path, tensors: Mapping[str, Tensor], note: str) -> None:
    """Writes tensors and note, with the sha256 of both. Raises OSError; the old file is then as it was."""
    from safetensors.torch import save

    plain = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    write_atomic(path, save(plain, metadata={_NOTE: note, _HASH: fingerprint(plain, note)}))


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
