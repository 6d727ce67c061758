"""Looking around in an onnx_ir graph: what makes a value, and the numbers of a constant."""

from __future__ import annotations

from typing import Any


def producer(value: Any, op_type: str) -> Any:
    """The node that makes the value, where it is this operator of ONNX itself; else None."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def constant(value: Any) -> Any:
    """The numbers of a constant as an array, None where the value is none."""
    import onnx_ir as ir

    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()
