"""Complex numbers become pairs of reals on a new last axis: ONNX has no operators for them."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, GraphModule, Node

from tcal_compiler.errors import UnsupportedModelError

from .graph import aten, fresh, inputs

_SOURCES = {aten.view_as_complex.default, aten.polar.default}
_SAME = {aten.clone.default, aten.alias.default, aten.to.device, aten.detach.default}
HINT = "a model that writes its rotary embedding with real numbers; the student runs without ONNX as it is"


def without_complex(gm: GraphModule) -> GraphModule:
    """The same function without complex tensors: a + ib is [a, b] on a last axis of size 2. gm itself if it has none.

    Knows what rotary embeddings are written with: polar(r, a) = [r cos a, r sin a], products (a, b) (c, d) =
    [ac - bd, ad + bc] of complex with complex, real or number, unsqueeze, and views as and from reals.

    Raises UnsupportedModelError, which names it, for any other operation on a complex tensor.
    """
    if not any(n.target in _SOURCES for n in gm.graph.nodes):
        return gm
    graph = Graph()
    mapped: dict[Node, Node] = {}
    pairs: set[Node] = set()  # nodes of gm that are complex there
    for n in gm.graph.nodes:
        if n.target in _SOURCES or any(i in pairs for i in inputs(n)):
            mapped[n] = _lowered(graph, n, mapped, pairs)
            if n.target is not aten.view_as_real.default:
                pairs.add(n)
        else:
            mapped[n] = graph.node_copy(n, mapped.__getitem__)
    return fresh(gm, graph)


def _lowered(graph: Graph, n: Node, mapped: dict[Node, Node], pairs: set[Node]) -> Node:
    def call(target: Any, *args: Any) -> Node:
        return graph.call_function(target, args)

    def part(pair: Node, i: int) -> Node:
        return call(aten.select.int, pair, -1, i)

    def pair(real: Node, imaginary: Node) -> Node:
        return call(aten.stack.default, [real, imaginary], -1)

    args: list[Any] = [mapped[a] if isinstance(a, Node) else a for a in n.args]
    if n.target in (aten.view_as_complex.default, aten.view_as_real.default) or n.target in _SAME:
        return args[0]
    if n.target is aten.polar.default:
        radius, angle = args
        return pair(*(call(aten.mul.Tensor, radius, call(f, angle)) for f in (aten.cos.default, aten.sin.default)))
    if n.target is aten.unsqueeze.default:
        return call(aten.unsqueeze.default, args[0], args[1] if args[1] >= 0 else args[1] - 1)
    if n.target is aten.mul.Tensor:
        return _product(call, part, pair, n.args, args, pairs)
    what = f"computes with complex numbers ({n.target}, {n.name}), for which ONNX has no operators"
    raise UnsupportedModelError("ONNX export", what, HINT)


def _product(call: Any, part: Any, pair: Any, old: tuple[Any, ...], new: list[Any], pairs: set[Node]) -> Node:
    """Of two complex tensors, or of one and a real tensor or number on either side."""
    complex_sides = [a for a, o in zip(new, old, strict=True) if o in pairs]
    if len(complex_sides) == 1:
        (other,) = (a for a, o in zip(new, old, strict=True) if o not in pairs)
        other = call(aten.unsqueeze.default, other, -1) if isinstance(other, Node) else other
        return call(aten.mul.Tensor, complex_sides[0], other)
    (a, b), (c, d) = ((part(z, 0), part(z, 1)) for z in complex_sides)

    def times(x: Node, y: Node) -> Node:
        return call(aten.mul.Tensor, x, y)

    real = call(aten.sub.Tensor, times(a, c), times(b, d))
    return pair(real, call(aten.add.Tensor, times(a, d), times(b, c)))
