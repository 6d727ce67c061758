"""Checks of what a user names, before anything is opened."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from .errors import ConfigError


def check_names(texts: str | list[str] | None, **named: str | Path | None) -> None:
    """Raises ConfigError for a name that no file can have here, or that cannot be recorded."""
    listed = [texts] if isinstance(texts, str) else texts or []
    for where, name in [*named.items(), *(("calib.text", t) for t in listed)]:
        text = str(name or "")
        try:
            text.encode()
            os.stat(text)
        except (UnicodeEncodeError, ValueError) as e:
            raise ConfigError(where, f"{text!a} is no file name: {e}", "a name in UTF-8") from e
        except OSError as e:
            if e.errno in (errno.ENAMETOOLONG, errno.ELOOP):
                what = f"{text[:60]!r}, of {len(text)} characters: {e.strerror}"
                raise ConfigError(where, what, "another path") from e
