"""float16 products in a graph by hand: float32 norms and states around them, and what cannot be float16 is refused."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from tcal_compiler.errors import ExportError
from tcal_compiler.runtime import onnx_half
from tcal_compiler.runtime.onnx_half import halve

VOCAB, WIDTH = 11, 8


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"table": (VOCAB, WIDTH), "product": (WIDTH, WIDTH), "head": (VOCAB, WIDTH), "gain": (WIDTH,)}
    made = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    made["table"] *= 400  # its squares are beyond float16
    return made | {"two": np.float32(2), "eps": np.float32(1e-6), "axes": np.array([-1])}


def graph(values: dict[str, np.ndarray]) -> onnx_ir.Model:
    """Embedding, RMS norm, product on top of a state, residual, tied-looking head; the state adds up products."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("Pow", ["x", "two"], ["square"]),
        helper.make_node("ReduceMean", ["square", "axes"], ["mean"], keepdims=1),
        helper.make_node("Add", ["mean", "eps"], ["shifted"]),
        helper.make_node("Sqrt", ["shifted"], ["root"]),
        helper.make_node("Div", ["x", "root"], ["unit"]),
        helper.make_node("Mul", ["unit", "gain"], ["normed"]),
        helper.make_node("MatMul", ["normed", "product"], ["y"]),
        helper.make_node("ReduceSum", ["y", "axes"], ["total"], keepdims=1),
        helper.make_node("Add", ["past_key_values.0.recurrent_state", "total"], ["present.0.recurrent_state"]),
        helper.make_node("Add", ["normed", "y"], ["z"]),
        helper.make_node("Transpose", ["head"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["z", "turned"], ["logits"]),
    ]
    state, out = ("B", "T", 1), ("B", "T", VOCAB)
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ("B", "T"))]
    inputs += [helper.make_tensor_value_info("past_key_values.0.recurrent_state", TensorProto.FLOAT, state)]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, out)]
    outputs += [helper.make_tensor_value_info("present.0.recurrent_state", TensorProto.FLOAT, state)]
    constants = [numpy_helper.from_array(np.asarray(v), n) for n, v in values.items()]
    made = helper.make_graph(nodes, "g", inputs, outputs, constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx_ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model, strict_mode=True))


def run(model: onnx_ir.Model) -> list[np.ndarray]:
    """By onnx's reference implementation: ONNX Runtime on the CPU would widen what is said to be float16."""
    proto = onnx_ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    ids, state = np.array([[1, 5, 9], [0, 3, 10]]), np.full((2, 3, 1), 0.123456789, np.float32)
    return ReferenceEvaluator(proto).run(None, {"input_ids": ids, "past_key_values.0.recurrent_state": state})


def test_products_are_half_and_norms_and_states_are_whole():
    exact, model = run(graph(weights())), graph(weights())
    assert halve(model) > 0
    kinds = {n.op_type: {v.dtype for v in (*n.inputs, *n.outputs)} for n in model.graph if n.op_type != "Cast"}
    half, whole = onnx_ir.DataType.FLOAT16, onnx_ir.DataType.FLOAT
    assert kinds["MatMul"] == kinds["Transpose"] == {half}
    assert whole in kinds["Pow"] and half not in kinds["Pow"] | kinds["Div"] | kinds["Sqrt"]
    stored = {v.name.split(".")[0]: v.dtype for v in model.graph.initializers.values()}
    assert stored["table"] == stored["product"] == stored["head"] == half and stored["gain"] == whole
    assert all(v.dtype == whole for v in (model.graph.inputs[1], *model.graph.outputs))
    for found, wide in zip(run(model), exact, strict=True):
        np.testing.assert_allclose(found, wide, rtol=4 * np.finfo(np.float16).eps, atol=2e-2)
        assert (found != wide).any()


def test_a_norm_in_float16_is_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onnx_half, "FLOAT_OPS", set())
    model = graph(weights())
    halve(model)
    with np.errstate(over="ignore"):
        assert not np.allclose(run(model)[0], run(graph(weights()))[0], atol=0.1)


def test_a_constant_beyond_float16_is_named():
    with pytest.raises(ExportError, match="product: holds 7e"):
        halve(graph(weights() | {"product": np.full((WIDTH, WIDTH), 7e4, np.float32)}))
