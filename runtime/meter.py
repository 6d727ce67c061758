"""Time and memory of a piece of work in this process."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import psutil

INTERVAL = 0.005  # seconds between looks at the memory


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

    A thread looks at the memory every INTERVAL seconds, so that a shorter peak may be missed.
    """

    time: Time
    peak: int

    def __enter__(self) -> Meter:
        self._process, self._stop = psutil.Process(), threading.Event()
        self.peak = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        self._start = Time.now()
        return self

    def __exit__(self, *error: object) -> None:
        self.time = Time.now() - self._start
        self._stop.set()
        self._thread.join()
        self._look()

    def _look(self) -> None:
        self.peak = max(self.peak, self._process.memory_info().rss)

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._look()
