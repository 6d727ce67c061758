"""Gates in front of the gated delta rule, in PyTorch, and tcal::l2_normalize, which importing this registers."""

from .op import l2_normalize
from .reference import decay_gate, l2_normalize_reference

__all__ = ["decay_gate", "l2_normalize", "l2_normalize_reference"]
