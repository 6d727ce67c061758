"""Norms of an exported graph in the spelling that ONNX Runtime runs as one operator.

torch.onnx writes x rsqrt(mean x^2 + eps) with Reciprocal, which no runtime fuses. ONNX Runtime makes one
SimplifiedLayerNormalization of Pow, ReduceMean, Add, Sqrt, Div and Mul with a vector; an L2 norm takes that form too:
x / sqrt(sum x^2 + eps) = x / sqrt(mean x^2 + eps / D) D^-1/2 for D channels. A step of one token is many small
operators, so that their number counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .onnx_graph import constant, producer


@dataclass(frozen=True)
class _Norm:
    """product = x / root; root = Sqrt(summed + eps), where reduce is the mean or the sum of square over D channels."""

    product: Any  # node
    x: Any  # value
    square: Any  # value
    reduce: Any  # node
    root: Any  # value
    eps: float
    channels: int


def fuse_norms(model: Any) -> int:
    """Rewrites every norm over the last axis of a model whose values still have shapes; returns how many."""
    found = [n for n in map(_match, list(model.graph)) if n is not None]
    for norm in found:
        _rewrite(model.graph, norm)
    return len(found)


def _match(product: Any) -> _Norm | None:
    """The norm that ends in a Mul with Reciprocal(Sqrt(Reduce(Pow(x, 2)) + eps))."""
    if product.op_type != "Mul" or product.outputs[0].is_graph_output():
        return None
    for x, inverse in (product.inputs, product.inputs[::-1]):
        reciprocal = producer(inverse, "Reciprocal")
        root = producer(reciprocal.inputs[0], "Sqrt") if reciprocal else None
        add = producer(root.inputs[0], "Add") if root else None
        if root is None or add is None:
            continue
        reduce = producer(add.inputs[0], "ReduceMean") or producer(add.inputs[0], "ReduceSum")
        power = producer(reduce.inputs[0], "Pow") if reduce else None
        eps, channels = constant(add.inputs[1]), None if x.shape is None else x.shape[-1]
        if power is None or power.inputs[0] is not x or eps is None or eps.size != 1 or not isinstance(channels, int):
            continue
        axes, exponent = constant(reduce.inputs[1]), constant(power.inputs[1])
        last = axes is not None and axes.tolist() in ([-1], [len(x.shape) - 1])
        kept = "keepdims" not in reduce.attributes or reduce.attributes["keepdims"].as_int() == 1
        if last and kept and exponent is not None and exponent.size == 1 and exponent.item() == 2:
            return _Norm(product, x, reduce.inputs[0], reduce, root.outputs[0], float(eps.item()), channels)
    return None


def _rewrite(graph: Any, norm: _Norm) -> None:
    import onnx_ir as ir

    new: list[Any] = []

    def add(op_type: str, *inputs: Any, like: Any, attributes: dict[str, Any] | None = None) -> Any:
        node = ir.node(op_type, list(inputs), attributes=attributes or {})
        out = node.outputs[0]
        out.name, out.shape, out.type = f"{norm.product.outputs[0].name}_{len(new)}", like.shape, like.type
        new.append(node)
        return out

    root, summed = norm.root, norm.reduce.op_type == "ReduceSum"
    mean = norm.reduce.outputs[0]
    scale = norm.channels**-0.5 if summed else 1.0
    if summed:
        axes = norm.reduce.inputs[1]
        share = add("ReduceMean", norm.square, axes, like=mean, attributes={"keepdims": 1})
        eps = _vector(graph, np.array(norm.eps / norm.channels, np.float32), norm.x)
        root = add("Sqrt", add("Add", share, eps, like=mean), like=mean)
    result = norm.product.outputs[0]
    out = add("Div", norm.x, root, like=result)
    if summed or not _is_scaled(result):
        out = add("Mul", out, _vector(graph, np.full(norm.channels, scale, np.float32), norm.x), like=result)
    graph.insert_before(norm.product, new)
    ir.convenience.replace_all_uses_with(result, out)
    dead = [norm.product, *(i.producer() for i in norm.product.inputs if producer(i, "Reciprocal"))]
    if summed:
        dead += [norm.root.producer(), norm.root.producer().inputs[0].producer(), norm.reduce]
    for node in dead:
        if not any(v.uses() for v in node.outputs):
            graph.remove(node, safe=True)


def _is_scaled(value: Any) -> bool:
    """Whether the only use is a product with a vector, which the runtime takes into the norm."""
    uses = value.uses()
    if len(uses) != 1 or uses[0].node.op_type != "Mul":
        return False
    other = uses[0].node.inputs[1 - uses[0].idx]
    return other.is_initializer() and other.shape is not None and len(other.shape) == 1


def _vector(graph: Any, array: Any, like: Any) -> Any:
    """A constant by value: the same one once."""
    import onnx_ir as ir

    name = f"norm.{array.ndim and len(array)}.{array.flat[0]:.9g}"
    if name not in graph.initializers:
        tensor = ir.tensor(array.astype(like.dtype.numpy()), name=name)
        graph.register_initializer(
            ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        )
    return graph.initializers[name]
