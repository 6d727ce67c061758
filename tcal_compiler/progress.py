"""Progress of stages on stderr: a line that renews itself on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import re
import sys
import threading
import time
from collections.abc import Callable

TICK, FIRST, PLAIN = 1.0, 2.0, 30.0  # seconds: between looks, before the first time on a terminal, between plain lines
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """text with control characters spelt out: names in a file from elsewhere must not steer the terminal."""
    return _CONTROL.sub(lambda m: f"\\x{ord(m[0]):02x}", text)


class Progress:
    """Shows what a stage does, how far it is and the time left. quiet: shows nothing. verbose: a line for every step.

    Verbose lines begin with the time since the first. Plain output prints a line at most every ten seconds, so that
    logs stay short. In a `with` block, work whose length is not known (`begin`) shows how long it has taken: every
    second on a terminal, every half minute elsewhere.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self._quiet, self._verbose, self._tty = quiet, verbose, sys.stderr.isatty() and not verbose
        self._started = time.monotonic()
        self._open = False
        self._work, self._began, self._next = "", 0.0, math.inf  # what has begun, and when it is to be shown again
        self._lock, self._ended = threading.RLock(), threading.Event()
        self._clock: threading.Thread | None = None

    def __enter__(self) -> Progress:
        if not self._quiet:
            self._clock = threading.Thread(target=self._renew, daemon=True)
            self._clock.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._clock is not None:
            self._clock.join()
        self._newline()

    def say(self, text: str) -> None:
        """One line of information."""
        self._begin("")
        if not self._quiet:
            self._newline()
            self._line(text)

    def _line(self, text: str) -> None:
        since = f"{time.monotonic() - self._started:9.1f} s  " if self._verbose else ""
        print(since + printable(text), file=sys.stderr, flush=True)

    def _renew_line(self, text: str) -> None:
        """On a terminal in place of the line that is open, elsewhere as a line of its own."""
        if self._tty:
            print(f"\r\x1b[K{printable(text)}", end="", file=sys.stderr, flush=True)
            self._open = True
        else:
            self._line(text)

    def begin(self, text: str) -> None:
        """One line that says which work begins."""
        self.say(text)
        self._begin(text)

    def _begin(self, work: str) -> None:
        with self._lock:
            self._work, self._began = work, time.monotonic()
            self._next = self._began + (FIRST if self._tty else PLAIN)

    def _renew(self) -> None:
        while not self._ended.wait(TICK):
            with self._lock:
                now = time.monotonic()
                if not self._work or now < self._next:
                    continue
                self._next = now + (TICK if self._tty else PLAIN)
                self._renew_line(f"{self._work}: {clock(now - self._began)} so far")

    def _newline(self) -> None:
        with self._lock:
            if self._open:
                print(file=sys.stderr)
                self._open = False

    def bar(
        self, what: str, *, tokens: int = 0, utilisation: float | None = None, loss_name: str = "error"
    ) -> Callable[..., None]:
        """A callback (done, total[, loss]) that reports progress of `what`.

        tokens: of one step; with it the rate is also shown in tokens per second. utilisation: MFU at one step a second.
        """
        self._begin("")
        started = time.monotonic()
        state = {"shown": started, "first": -1, "loss": math.nan}

        def update(done: int, total: int, loss: float = math.nan) -> None:
            if not math.isnan(loss):
                state["loss"] = loss
            if state["first"] < 0:
                state["first"] = done - 1
            now = time.monotonic()
            wait = 0.2 if self._tty else 0.0 if self._verbose else 10.0
            if self._quiet or (now - state["shown"] < wait and done < total):
                return
            if done == total and now - started < 2 and not (self._tty or self._verbose):
                return
            state["shown"] = now
            rate = (done - state["first"]) / max(now - started, 1e-9)
            left = (total - done) / rate if rate > 0 else math.inf
            text = f"{what}: {done}/{total}, {rate:.3g}/s, {clock(left)} left"
            if tokens:
                text += f", {rate * tokens:.0f} tokens/s"
            if utilisation is not None:
                text += f", MFU {rate * utilisation:.1%}"
            if not math.isnan(state["loss"]):
                text += f", {loss_name} {state['loss']:.4f}"
            self._renew_line(text)
            if done == total:
                self._newline()

        return update


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
