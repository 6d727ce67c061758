"""What the fuzzer watches while an input is read: audit events that must not happen, and resident memory."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

FLOOR = 32 << 20  # bytes that reading any input may add
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# Of each event, the arguments that name what is changed, with the argument that holds the folder they are relative to.
CHANGES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
}
FOLLOWING: dict[str, tuple[tuple[int, int | None], ...]] = {  # changes of what a link points to
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.utime": ((0, 3),),
}
FORBIDDEN = {f"socket.{n}" for n in ("connect", "getaddrinfo", "gethostbyname", "sendto", "bind")}
FORBIDDEN |= {"os.system", "os.exec", "os.fork", "os.forkpty", "os.spawn", "os.posix_spawn", "subprocess.Popen"}


class Watch:
    """Audit hook that notes what must not happen while an input is read. Hooks stay for the life of the process."""

    def __init__(self, allowed: Path) -> None:
        self.allowed, self.active, self.seen = os.path.realpath(allowed), False, ""
        sys.addaudithook(self)

    def _outside(self, path: Any, folder: Any = None, *, follow: bool) -> bool:
        """Whether a path, relative to an open folder where one is given, lies outside what may be written."""
        if isinstance(path, int):  # an open file; its opening was seen
            return False
        base = os.readlink(f"/proc/self/fd/{folder}") if isinstance(folder, int) and folder >= 0 else ""
        full = os.path.join(base, os.fsdecode(path))
        head, name = os.path.split(full.rstrip("/"))
        real = os.path.realpath(full) if follow else os.path.join(os.path.realpath(head), name)
        return not (real + os.sep).startswith(self.allowed + os.sep) and real != os.devnull

    def _bad(self, event: str, args: tuple[Any, ...]) -> bool:
        if event == "open":
            return isinstance(args[2], int) and bool(args[2] & WRITES) and self._outside(args[0], follow=True)
        if event == "pickle.find_class":
            return not str(args[0]).startswith(("torch", "collections"))
        places = [(p, False) for p in CHANGES.get(event, ())] + [(p, True) for p in FOLLOWING.get(event, ())]
        return event in FORBIDDEN or any(
            self._outside(args[path], None if folder is None else args[folder], follow=follow)
            for (path, folder), follow in places
        )

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        self.active = False
        try:
            if self._bad(event, args):
                self.seen = f"{event} {args[:2]}"
        finally:
            self.active = True


class Memory:
    """Resident memory that reading one input adds: the peak while it is read, less what was resident before."""

    def __init__(self) -> None:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier inputs left free must not hide what this one takes
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
        self.before = self._bytes("VmRSS")

    def added(self) -> int:
        return max(0, self._bytes("VmHWM") - self.before)

    @staticmethod
    def _bytes(name: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) << 10
        raise RuntimeError(f"the kernel does not tell {name}")
