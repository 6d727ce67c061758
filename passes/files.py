"""Small files are read whole; one that is far larger than its kind ever is, is refused before it is read."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_MOST = 64 << 20  # bytes; a manifest of a thousand layers has about one


def read_small(path: Path) -> bytes:
    """The bytes of a configuration, plan or manifest.

    Raises OSError when it cannot be read or holds more than 64 MiB.
    """
    with path.open("rb") as f:
        size = os.fstat(f.fileno()).st_size
        if size > _MOST:
            raise OSError(errno.EFBIG, f"{size} bytes, far more than such a file has", str(path))
        return f.read()
