"""Gates in front of the gated delta rule, in plain PyTorch: every exporter and compiler knows their parts."""

from .reference import decay_gate, l2_normalize

__all__ = ["decay_gate", "l2_normalize"]
