"""Small files are read whole; one that is far larger than its kind ever is, or that may never end, is refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_MOST = 64 << 20  # bytes; a manifest of a thousand layers has about one
_MOST_OF_A_MODEL = 512 << 20  # bytes of a model's text files; the largest tokenizers have some 35 MB
_TEXT, _WEIGHTS = (".json", ".jinja", ".txt", ".model"), (".safetensors", ".bin")


def read_small(path: Path) -> bytes:
    """The bytes of a configuration, plan or manifest.

    Raises OSError when it cannot be read, is no plain file or holds more than 64 MiB.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "no plain file", str(path))
    with path.open("rb") as f:
        size = os.fstat(f.fileno()).st_size
        if size > _MOST:
            raise OSError(errno.EFBIG, f"{size} bytes, far more than such a file has", str(path))
        return f.read()


def unreadable(folder: Path) -> str:
    """What in a folder of a model or tokenizer must not be opened: pipes, devices, text without end; "" for nothing."""
    try:
        paths = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    except OSError as e:
        return f"cannot be read: {e.strerror or e}"
    for path in paths:
        if path.suffix not in (*_TEXT, *_WEIGHTS) or path.is_dir() or not path.exists():
            continue
        if not path.is_file():
            return f"{path.name} is no plain file"
        if path.suffix in _TEXT and path.stat().st_size > _MOST_OF_A_MODEL:
            return f"{path.name} has {path.stat().st_size} bytes, far more than such a file has"
    return ""
