"""Softmax attention over the last tokens and the first ones: in PyTorch, linear in the length; and from token to token,
as tcal::window_rows and tcal::window_step, which importing this package registers (no ONNX)."""

from .blocks import as_exported, local_attention, local_attention_reference
from .op import window_rows, window_step
from .step import WindowRows, window_rows_reference, window_step_reference

__all__ = [
    "WindowRows",
    "as_exported",
    "local_attention",
    "local_attention_reference",
    "window_rows",
    "window_rows_reference",
    "window_step",
    "window_step_reference",
]
