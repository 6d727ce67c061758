"""Softmax attention over the last tokens alone, in PyTorch, linear in the length."""

from .blocks import as_exported, local_attention, local_attention_reference

__all__ = ["as_exported", "local_attention", "local_attention_reference"]
