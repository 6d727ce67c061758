"""Files that survive a kill or a full disk: atomic writes, fsync, a lock, and what a full disk looks like."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from tcal_compiler.errors import RunFolderError, StageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = ("No space left on device", "os error 28", "Disk quota exceeded", "os error 122", "os error 27")
_WRITER_WORDS = ("PytorchStreamWriter failed writing", "unexpected pos")
_ALMOST_FULL = 1 << 22  # bytes
_NAMED = 300  # bytes of a lock's holder


def write_atomic(path: Path, data: bytes) -> None:
    """Replace path by data, as `replace_atomic` does."""

    def write(new: Path) -> None:
        with new.open("xb") as f:
            f.write(data)

    replace_atomic(path, write)


def replace_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Replace path by what `write` puts into a new file beside it: after a kill or an error at any moment path holds
    all of the old bytes or all of the new.

    A link that lies where the temporary file has to be is removed, never written through.

    Raises:
        OSError: the old file is as it was and no temporary file stays.
    """
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """sync every file and folder below and including folder, contents before the folders that name them."""
    for where, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(where) / name)
        sync(Path(where))


def remove_tree(folder: Path) -> None:
    """Delete a folder, or a link to one, if it is there; what cannot be deleted stays."""
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the file system of path or of its nearest existing parent."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def is_disk_full(e: BaseException, path: Path) -> bool:
    """Whether e, or an error that led to it, means a full disk or quota.

    safetensors and torch raise their own types: those are told by their words, and torch's only when path's file
    system has less than 4 MiB left, because torch says no more than that a write failed.
    """
    seen: set[int] = set()
    current: BaseException | None = e
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        text = str(current)
        if isinstance(current, OSError) and current.errno in _FULL:
            return True
        if any(words in text for words in _FULL_WORDS):
            return True
        if any(words in text for words in _WRITER_WORDS) and free_bytes(path) < _ALMOST_FULL:
            return True
        current = current.__cause__ or current.__context__
    return False


def disk_full_error(where: str, path: Path) -> StageError:
    return StageError(
        where,
        f"no space left on the disk of {path}: {free_bytes(path)} bytes free",
        "free space there, or another output folder with -o; the same command goes on from the last complete stage",
    )


class FolderLock:
    """An advisory lock on a file, released by close or by the end of the process.

    Raises:
        RunFolderError: another process holds it, or the file is another name of some other file.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, *, shared: bool) -> None:
        self._fd, self._shared = -1, shared
        flags = os.O_RDONLY if shared else os.O_RDWR | os.O_CREAT
        for _ in range(10):
            fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)  # a pipe would wait
            try:
                fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                if _same_file(fd, path):  # else the holder before us deleted the folder
                    self._fd = fd
                    break
                os.close(fd)
            except BlockingIOError as e:
                pid, _, words = os.pread(fd, _NAMED, 0).decode(errors="replace").strip().partition(" ")
                os.close(fd)  # readers write none
                holder = (f" (pid {pid})" if pid else "") + (f": {words}" if words else "")
                what = f"is in use by another process{holder}"
                raise RunFolderError(str(path.parent), what, "wait for it, or stop it") from e
        else:
            raise RunFolderError(str(path.parent), "is being created and deleted by other processes", "try again")
        if not shared:
            if os.fstat(self._fd).st_nlink > 1:  # a hard link to a file that is not ours to overwrite
                self.close()
                raise RunFolderError(str(path), "is a second name of another file", "another output folder with -o")
            with contextlib.suppress(OSError):  # pid and command only serve the message above
                command = " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
                os.ftruncate(self._fd, 0)
                os.pwrite(self._fd, f"{os.getpid()} {command}".encode(errors="replace")[:_NAMED], 0)

    def close(self) -> None:
        if self._fd >= 0:
            if not self._shared and os.fstat(self._fd).st_nlink == 1:
                with contextlib.suppress(OSError):  # nobody is named who has gone
                    os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = -1


def _same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
