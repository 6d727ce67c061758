"""Gates and norms around the gated delta rule, in plain PyTorch: every exporter and compiler knows their parts."""

from .reference import decay_gate, gated_rms_norm, l2_normalize

__all__ = ["decay_gate", "gated_rms_norm", "l2_normalize"]
