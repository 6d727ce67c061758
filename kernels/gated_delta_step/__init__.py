"""tcal::gated_delta_step: importing this package registers the ops with PyTorch (no Triton)."""

from .op import MOST_TOKENS, gated_delta_step
from .reference import gated_delta_step_reference

__all__ = ["MOST_TOKENS", "gated_delta_step", "gated_delta_step_reference"]
