"""What a run's student is worth, and what is wrong with it, a line each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from .facts import Facts, finite
from .numbers import fixed, number, with_error

LITTLE, SMALL = 0.5, 0.1  # mean held-out errors: from the first layers know little, up to the second all is well
OVERFIT = 2.0  # times the error on the text that was trained on


class Beside(Protocol):
    """A converted site: tokens that the teacher sees there, None for all, and those seen beside its state."""

    @property
    def window(self) -> int | None: ...
    @property
    def local(self) -> int: ...
    @property
    def local_first(self) -> bool: ...


def verdict(run: Facts) -> str:
    """One line on converted layers that know little of the teacher's, or little beyond the text that they were
    trained on, or that alignment bettered nowhere, before a distillation, on a student that scored no better than a
    naive one, and on one whose text could not show what its states do; empty where all is well.
    """
    said = [_little_known(run), _no_better_than_naive(run), _within_windows(run) or _never_better(run)]
    return ". ".join(s for s in said if s)


def quality(run: Facts) -> str:
    """One line on the student's perplexity beside its teacher's; empty before the export, or of an older one."""
    held = run.evidence("export").get("held_out")
    if not held:
        return ""
    teacher, student, kl = held["teacher"], held["student"], fixed(held["kl"], 4)
    texts = ", ".join(run.evidence("calibrate")["text"])
    return (
        f"Perplexity {fixed(student / teacher, 3)} times the teacher's ({fixed(student, 2)}, {fixed(teacher, 2)}), KL "
        f"{kl} nats per token, on {held['sequences']} held-out sequences of {held['length']} tokens of {texts}"
    )


def _no_better_than_naive(run: Facts) -> str:
    """On the scores of tcal eval."""
    scores: list[dict[str, Any]] = [run.scores.get(n, {}) for n in ("naive", "student")]
    naive: Any = scores[0].get("kl")
    student: Any = scores[1].get("kl")
    error: Any = scores[1].get("kl_stderr")
    if not (finite(naive) and finite(student)) or naive > student + (error if finite(error) else 0):
        return ""
    where = f"KL {with_error(student, error, 4)} and {fixed(naive, 4)} nats per token on {run.evidence('eval')['text']}"
    return (
        f"The student is not clearly better than a naive one, whose converted layers have fresh values ({where}): more "
        "calibration text like this one, more --align-steps, or more converted layers, if this text hardly needs them"
    )


def _little_known(run: Facts) -> str:
    if run.mean_errors is None or run.distillation:
        return ""
    _, after, trained = run.mean_errors
    where = f"mean held-out error {number(after, 3)}, {number(trained, 3)} on the text trained on"
    if after > LITTLE:
        return (
            f"Converted layers know little of the teacher's on unseen text ({where}; 0 is the teacher, 1 is zeros): "
            "more calibration text (--calib-sequences), more --align-steps, then --distill-tokens. The same command "
            "with larger values makes this folder anew"
        )
    if after > max(OVERFIT * trained, SMALL):
        what = "Converted layers know the text that they were trained on better than other text"
        return f"{what} ({where}): more calibration text (--calib-sequences)"
    return ""


def _never_better(run: Facts) -> str:
    """Alignment whose every score on held-out text was worse than that of the start, in all converted layers."""
    if run.mean_errors is None or run.distillation or run.curve[-1]["step"] == 0:
        return ""
    if any(after < before for before, after in run.held_out.values()):
        return ""
    last = run.curve[-1]["held_out"].values()
    start, end = number(run.mean_errors[0], 3), number(sum(last) / len(last), 3)
    return (
        "Alignment left every converted layer as it was initialised, since no later score on held-out text was better "
        f"(mean error {start} at the start, {end} after the last step): more calibration text (--calib-sequences), "
        "or a larger align.near_error in --config FILE, for smaller steps"
    )


def _within_windows(run: Facts) -> str:
    config: Any = run.manifest.config
    return within_windows(config["calib"]["length"], [s for s in run.layers if not s.kept]) if run.measured else ""


def within_windows(length: int, converted: Iterable[Beside]) -> str:
    """One line where calibration sequences of so many tokens lie within a window beside a converted site's state,
    other than one that is all that the teacher sees there; else empty.
    """
    beside = [s for s in converted if s.local and (s.window is None or s.window > s.local)]
    seen = max((s for s in beside if length <= s.local + s.local_first), key=lambda s: s.local, default=None)
    if seen is None:
        return ""
    first = " and the first" if seen.local_first else ""
    return (
        f"Calibration sequences of {length} tokens are no longer than what converted layers attend to beside their "
        f"states, the last {seen.local} tokens{first}: the states learn nothing from them, and errors and perplexity "
        "on such text do not show what they are worth: a larger --calib-length, or a smaller --local-window"
    )
