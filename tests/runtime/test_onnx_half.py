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
    monkeypatch.setattr(onnx_half._Halving, "_widen", lambda *_: None)
    model = graph(weights())
    halve(model)
    with np.errstate(over="ignore"):
        assert not np.allclose(run(model)[0], run(graph(weights()))[0], atol=0.1)


def test_a_constant_beyond_float16_is_named():
    with pytest.raises(ExportError, match="product: holds 7e"):
        halve(graph(weights() | {"product": np.full((WIDTH, WIDTH), 7e4, np.float32)}))


def residual_graph() -> onnx_ir.Model:
    """Logits of a state behind an activation that one sum adds and another takes away, and of layer 1's recurrence.

    sin(1000 product) magnifies what product was rounded by.
    """
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("MatMul", ["past_key_values.0.recurrent_state", "product"], ["y"]),
        helper.make_node("Add", ["x", "y"], ["large"]),
        helper.make_node("Neg", ["x"], ["minus"]),
        helper.make_node("Add", ["large", "minus"], ["small"]),
        helper.make_node("MatMul", ["small", "product"], ["turned"]),
        helper.make_node("Mul", ["turned", "thousand"], ["steep"]),
        helper.make_node("Sin", ["steep"], ["wave"]),
        helper.make_node("Add", ["past_key_values.1.recurrent_state", "wave"], ["z"]),
        helper.make_node("MatMul", ["z", "product"], ["logits"]),
    ]
    shape = ("B", "T", WIDTH)
    names = ["past_key_values.0.recurrent_state", "past_key_values.1.recurrent_state"]
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ("B", "T"))]
    inputs += [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in names]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("logits", "small")]
    table = np.full((VOCAB, WIDTH), 8192, np.float32)
    values = {"table": table, "product": weights()["product"] / WIDTH, "thousand": np.float32(1000)}
    constants = [numpy_helper.from_array(v, n) for n, v in values.items()]
    made = helper.make_graph(nodes, "g", inputs, outputs, constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx_ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model, strict_mode=True))


def run_residual(model: onnx_ir.Model) -> list[np.ndarray]:
    proto = onnx_ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    rng = np.random.default_rng(1)
    states = {f"past_key_values.{i}.recurrent_state": rng.standard_normal((2, 3, WIDTH)) for i in range(2)}
    feeds = {name: v.astype(np.float32) for name, v in states.items()}
    return ReferenceEvaluator(proto).run(None, feeds | {"input_ids": np.zeros((2, 3), np.int64)})


def test_the_residual_stream_is_whole():
    """Next to 8192 float16 values lie 8 apart: of the sum nothing would be left."""
    model = residual_graph()
    halve(model)
    np.testing.assert_allclose(run_residual(model)[1], run_residual(residual_graph())[1], atol=4e-3)


def test_layers_before_one_that_magnifies_can_stay_whole():
    exact, errors = run_residual(residual_graph())[0], []
    for layers in (0, 1, 2):
        model = residual_graph()
        halve(model, float32_layers=layers)
        errors.append(np.abs(run_residual(model)[0] - exact).max())
    assert errors[0] > 0.02 > 0.002 > errors[1] > errors[2] == 0


def test_a_cache_of_plain_operators_leaves_in_the_type_it_came_in():
    past, present = "past_key_values.0.key", "present.0.key"
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("Identity", [past], ["window"]),
        helper.make_node("Concat", ["window", "x"], [present], axis=1),
        helper.make_node("MatMul", [present, "product"], ["y"]),
        helper.make_node("Add", ["y", "past_key_values.1.recurrent_state"], ["logits"]),
    ]
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ("B", "T"))]
    states = (past, "past_key_values.1.recurrent_state")
    inputs += [helper.make_tensor_value_info(n, TensorProto.FLOAT, ("B", "P", WIDTH)) for n in states]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ("B", "S", WIDTH)) for n in ("logits", present)]
    constants = [numpy_helper.from_array(weights()[n], n) for n in ("table", "product")]
    made = helper.make_graph(nodes, "g", inputs, outputs, constants)
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    for layers in (0, 1):
        model = onnx_ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto, strict_mode=True))
        halve(model, float32_layers=layers)
        onnx.checker.check_model(onnx_ir.serde.serialize_model(model), full_check=True)
        cache = {v.dtype for v in (*model.graph.inputs, *model.graph.outputs) if v.name.endswith(".key")}
        product = next(n for n in model.graph if n.op_type == "MatMul")
        assert cache == {onnx_ir.DataType.FLOAT16}
        assert product.outputs[0].dtype == (onnx_ir.DataType.FLOAT if layers else onnx_ir.DataType.FLOAT16)
