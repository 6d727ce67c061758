"""Progress of stages on stderr: a line that renews itself on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping

TICK, FIRST, PLAIN = 1.0, 2.0, 30.0  # seconds: between looks, before the first time on a terminal, between plain lines
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """text with control characters spelt out: names in a file from elsewhere must not steer the terminal."""
    return _CONTROL.sub(lambda m: f"\\x{ord(m[0]):02x}", text)


class Progress:
    """Shows what a stage does, how far it is and the time left. quiet: shows nothing. verbose: a line for every step.

    Verbose lines begin with the time since the first. Plain output prints a line at most every ten seconds, so that
    logs stay short. In a `with` block, work whose length is not known (`begin`) shows how long it has taken, and what
    Parts know of the time left: every second on a terminal, every half minute elsewhere.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self._quiet, self._verbose, self._tty = quiet, verbose, sys.stderr.isatty() and not verbose
        self._started = time.monotonic()
        self._open = False
        self._work, self._next = "", math.inf  # what has begun, and when it is to be shown again
        self._so_far: Callable[[], str] = str
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

    def begin(self, text: str, so_far: Callable[[], str] | None = None) -> None:
        """One line that says which work begins. so_far: what stands behind it as it goes on; default: its time."""
        self.say(text)
        self._begin(text, so_far)

    def wait(self, text: str) -> None:
        """As begin, without the line: work that is likely to be short shows only when it is not."""
        self._begin(text)

    def _begin(self, work: str, so_far: Callable[[], str] | None = None) -> None:
        with self._lock:
            now = time.monotonic()
            self._work, self._next = work, now + (FIRST if self._tty else PLAIN)
            self._so_far = so_far or (lambda: f"{clock(time.monotonic() - now)} so far")

    def _renew(self) -> None:
        while not self._ended.wait(TICK):
            with self._lock:
                now = time.monotonic()
                if not self._work or now < self._next:
                    continue
                self._next = now + (TICK if self._tty else PLAIN)
                self._renew_line(f"{self._work}: {self._so_far()}")

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
        Before the first step is done, the time that it has taken is shown. Steps may be of several at once, and may go
        on from where a stage was stopped: a first call with more than one done tells no rate yet.
        """
        self._begin(what)
        started = time.monotonic()
        state = {"shown": started, "loss": math.nan}
        seen: list[int] = []  # what was done at the first two calls

        def update(done: int, total: int, loss: float = math.nan) -> None:
            if not math.isnan(loss):
                state["loss"] = loss
            if not seen:
                self._begin("")
            if len(seen) < 2:
                seen.append(done)
            now = time.monotonic()
            wait = 0.2 if self._tty else 0.0 if self._verbose else 10.0
            if self._quiet or (now - state["shown"] < wait and done < total):
                return
            if done == total and now - started < 2 and not (self._tty or self._verbose):
                return
            state["shown"] = now
            text = f"{what}: {done}/{total}"
            before = max(2 * seen[0] - seen[-1], 0) if len(seen) > 1 else seen[0] - 1  # the first call
            if (rate := (done - before) / max(now - started, 1e-9)) and (len(seen) > 1 or done == 1):
                text += f", {rate:.3g}/s" if rate >= 1 else f", {1 / rate:.3g} s each"
                text += f", {clock((total - done) / rate)} left"
                text += f", {rate * tokens:.0f} tokens/s" if tokens else ""
                text += f", MFU {rate * utilisation:.1%}" if utilisation is not None else ""
            if not math.isnan(state["loss"]):
                text += f", {loss_name} {state['loss']:.4f}"
            self._renew_line(text)
            if done == total:
                self._newline()

        return update


class Parts:
    """The parts of a stage, one after the other, with an estimate of the time left.

    A part whose length is known (`update`) is counted up at its own rate. The others are taken to need the shares of
    the stage's time that they usually have: a unit of them lasts what it did in the parts before, or `unit` seconds at
    the beginning. Before anything is known no time left is shown; where a part takes longer than that, what
    those behind it need at the least: they are longer in proportion.
    """

    def __init__(self, progress: Progress, stage: str, shares: Mapping[str, float], *, unit: float = math.nan) -> None:
        self._progress, self._stage, self._unit = progress, stage, unit
        self._names, self._shares = list(shares), list(shares.values())
        self._at = -1
        self._started = self._began = time.monotonic()
        self._lengths: list[tuple[float, float]] = []  # time and what was done, at the first and the last update
        self._total, self._of = 0.0, ""

    def begin(self, name: str) -> None:
        """The next part that has this name."""
        self._at, self._began = self._names.index(name), time.monotonic()
        self._lengths, self._total = [], 0.0
        text = f"{self._stage}, {self._at + 1} of {len(self._names)}: {name}"
        self._progress.begin(text, self.so_far)

    def update(self, done: float, total: float, of: str = "") -> None:
        """How far the part is that has begun, in units named `of`."""
        self._total, self._of = total, f" {of}" if of else ""
        self._lengths = [*self._lengths[:1], (time.monotonic(), done)]

    def _rate(self) -> float:
        if len(self._lengths) < 2:
            return math.nan
        (start, first), (end, last) = self._lengths
        return (last - first) / max(end - start, 1e-9)

    def _share_seconds(self) -> float:
        """What a unit of the shares took in the parts before."""
        behind = sum(self._shares[: self._at])
        return (self._began - self._started) / behind if behind else self._unit

    def _is_late(self) -> bool:
        """The part takes longer than its share, and how long still is not known."""
        spent = time.monotonic() - self._began
        return not self._rate() > 0 and spent >= self._shares[self._at] * self._share_seconds() + 1

    def left(self) -> float:
        """Seconds to the end of the stage, 0 or more; NaN where nothing is known, the least where a part is late."""
        now, share, rate = time.monotonic(), self._shares[self._at], self._rate()
        part, spent = now - self._began, self._began - self._started
        behind, ahead = sum(self._shares[: self._at]), sum(self._shares[self._at + 1 :])
        if rate > 0:
            at, done = self._lengths[-1]
            rest = max((self._total - done) / rate - (now - at), 0.0)
            return rest + ahead * (spent + part + rest) / (behind + share)
        unit = self._share_seconds()
        if self._is_late():  # so do those that follow, as far as is known
            return ahead * (spent + part) / (behind + share)
        return max(share * unit - part, 0.0) + ahead * unit if math.isfinite(unit) else math.nan

    def so_far(self) -> str:
        """What is shown of the stage: how far its part is, its time and the time left."""
        words, rate, left = [], self._rate(), self.left()
        if rate > 0:
            words = [f"{self._lengths[-1][1]:.4g}/{self._total:.4g}{self._of}", f"{rate:.3g}{self._of}/s"]
        words.append(f"{clock(time.monotonic() - self._started)} so far")
        if self._is_late():
            words.append("longer than expected" + (f", at least {clock(left)} left" if left >= 1 else ""))
        elif left >= 1:
            words.append(f"about {clock(left)} left")
        return ", ".join(words)


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
