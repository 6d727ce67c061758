"""Progress of stages on stderr: a line that renews itself on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """text with control characters spelt out: names in a file from elsewhere must not steer the terminal."""
    return _CONTROL.sub(lambda m: f"\\x{ord(m[0]):02x}", text)


class Progress:
    """Shows what a stage does, how far it is and the time left. quiet: shows nothing.

    Plain output prints a line at most every ten seconds, so that logs stay short.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet, self._tty = quiet, sys.stderr.isatty()
        self._open = False

    def say(self, text: str) -> None:
        """One line of information."""
        if not self._quiet:
            self._newline()
            print(printable(text), file=sys.stderr, flush=True)

    def _newline(self) -> None:
        if self._open:
            print(file=sys.stderr)
            self._open = False

    def bar(
        self, what: str, *, tokens: int = 0, utilisation: float | None = None, loss_name: str = "error"
    ) -> Callable[..., None]:
        """A callback (done, total[, loss]) that reports progress of `what`.

        tokens: of one step; with it the rate is also shown in tokens per second. utilisation: MFU at one step a second.
        """
        started = time.monotonic()
        state = {"shown": started, "first": -1, "loss": math.nan}

        def update(done: int, total: int, loss: float = math.nan) -> None:
            if not math.isnan(loss):
                state["loss"] = loss
            if state["first"] < 0:
                state["first"] = done - 1
            now = time.monotonic()
            wait = 0.2 if self._tty else 10.0
            if self._quiet or (now - state["shown"] < wait and done < total):
                return
            if done == total and now - started < 2 and not self._tty:
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
            if self._tty:
                print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
                self._open = True
                if done == total:
                    self._newline()
            else:
                print(text, file=sys.stderr, flush=True)

        return update


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
