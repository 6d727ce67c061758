"""tcal::gated_delta_rule: importing this package registers the op with PyTorch (no Triton, no ONNX)."""

from .op import gated_delta_rule
from .reference import gated_delta_rule_reference

__all__ = ["gated_delta_rule", "gated_delta_rule_reference"]
