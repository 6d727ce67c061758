"""Moves padding behind the real tokens of its chunk, as graph nodes: then a token's slot is its position.

B batch, T new tokens, P tokens fed before, padding included in both.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from .graph import aten, value
from .positions import TokenAxes

_ALL = 9223372036854775807  # "to the end" of a slice


@dataclass(frozen=True)
class Packing:
    """Nodes of a stateful graph.

    valid [B, T] bool: packed tokens that are real. past_lengths, new_lengths [B]: real tokens fed before, and now.
    past_tokens: P. total: P + T.
    ids: the graph's input. place [B, T]: where each token went. axes: positions and sizes.
    """

    ids: Node
    valid: Node
    past_lengths: Node
    new_lengths: Node
    past_tokens: Node
    total: Node
    place: Node
    axes: TokenAxes


def pack_tokens(graph: Graph, ids: Node, mask: Node, before: Node, symbols: tuple[str, str]) -> Packing:
    """Inserts the packing before a node, and makes every use of ids [B, T] read the packed ones.

    mask [B, P + T]: 0 for padding. Real tokens keep their order; padding follows, at the position of the last one.
    """
    device = {"device": value(ids).device}

    def call(target: Any, *args: Any, **kwargs: Any) -> Node:
        return graph.call_function(target, args, kwargs)

    with graph.inserting_before(before):
        batch, length = call(aten.sym_size.int, ids, 0), call(aten.sym_size.int, ids, 1)
        total = call(aten.sym_size.int, mask, 1)
        start = call(operator.sub, total, length)
        real = call(aten.ne.Scalar, mask, 0)
        new = call(aten.slice.Tensor, real, 1, start, _ALL)
        real_until, padding_until = (
            call(aten.cumsum.default, new, 1),
            call(aten.cumsum.default, call(aten.logical_not.default, new), 1),
        )
        count = call(aten.sum.dim_IntList, new, [1], True)
        new_lengths = call(aten.squeeze.dim, count, 1)
        # not the sum over what is past: ONNX Runtime's CUDA kernel refuses a sum over no columns
        past_lengths = call(aten.sub.Tensor, call(aten.sum.dim_IntList, real, [1]), new_lengths)
        place = call(aten.where.self, new, real_until, call(aten.add.Tensor, padding_until, count))
        place = call(aten.sub.Tensor, place, 1)
        step = call(aten.unsqueeze.default, call(aten.arange.default, length, **device), 0)
        packed = call(aten.scatter.src, call(aten.zeros_like.default, ids), 1, place, ids)
        packed.meta = dict(ids.meta)
        valid = call(aten.lt.Tensor, step, count)
        last = call(aten.clamp.default, call(aten.sub.Tensor, count, 1), 0)
        offset = call(aten.minimum.default, step, last)
        positions = call(aten.add.Tensor, call(aten.unsqueeze.default, past_lengths, 1), offset)
    inside = {packed, *packed.all_input_nodes, length, batch}
    ids.replace_all_uses_with(packed, delete_user_cb=lambda user: user not in inside)
    axes = TokenAxes(positions, batch, length, *symbols)
    return Packing(ids, valid, past_lengths, new_lengths, start, total, place, axes)


def unpack_logits(graph: Graph, logits: Node, packing: Packing) -> Node:
    """logits [B, T, V] of packed tokens in the order that the tokens came in."""
    batch, length = packing.axes.batch, packing.axes.length

    def call(target: Any, *args: Any) -> Node:
        return graph.call_function(target, args)

    first = call(
        aten.mul.Tensor,
        graph.call_function(aten.arange.default, (batch,), {"device": value(packing.ids).device}),
        length,
    )
    rows = call(
        aten.reshape.default, call(aten.add.Tensor, packing.place, call(aten.unsqueeze.default, first, 1)), [-1]
    )
    flat = call(aten.reshape.default, logits, [-1, int(value(logits).shape[-1])])
    moved = call(aten.index_select.default, flat, 0, rows)
    return call(aten.reshape.default, moved, [batch, length, int(value(logits).shape[-1])])
