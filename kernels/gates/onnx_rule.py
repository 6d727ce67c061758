"""The decay gate's softplus in ONNX: one operator, which is stable for any input and needs no threshold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def translation_table() -> dict[Any, Callable[..., Any]]:
    """custom_translation_table of torch.onnx.export: log(1 + exp(beta x)) / beta.

    torch returns x itself where beta x exceeds a threshold; at 20, the default, the two differ by exp(-20).
    """
    import onnxscript

    op: Any = onnxscript.opset21  # its stubs do not know constants

    def rule(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
        if beta == 1.0:
            return op.Softplus(x)
        factor = op.CastLike(op.Constant(value_float=float(beta)), x)
        return op.Div(op.Softplus(op.Mul(x, factor)), factor)

    return {torch.ops.aten.softplus.default: rule}
