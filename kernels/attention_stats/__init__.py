"""Statistics of causal softmax attention: importing this package registers the ops with PyTorch (no Triton)."""

from .op import attention_output_sums, attention_statistics
from .reference import EPS, OCTAVES, attention_output_sums_reference, attention_statistics_reference

__all__ = [
    "EPS",
    "OCTAVES",
    "attention_output_sums",
    "attention_output_sums_reference",
    "attention_statistics",
    "attention_statistics_reference",
]
