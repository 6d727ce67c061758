"""Small files are read whole; one that is far larger than its kind ever is, or that may never end, is refused."""

from __future__ import annotations

import errno
import os
import re
import tomllib
from pathlib import Path
from typing import Any

from .json_text import FLOOR, TABLES, too_much

_MOST = 64 << 20  # bytes; a manifest of a thousand layers has about one
_TOML_KEY, _TOML_BYTE = 1200, 64  # bytes of memory that reading takes for a part of a key, and for a byte of text
_PART = rb"""(?:[\w-]++|"[^"\n]*"|'[^'\n]*')"""
_LONG_KEY = re.compile(rb"(?<![\w-])" + _PART + rb"(?:[ \t]*\.[ \t]*" + _PART + rb"){64}")  # takes its length squared
_MOST_OF_A_MODEL = 512 << 20  # bytes of a model's text files; the largest tokenizers have some 35 MB
_TEXT, _WEIGHTS = (".json", ".jinja", ".txt", ".model"), (".safetensors", ".bin")
_NAMES = (  # that transformers looks for; other files beside them are the user's own
    *("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "spiece", "sentencepiece", "chat_template"),
    *("config", "generation_config", "adapter_", "processor_config", "preprocessor_config", "model", "pytorch_model"),
)
_TABLES = ("tokenizer.json", "vocab.json", ".index.json")  # of all words, or of all weights


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
    """A configuration or plan. Raises OSError as `read_small` does, and ValueError for what is no TOML, is nested too
    deeply, has a key of more than 64 parts or could take more than 32 MiB.
    """
    text = read_small(path)
    needed = _TOML_KEY * sum(map(text.count, (b".", b"\n", b"{", b"="))) + _TOML_BYTE * len(text)
    if needed > FLOOR:
        raise ValueError(f"reading its {len(text)} bytes could take {needed} bytes of memory, more than {FLOOR}")
    if long := _LONG_KEY.search(text):
        raise ValueError(f"the key {long[0][:20].decode(errors='replace')}... has more than 64 parts")
    try:
        return tomllib.loads(text.decode())
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e


def unreadable(folder: Path) -> str:
    """What in a folder of a model or tokenizer must not be opened: pipes, devices, text without end, JSON that becomes
    far more; "" for nothing.
    """
    try:
        for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
            known = path.name.startswith(_NAMES) or path.parent != folder
            if not known or path.suffix not in (*_TEXT, *_WEIGHTS) or path.is_dir() or not path.exists():
                continue
            if not path.is_file():
                return f"{path.name} is no plain file"
            if path.suffix in _TEXT and path.stat().st_size > _MOST_OF_A_MODEL:
                return f"{path.name} has {path.stat().st_size} bytes, far more than such a file has"
            large = TABLES if path.name.endswith(_TABLES) else 2
            if path.suffix == ".json" and (wrong := too_much(path.read_bytes(), times=large)):
                return f"{path.name}: {wrong}"
    except OSError as e:
        return f"cannot be read: {e.strerror or e}"
    return ""
