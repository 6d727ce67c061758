"""An exported graph in float16 for GPUs: products, attention and its caches in half precision, the rest in float32.

Only values that are computed from embeddings or caches change; positions and masks stay as they are. Norms, softmax,
gates and recurrences (FLOAT_OPS) read float32 copies and keep float32 states. Whatever else reads a float16 value runs
in float16, its constants with it; logits leave as float32.
"""

from __future__ import annotations

from typing import Any

from tcal_compiler.errors import ExportError

# operators that sum or exponentiate: in float16 they lose what the student's numbers hang on
FLOAT_OPS = {"Pow", "ReduceMean", "ReduceSum", "ReduceMax", "Sqrt", "Reciprocal", "Div", "Exp", "Log", "Softplus"}
FLOAT_OPS |= {"Softmax", "LinearAttention", "CumSum", "Sin", "Cos"}
LARGEST = 65504.0
_NO_FLOATS = {"Shape", "Size", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Not", "And", "Or", "IsNaN"}


def halve(model: Any) -> int:
    """Rewrites a model whose values still have types; returns how many nodes run in float16.

    Raises ExportError when a constant is beyond float16, or a node has a sub-graph whose types cannot be followed.
    """
    work = _Halving(model.graph)
    for node in list(model.graph):
        work.visit(node)
    work.finish()
    return work.count


class _Halving:
    """One walk in the order of the graph; `half` and `wide` are what of each kind exists of a value."""

    def __init__(self, graph: Any) -> None:
        import onnx_ir as ir

        self.ir, self.graph = ir, graph
        self.float, self.float16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
        self.followed: set[Any] = set()  # float values that depend on embeddings or caches
        self.copies: dict[tuple[Any, Any], Any] = {}
        self.count = 0
        for v in graph.inputs:
            if v.dtype == self.float and v.name.startswith("past_key_values."):
                self.followed.add(v)
                if v.name.endswith((".key", ".value")):
                    v.type = ir.TensorType(self.float16)

    def visit(self, node: Any) -> None:
        if any(a.type in (self.ir.AttributeType.GRAPH, self.ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            raise ExportError("ONNX export", f"profile cuda cannot follow types into {node.op_type}", "profile ort")
        seen = [i for i in node.inputs if i is not None and i in self.followed]
        table = self._reads_table(node)
        if not seen and not table:
            return
        for v in node.outputs:
            if v.type is None and node.op_type not in _NO_FLOATS:  # inside what one torch operator became
                v.type = self.ir.TensorType(self.float)
        outputs = [v for v in node.outputs if v.dtype == self.float]
        self.followed |= set(outputs)
        product = node.op_type in ("MatMul", "Gemm")
        wide = node.op_type in FLOAT_OPS or (not product and not table and all(i.dtype == self.float for i in seen))
        for i, v in enumerate(node.inputs):
            if v is not None and v.dtype in (self.float, self.float16):
                node.replace_input_with(i, self.copy(v, self.float if wide else self.float16, node))
        if wide:
            return
        self.count += bool(outputs)
        for v in outputs:
            v.type = self.ir.TensorType(self.float16)
        if node.op_type == "Cast" and outputs:
            node.attributes["to"] = self.ir.AttrInt64("to", int(self.float16))

    def _reads_table(self, node: Any) -> bool:
        """Whether it takes rows of, or transposes, a constant matrix."""
        if node.op_type not in ("Gather", "Transpose"):
            return False
        matrix = node.inputs[0]
        return matrix.is_initializer() and matrix.dtype == self.float and len(matrix.shape) == 2

    def copy(self, value: Any, dtype: Any, before: Any) -> Any:
        """The value in another type: a constant of its own, or a Cast right behind where it comes from."""
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self.copies:
            make = self._constant if value.is_initializer() else self._cast
            self.copies[value, dtype] = make(value, dtype)
        return self.copies[value, dtype]

    def _constant(self, value: Any, dtype: Any) -> Any:
        import numpy as np

        array = value.const_value.numpy()
        finite = array[np.isfinite(array)]
        if dtype == self.float16 and finite.size and np.abs(finite).max() > LARGEST:
            what = f"holds {np.abs(finite).max():.3g}, more than float16 can"
            raise ExportError(value.name, what, "profile ort")
        tensor = self.ir.tensor(array.astype(dtype.numpy()), name=f"{value.name}.{dtype.name.lower()}")
        made = self.ir.Value(name=tensor.name, shape=value.shape, type=self.ir.TensorType(dtype), const_value=tensor)
        self.graph.register_initializer(made)
        return made

    def _cast(self, value: Any, dtype: Any) -> Any:
        node = self.ir.node("Cast", [value], attributes={"to": int(dtype)})
        made = node.outputs[0]
        made.name, made.shape = f"{value.name}_{dtype.name.lower()}", value.shape
        made.type = self.ir.TensorType(dtype)
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], [node])
        else:
            self.graph.insert_after(producer, [node])
        return made

    def finish(self) -> None:
        """Outputs that stay float32 leave through a Cast; constants that nothing reads any more are dropped."""
        for i, v in enumerate(self.graph.outputs):
            if v.dtype == self.float16 and not v.name.endswith((".key", ".value")):
                name, v.name = v.name, f"{v.name}_float16"
                made = self._cast(v, self.float)
                made.name, self.graph.outputs[i] = name, made
        for name, v in list(self.graph.initializers.items()):
            if not v.uses() and not v.is_graph_output():
                del self.graph.initializers[name]
