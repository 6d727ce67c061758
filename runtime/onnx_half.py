"""An exported graph in float16 for GPUs: products, attention and its caches in half precision, the rest in float32.

Only values that are computed from embeddings or caches change; positions and masks stay as they are. Norms, softmax,
gates and recurrences (FLOAT_OPS) read float32 copies and keep float32 states. Rows of an embedding table are widened,
and a sum with a float32 value is float32, so that the residual stream is. Whatever else reads a float16 value runs in
float16, its constants with it; logits leave as float32.

A layer whose MLP makes activations of thousands out of tens, as some of the first do for the first token, magnifies the
rounding of all that lies before it. No scale helps, since float16 rounds relatively; the layers up to there have to be
float32, weights included. Caches and what reads them stay float16: CUDA's GroupQueryAttention knows no float32.
"""

from __future__ import annotations

from typing import Any

from tcal_compiler.errors import ExportError

# operators that sum or exponentiate: in float16 they lose what the student's numbers hang on
FLOAT_OPS = {"Pow", "ReduceMean", "ReduceSum", "ReduceMax", "Sqrt", "Reciprocal", "Div", "Exp", "Log", "Softplus"}
FLOAT_OPS |= {"Softmax", "LinearAttention", "CumSum", "Sin", "Cos"}
LARGEST = 65504.0
HALF_STATES = (".key", ".value", ".conv_state")  # caches and windows
_NO_FLOATS = {"Shape", "Size", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Not", "And", "Or", "IsNaN"}


def halve(model: Any, *, float32_layers: int = 0) -> int:
    """Rewrites a model whose values still have types; returns how many nodes run in float16.

    float32_layers: what the attention or recurrence of this layer, from 0, is computed from stays float32, but for
    embedding tables, caches and what reads these: so many layers, and the next one's queries, keys and values.

    Raises ExportError when a constant is beyond float16, or a node has a sub-graph whose types cannot be followed.
    """
    work = _Halving(model.graph, float32_layers)
    for node in list(model.graph):
        work.visit(node)
    work.finish()
    return work.count


def _before_layer(graph: Any, layer: int) -> set[Any]:
    """The nodes that whatever reads this layer's past depends on; all where there are fewer layers; none for 0."""
    if layer == 0:
        return set()
    start = [u.node for v in graph.inputs if v.name.startswith(f"past_key_values.{layer}.") for u in v.uses()]
    if not start:
        return set(graph)
    found: set[Any] = set()
    while start:
        makers = (v.producer() for v in start.pop().inputs if v is not None)
        new = {n for n in makers if n is not None} - found
        found |= new
        start += new
    return found


class _Halving:
    """One walk in the order of the graph; `half` and `wide` are what of each kind exists of a value."""

    def __init__(self, graph: Any, float32_layers: int) -> None:
        import onnx_ir as ir

        self.ir, self.graph = ir, graph
        self.float, self.float16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
        self.followed: set[Any] = set()  # float values that depend on embeddings or caches
        self.copies: dict[tuple[Any, Any], Any] = {}
        self.count = 0
        self.leading = _before_layer(graph, float32_layers)
        for v in graph.inputs:
            if v.dtype == self.float and v.name.startswith("past_key_values."):
                self.followed.add(v)
                if v.name.endswith(HALF_STATES):
                    self.leading -= {u.node for u in v.uses()}
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
        wide = not table and self._is_wide(node, [i.dtype == self.float for i in seen])
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
        if table and node.op_type == "Gather":
            self._widen(node.outputs[0])

    def _is_wide(self, node: Any, floats: list[bool]) -> bool:
        """floats: for each followed input whether it is float32 now."""
        if node.op_type in FLOAT_OPS or node in self.leading:
            return True
        if node.op_type in ("MatMul", "Gemm"):
            return False
        return any(floats) if node.op_type == "Add" else all(floats)

    def _widen(self, value: Any) -> None:
        """All that reads the float16 value reads a float32 copy."""
        made = self._cast(value, self.float)
        cast = made.producer()
        for use in list(value.uses()):
            if use.node is not cast:
                use.node.replace_input_with(use.idx, made)
        self.followed.add(made)
        self.copies[made, self.float16] = value

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
        """Caches leave as float16, the rest as float32; constants that nothing reads any more are dropped."""
        for i, v in enumerate(self.graph.outputs):
            due = self.float16 if v.name.endswith(HALF_STATES) else self.float
            if v in self.followed and v.dtype != due:
                name, v.name = v.name, f"{v.name}_{v.dtype.name.lower()}"
                made = self._cast(v, due)
                made.name, self.graph.outputs[i] = name, made
        for name, v in list(self.graph.initializers.items()):
            if not v.uses() and not v.is_graph_output():
                del self.graph.initializers[name]
