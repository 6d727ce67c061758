"""Small files are read whole; one that is far larger than its kind ever is, or that may never end, is refused."""

from __future__ import annotations

import errno
import os
import re
import tomllib
from pathlib import Path
from typing import Any

_MOST = 64 << 20  # bytes; a manifest of a thousand layers has about one
_MOST_TOML = 1 << 20  # bytes; reading it takes a hundred times that
_PART = rb"""(?:[\w-]++|"[^"\n]*"|'[^'\n]*')"""
_LONG_KEY = re.compile(rb"(?<![\w-])" + _PART + rb"(?:[ \t]*\.[ \t]*" + _PART + rb"){64}")  # takes its length squared
_MOST_OF_A_MODEL = 512 << 20  # bytes of a model's text files; the largest tokenizers have some 35 MB
_TEXT, _WEIGHTS = (".json", ".jinja", ".txt", ".model"), (".safetensors", ".bin")
_NAMES = (  # that transformers looks for; other files beside them are the user's own
    *("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "spiece", "sentencepiece", "chat_template"),
    *("config", "generation_config", "adapter_", "processor_config", "preprocessor_config", "model", "pytorch_model"),
)


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


def read_toml(path: Path) -> dict[str, Any]:
    """A configuration or plan. Raises OSError as `read_small` does, beyond 1 MiB too, and ValueError for what is no
    TOML, is nested too deeply or has a key of more than 64 parts.
    """
    text = read_small(path)
    if len(text) > _MOST_TOML:
        raise OSError(errno.EFBIG, f"{len(text)} bytes, far more than such a file has", str(path))
    if long := _LONG_KEY.search(text):
        raise ValueError(f"the key {long[0][:20].decode(errors='replace')}... has more than 64 parts")
    try:
        return tomllib.loads(text.decode())
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e


def unreadable(folder: Path) -> str:
    """What in a folder of a model or tokenizer must not be opened: pipes, devices, text without end; "" for nothing."""
    try:
        for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
            known = path.name.startswith(_NAMES) or path.parent != folder
            if not known or path.suffix not in (*_TEXT, *_WEIGHTS) or path.is_dir() or not path.exists():
                continue
            if not path.is_file():
                return f"{path.name} is no plain file"
            if path.suffix in _TEXT and path.stat().st_size > _MOST_OF_A_MODEL:
                return f"{path.name} has {path.stat().st_size} bytes, far more than such a file has"
    except OSError as e:
        return f"cannot be read: {e.strerror or e}"
    return ""
