"""Rotary positions of an exported graph as one operator, com.microsoft RotaryEmbedding, for each rotated value.

Kept layers rotate inside their attention; this is for the queries and keys of converted layers, which torch.onnx
writes as x cos + [-x2, x1] sin with x = [x1, x2]: seven operators. The operator takes tables [N, D / 2] and rows of
them. Its tables here are the graph's own cos and sin [B, T, D] of this very call, whose halves are equal, and its rows
are numbered 0 to B T - 1: so positions are the graph's, whatever they are, and no context length is built in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .onnx_graph import constant, producer

OP_TYPE, DOMAIN = "RotaryEmbedding", "com.microsoft"


@dataclass(frozen=True)
class _Rotation:
    """total = x cos + turned sin, x [B, H, T, D]."""

    total: Any  # node
    x: Any  # value
    cos: Any  # value [B, 1, T, D]
    sin: Any


def fuse_rotary(model: Any) -> int:
    """Rewrites every rotation in the half-split spelling, of a model whose values still have shapes; returns how many.

    Other spellings (interleaved, partial, tables with unequal halves) stay as they are.
    """
    found = [r for r in map(_match, list(model.graph)) if r is not None]
    tables: dict[tuple[Any, Any], tuple[Any, Any, Any]] = {}
    for r in found:
        key = (r.cos, r.sin)
        if key not in tables:
            tables[key] = _tables(model.graph, r)
        _rewrite(model.graph, r, *tables[key])
    if found:
        model.opset_imports.setdefault(DOMAIN, 1)
    return len(found)


def _match(total: Any) -> _Rotation | None:
    products = [producer(i, "Mul") for i in total.inputs] if total.op_type == "Add" else []
    if len(products) != 2 or None in products or total.outputs[0].is_graph_output():
        return None
    for plain, turned in (products, products[::-1]):
        for a, b in ((0, 1), (1, 0)):
            for c, d in ((0, 1), (1, 0)):
                x, cos, joined, sin = plain.inputs[a], plain.inputs[b], turned.inputs[c], turned.inputs[d]
                if _is_turned(joined, x) and _is_table(cos, x) and _is_table(sin, x):
                    return _Rotation(total, x, cos, sin)
    return None


def _is_turned(joined: Any, x: Any) -> bool:
    """Whether joined is [-x2, x1]."""
    concat = producer(joined, "Concat")
    if concat is None or len(concat.inputs) != 2 or x.shape is None or len(x.shape) != 4:
        return False
    width = x.shape[3]
    if not isinstance(width, int) or width % 2 or concat.attributes["axis"].as_int() not in (-1, 3):
        return False
    negative = producer(concat.inputs[0], "Neg")
    upper = _part(negative.inputs[0], x) if negative else None
    lower = _part(concat.inputs[1], x)
    return (lower, upper) == ((0, width // 2), (width // 2, width))


def _part(value: Any, x: Any) -> tuple[int, int] | None:
    """The channels of x that a slice or a split along its last axis takes."""
    halves = producer(value, "Split")
    if halves is not None and halves.inputs[0] is x and len(halves.outputs) == 2:
        axis, first = halves.attributes.get("axis"), halves.outputs[0].shape
        if axis is None or axis.as_int() not in (-1, 3) or first is None:
            return None
        return (0, first[3]) if value is halves.outputs[0] else (first[3], x.shape[3])
    node = producer(value, "Slice")
    if node is None or node.inputs[0] is not x:
        return None
    bounds = [constant(i) for i in node.inputs[1:]]
    if len(bounds) < 3 or any(b is None or b.size != 1 for b in bounds) or bounds[2].item() not in (-1, 3):
        return None
    if len(bounds) == 4 and bounds[3].item() != 1:
        return None
    return int(bounds[0].item()), min(int(bounds[1].item()), int(x.shape[3]))


def _is_table(value: Any, x: Any) -> bool:
    """Whether it is [B, 1, T, D], the same for all heads of x [B, H, T, D], with equal halves of channels."""
    if value.shape is None or len(value.shape) != 4 or value.shape[1] != 1:
        return False
    return all(value.shape[i] == x.shape[i] for i in (0, 2, 3)) and _halves_equal(value)


def _halves_equal(value: Any) -> bool:
    node = value.producer()
    if node is None or node.domain:
        return False
    if node.op_type == "Concat":
        return len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
    if node.op_type == "Mul":
        scalars = [c is not None and c.size == 1 for c in map(constant, node.inputs)]
        return any(scalars) and _halves_equal(node.inputs[scalars.index(False)] if False in scalars else node.inputs[0])
    return node.op_type in ("Cos", "Sin", "Unsqueeze", "Cast", "Identity") and _halves_equal(node.inputs[0])


def _ints(graph: Any, *numbers: int) -> Any:
    """A constant vector: the same one once."""
    import numpy as np
    import onnx_ir as ir

    name = f"rotary.{'.'.join(map(str, numbers))}"
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(numbers, np.int64), name=name)
        kind = ir.TensorType(tensor.dtype)
        graph.register_initializer(ir.Value(name=name, shape=ir.Shape([len(numbers)]), type=kind, const_value=tensor))
    return graph.initializers[name]


def _tables(graph: Any, r: _Rotation) -> tuple[Any, Any, Any]:
    """cos and sin [B T, D / 2] and row numbers [B, T], behind both tables."""
    import onnx_ir as ir

    half = int(r.x.shape[3]) // 2
    count = len([n for n in graph if n.op_type == OP_TYPE])
    new: list[Any] = []

    def add(op_type: str, *inputs: Any, name: str, kind: Any, attributes: dict[str, Any] | None = None) -> Any:
        node = ir.node(op_type, list(inputs), attributes=attributes or {})
        node.outputs[0].name, node.outputs[0].type = f"rotary_{count}_{name}", ir.TensorType(kind)
        new.append(node)
        return node.outputs[0]

    flat = []
    for part, table in (("cos", r.cos), ("sin", r.sin)):
        bounds = (_ints(graph, 0), _ints(graph, half), _ints(graph, 3))
        left = add("Slice", table, *bounds, name=f"{part}_half", kind=table.dtype)
        flat.append(add("Reshape", left, _ints(graph, -1, half), name=part, kind=table.dtype))
    shape = add("Shape", r.cos, name="shape", kind=ir.DataType.INT64)
    sizes = add("Gather", shape, _ints(graph, 0, 2), name="sizes", kind=ir.DataType.INT64, attributes={"axis": 0})
    ones = add("Expand", _ints(graph, 1), sizes, name="ones", kind=ir.DataType.INT64)
    flat_ones = add("Reshape", ones, _ints(graph, -1), name="flat_ones", kind=ir.DataType.INT64)
    sums = add("CumSum", flat_ones, _ints(graph, 0), name="sums", kind=ir.DataType.INT64)
    numbers = add("Sub", sums, _ints(graph, 1), name="numbers", kind=ir.DataType.INT64)
    rows = add("Reshape", numbers, sizes, name="rows", kind=ir.DataType.INT64)
    order = {n: i for i, n in enumerate(graph)}
    graph.insert_after(max((t.producer() for t in (r.cos, r.sin)), key=order.__getitem__), new)
    return flat[0], flat[1], rows


def _packed(x: Any) -> Any:
    """The node that splits [B, T, H D] into the heads of x, where x is only the transpose of that; else None."""
    turn = producer(x, "Transpose")
    if turn is None or list(turn.attributes["perm"].as_ints()) != [0, 2, 1, 3]:
        return None
    split = producer(turn.inputs[0], "Reshape")
    return (
        split if split is not None and split.inputs[0].shape is not None and len(split.inputs[0].shape) == 3 else None
    )


def _rewrite(graph: Any, r: _Rotation, cos: Any, sin: Any, rows: Any) -> None:
    """The operator takes [B, T, H D] too: so no transposition stands between it and the projection."""
    import onnx_ir as ir

    split = _packed(r.x)
    first = ir.node(OP_TYPE, [r.x if split is None else split.inputs[0], rows, cos, sin], domain=DOMAIN)
    new = [first]
    if split is not None:
        new.append(ir.node("Reshape", [first.outputs[0], split.inputs[1]], attributes=dict(split.attributes)))
        new.append(ir.node("Transpose", [new[-1].outputs[0]], attributes={"perm": [0, 2, 1, 3]}))
    old = r.total.outputs[0]
    for i, node in enumerate(new):
        node.outputs[0].name, node.outputs[0].type = f"{old.name}_rotated_{i}", old.type
    if split is not None:
        first.outputs[0].shape, new[1].outputs[0].shape = split.inputs[0].shape, split.outputs[0].shape
    new[-1].outputs[0].shape = old.shape
    graph.insert_before(r.total, new)
    ir.convenience.replace_all_uses_with(old, new[-1].outputs[0])
    dead = [r.total]
    while dead:
        n = dead.pop(0)
        if n.graph is None or any(v.uses() or v.is_graph_output() for v in n.outputs):
            continue
        above = [p for i in n.inputs if i is not None and (p := i.producer()) is not None]
        graph.remove(n, safe=True)
        dead += above
