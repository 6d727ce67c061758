"""Time and memory of a piece of work in this process."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import psutil
import torch

INTERVAL = 0.005  # seconds between looks at the memory where there is no high-water mark
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Time:
    """Wall-clock and CPU seconds; CPU seconds are those of all threads of this process."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @classmethod
    def now(cls) -> Time:
        return cls(time.monotonic(), time.process_time())

    def __add__(self, other: Time) -> Time:
        return Time(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)

    def __sub__(self, other: Time) -> Time:
        return Time(self.seconds - other.seconds, self.cpu_seconds - other.cpu_seconds)

    def __mul__(self, count: float) -> Time:
        return Time(self.seconds * count, self.cpu_seconds * count)

    def at_least(self, other: Time) -> Time:
        return Time(max(self.seconds, other.seconds), max(self.cpu_seconds, other.cpu_seconds))


class Meter:
    """`with Meter() as m:`, then m.time and m.peak, the largest resident memory of the process in bytes meanwhile.

    On Linux that is the kernel's high-water mark, set back whenever a meter begins or ends: nothing is missed, and no
    thread takes turns with those that are timed. Where the mark cannot be set back, a thread looks at the memory every
    INTERVAL seconds, so that a shorter peak may be missed. A meter may be begun within another.
    """

    time: Time
    peak: int
    _watcher: threading.Thread | None
    _open: ClassVar[list[Meter]] = []

    def __enter__(self) -> Meter:
        self._stop, self._watcher = threading.Event(), None
        watched = not _look(self._open)
        self.peak = psutil.Process().memory_info().rss
        self._open.append(self)
        if watched:
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        self._start = Time.now()
        return self

    def __exit__(self, *error: object) -> None:
        self.time = Time.now() - self._start
        if self._watcher is not None:
            self._stop.set()
            self._watcher.join()
        _look(self._open)
        self._open.remove(self)

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self.peak = max(self.peak, psutil.Process().memory_info().rss)


class Peak:
    """`with Peak(device) as p:`, then p.bytes: on CUDA the most that tensors took on the device, else as Meter's."""

    bytes: int

    def __init__(self, device: torch.device) -> None:
        self.device, self._meter = device, Meter()

    def __enter__(self) -> Peak:
        self._meter.__enter__()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, *error: object) -> None:
        self._meter.__exit__(*error)
        cuda = self.device.type == "cuda"
        self.bytes = torch.cuda.max_memory_allocated(self.device) if cuda else self._meter.peak


def _look(meters: list[Meter]) -> bool:
    """Gives the peak since the last look to the meters. False: only the memory of now is known."""
    peak, known = psutil.Process().memory_info().rss, True
    try:
        status = STATUS.read_text()
        RESET.write_text("5")  # man 5 proc: sets the mark back to what is resident now
        peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        known = False
    for m in meters:
        m.peak = max(m.peak, peak)
    return known
