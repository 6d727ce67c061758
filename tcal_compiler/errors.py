"""The typed errors that a user can meet. Each message says where, what, the values seen and what to try.

This module imports nothing, so that every layer (kernels, passes, runtime, front end) may raise these.
"""

from __future__ import annotations


class TcalError(Exception):
    """Base of all errors caused by input or environment; the command line prints it and exits with 1.

    Args:
        where: the file, module path, stage or option concerned.
        what: what is wrong, with the values seen.
        hint: what to try; empty when there is nothing to suggest.
    """

    def __init__(self, where: str, what: str, hint: str = "") -> None:
        self.where, self.what, self.hint = where, what, hint
        super().__init__(f"{where}: {what}" + (f"\n  Try: {hint}" if hint else ""))


class ConfigError(TcalError):
    """An option, configuration key or plan that is unknown, out of range or contradictory."""


class TeacherError(TcalError):
    """A teacher that is missing, truncated, of an unknown format or unsafe to load."""


class UnsupportedModelError(TcalError):
    """A teacher that loads but cannot be converted: not causal, no attention, no way to capture it."""


class DataError(TcalError):
    """Text or tokenizer that is missing, empty, too short or does not fit the teacher."""


class RunFolderError(TcalError):
    """A run folder that is damaged, belongs to another teacher or lacks a stage."""


class StageError(TcalError):
    """A stage that could not complete: no space left, out of memory, a loss that is not finite."""


class ParityError(TcalError):
    """Two forms of the same model differ by more than is allowed."""


class ExportError(TcalError):
    """An ONNX model that cannot be written or run here."""


class PassError(RuntimeError):
    """A pass broke its own promise: a bug of ours, never of the user's model."""
