"""Softmax attention over the last tokens alone, in PyTorch, linear in the length."""

from .blocks import local_attention, local_attention_reference

__all__ = ["local_attention", "local_attention_reference"]
