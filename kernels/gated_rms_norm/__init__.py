"""tcal::gated_rms_norm: importing this package registers the op with PyTorch (no Triton)."""

from .op import gated_rms_norm
from .reference import gated_rms_norm_reference

__all__ = ["gated_rms_norm", "gated_rms_norm_reference"]
