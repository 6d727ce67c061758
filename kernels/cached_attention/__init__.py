"""tcal::cached_attention: importing this package registers the op with PyTorch (no ONNX)."""

from .op import cached_attention
from .reference import cached_attention_reference
from .windowed import held_positions, windowed_attention

__all__ = ["cached_attention", "cached_attention_reference", "held_positions", "windowed_attention"]
