"""tcal::delta_gates: importing this package registers the op with PyTorch (no Triton)."""

from .op import delta_gates
from .reference import delta_gates_reference

__all__ = ["delta_gates", "delta_gates_reference"]
