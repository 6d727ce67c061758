"""Products of mixture-of-experts layers in ONNX, where torch.onnx has no translation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def translation_table(program: ExportedProgram) -> dict[Any, Callable[..., Any]]:
    """custom_translation_table of torch.onnx.export for the grouped products of the program."""
    import onnxscript

    op: Any = onnxscript.opset21  # its stubs do not know constants

    def rule(x: Any, weight: Any, offs: Any, *_: Any) -> Any:
        """Rows offs[e - 1] .. offs[e] of x [N, K] times weight[e] [K, M], for each expert e: [N, M]."""
        zero = op.Constant(value_ints=[0])
        ends = op.Cast(offs, to=onnxscript.INT64.dtype)
        parts, start = [], zero
        for e in range(int(weight.shape[0])):
            end = op.Slice(ends, op.Constant(value_ints=[e]), op.Constant(value_ints=[e + 1]), zero)
            parts.append(op.MatMul(op.Slice(x, start, end, zero), op.Gather(weight, op.Constant(value_int=e), axis=0)))
            start = end
        return op.Concat(*parts, axis=0)

    return {n.target: rule for n in program.graph.nodes if "grouped_mm" in str(n.target)}
