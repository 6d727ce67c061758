"""What hides attention from the search: fused kernels, operators of the model's own, parts of a graph set apart."""

from __future__ import annotations

import re
from contextlib import suppress

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .graph import aten, inputs, value
from .masks import Evaluator
from .types import Capture
from .written_attention import SOFTMAX, TokenGraph, concrete

KERNELS = {  # part of an op's name: why its attention is not looked into
    "_scaled_dot_product": "a lowered attention kernel; export without run_decompositions",
    "flex_attention": "flex_attention, whose mask and scores are functions; call scaled_dot_product_attention instead",
    "_native_multi_head_attention": "a fused kernel of PyTorch; export with strict=False",
    "_transformer_encoder_layer_fwd": "a fused kernel of PyTorch; export with strict=False",
}
_KNOWN = {"aten", "prims", "tcal"}
BATCH, LENGTH = 2, 6


def hides_attention(capture: Capture, t: TokenGraph, node: Node) -> str:
    """Why there is attention in a node, or may be, that cannot be looked into; "" where there is none."""
    if found := [why for name, why in KERNELS.items() if name in str(node.target)]:
        return found[0]
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        parts = [getattr(capture.gm, str(i.target), None) for i in inputs(node) if i.op == "get_attr"]
        if any(_has_attention(p) for p in parts if isinstance(p, GraphModule)):
            return f"it is inside of {node.target.name()}, a part of the graph that is not looked into"
    own = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in _KNOWN
    if own and _mixes_tokens(capture, t, node):
        what = f"{node.target}, an operator that mixes tokens and is not looked into"
        return f"{what}; call scaled_dot_product_attention instead"
    return ""


def _has_attention(part: GraphModule) -> bool:
    inner = [m for m in part.modules() if isinstance(m, GraphModule)]
    targets = {n.target for m in inner for n in m.graph.nodes}
    return bool(targets & {*SOFTMAX, aten.scaled_dot_product_attention.default})


def _length_axis(t: TokenGraph, tensor: Tensor) -> int | None:
    axes = [i for i, d in enumerate(tensor.shape) if re.search(rf"\b{t.length}\b", str(d))]
    return axes[0] if axes else None


def _mixes_tokens(capture: Capture, t: TokenGraph, node: Node) -> bool:
    """Whether the outputs of later tokens change with what the first token is given.

    Where that cannot be seen, as with a router's offsets among the arguments: whether two values of all tokens meet.
    """
    axes = {i: _length_axis(t, value(i)) for i in t.tokens(node) if isinstance(value(i), Tensor)}
    rows = {i: axis for i, axis in axes.items() if axis is not None and value(i).is_floating_point()}
    if len(rows) == len(t.tokens(node)):
        with suppress(Exception):  # an operator of the model's own may raise anything
            return _later_tokens_change(capture, t, node, rows)
    return len(rows) > 1


def _later_tokens_change(capture: Capture, t: TokenGraph, node: Node, rows: dict[Node, int]) -> bool:
    before, after = {}, {}
    generator = torch.Generator().manual_seed(0)
    for i, axis in rows.items():
        shape = [concrete(d, {t.batch: BATCH, t.length: LENGTH}) for d in value(i).shape]
        before[i], other = (torch.randn(shape, generator=generator).to(value(i).dtype) for _ in range(2))
        after[i] = before[i].clone()
        after[i].select(axis, 0).copy_(other.select(axis, 0))
    old, new = (Evaluator(capture, LENGTH, known, batch=BATCH)(node) for known in (before, after))
    leaves = (torch.utils._pytree.tree_leaves(x) for x in (value(node), old, new))
    for out, a, b in zip(*leaves, strict=True):
        if isinstance(out, Tensor):
            row = _length_axis(t, out)
            if row is None or not torch.equal(*(x.narrow(row, 1, x.shape[row] - 1) for x in (a, b))):
                return True
    return False
