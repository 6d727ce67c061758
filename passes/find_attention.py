"""Every softmax attention core of a captured teacher becomes a site or a rejection with its reason.

A site is cut at its core: q, k, v as softmax attention receives them, and its output. Source of the method: dominators
on the token-dependent part of the graph (networkx.immediate_dominators); masks are read by evaluation (masks.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import networkx as nx
import torch
from torch.fx import GraphModule, Node

from .graph import (
    LAYOUT,
    LINEAR,
    argument,
    aten,
    backward_slice,
    by_name,
    get_tensor,
    inputs,
    module_path,
    placeholders,
    taint,
    value,
)
from .masks import Evaluator, MaskFacts, probe_mask
from .opaque import hides_attention
from .softmax_attention import ANCHORS, sinks_of
from .to_sdpa import sdpa_name, to_sdpa
from .types import AttentionSite, Capture, Rejection, SiteScan
from .written_attention import SOFTMAX, Unfit, pairs_without_softmax, reaches_softmax_over_tokens, token_graph


@dataclass
class _Tokens:
    """The token-dependent part of a graph."""

    capture: Capture
    source: Node
    data: set[Node]
    position: set[Node]
    graph: nx.DiGraph
    idom: dict[Node, Node]
    readers: dict[int, list[tuple[str, Node]]]
    masks: dict[Node, MaskFacts] = field(default_factory=dict)

    def dominators(self, node: Node) -> list[Node]:
        """From the node itself up to the token ids."""
        chain = [node]
        while chain[-1] is not self.source and chain[-1] in self.idom and self.idom[chain[-1]] is not chain[-1]:
            chain.append(self.idom[chain[-1]])
        return chain

    def users(self, node: Node) -> list[Node]:
        return [u for u in node.users if u in self.data]

    def is_hidden(self, node: Node) -> bool:
        """[batch, tokens, width], in this order."""
        dims = list(getattr(value(node), "shape", ()))
        return len(dims) == 3 and [*map(str, dims[:2])] == [*map(str, value(self.source).shape)]

    def mask_facts(self, mask: Node) -> MaskFacts:
        """What the mask means; layers that share it ask once."""
        if mask not in self.masks:
            self.masks[mask] = probe_mask(self.capture, mask)
        return self.masks[mask]

    def is_linear(self, node: Node) -> bool:
        """A product with a constant 2-D weight."""
        if node.op != "call_function" or node.target not in LINEAR:
            return False
        const = [i for i in inputs(node) if i not in self.data]
        return any(getattr(value(i), "ndim", 0) == 2 for i in const) and len(set(inputs(node)) & self.data) == 1


def _token_part(capture: Capture) -> _Tokens:
    gm = capture.gm
    ins = placeholders(gm)
    data = taint(gm.graph.nodes, ins[:1])
    aranges = [
        n for n in gm.graph.nodes if n.target in (aten.arange.default, aten.arange.start, aten.arange.start_step)
    ]
    position = taint(gm.graph.nodes, [*ins[1:], *aranges]) - data
    tables = [
        n for n in gm.graph.nodes if n.target is aten.slice.Tensor and n not in data and len(n.all_input_nodes) > 1
    ]
    position |= set(tables)
    graph = nx.DiGraph()
    graph.add_node(ins[0])
    graph.add_edges_from((i, n) for n in gm.graph.nodes if n in data for i in inputs(n) if i in data)
    idom = dict(nx.immediate_dominators(graph, ins[0]))
    idom.pop(ins[0], None)
    return _Tokens(capture, ins[0], data, position, graph, idom, _readers(gm))


def _above_expand(node: Node) -> Node:
    """The 4-D tensor whose heads repeat_interleave or unsqueeze, expand, reshape may repeat; else the node itself."""
    allowed = LAYOUT | {aten.slice.Tensor, aten.unsqueeze.default, aten.unflatten.int}
    c = node
    for _ in range(8):
        if c.target is aten.repeat_interleave.self_int:
            return c.args[0] if value(c.args[0]).ndim == 4 else node  # type: ignore[return-value,arg-type]
        if c.target is aten.expand.default:
            c = c.args[0]  # type: ignore[assignment]
            while c.target in (aten.slice.Tensor, aten.unsqueeze.default):
                c = c.args[0]  # type: ignore[assignment]
            return c if value(c).ndim == 4 else node
        if c.target not in allowed or not c.args:
            return node
        c = c.args[0]  # type: ignore[assignment]
    return node


def _before_repeat(t: _Tokens, node: Node) -> Node:
    """K or V before whole heads are repeated for the query heads that share them; else the node itself."""
    before = _above_expand(node)
    if before is node:
        return node
    few, many = value(before).shape, value(node).shape
    if not (isinstance(few[1], int) and isinstance(many[1], int)) or [*map(str, few[2:])] != [*map(str, many[2:])]:
        return node
    probe = torch.randn(1, few[1], 5, int(few[3]), generator=torch.Generator().manual_seed(0)).to(value(before).dtype)
    repeated = Evaluator(t.capture, 5, {before: probe})(node)
    same = many[1] % few[1] == 0 and torch.equal(repeated, probe.repeat_interleave(many[1] // few[1], 1))
    return before if same else node  # another order of heads, such as 0 1 0 1


def _common_source(t: _Tokens, q: Node, k: Node, v: Node) -> Node:
    """The hidden state that q, k and v come from, above a fused projection and above pure layout nodes."""
    of_k, of_v = set(t.dominators(k)), set(t.dominators(v))
    x = next((d for d in t.dominators(q) if d in of_k and d in of_v), None)
    if x is None:
        raise Unfit("q, k and v have no common source")

    top = x

    def projected(n: Node) -> bool:
        return any(t.is_linear(m) for m in backward_slice(n, top, t.data))

    if not (projected(q) and projected(k) and projected(v)):
        fused: Node = x
        while not t.is_linear(fused):
            if fused not in t.idom or t.idom[fused] is fused:
                raise Unfit("no projection between the hidden state and q, k, v")
            fused = t.idom[fused]
        x = t.idom[fused]
    while x.target in LAYOUT and not t.is_hidden(x):
        x = next(i for i in inputs(x) if i in t.data)
    if not t.is_hidden(x):
        raise Unfit(f"its hidden state {x.name} is {list(value(x).shape)}, not batch x tokens x width")
    return x


def _output_projection(t: _Tokens, anchor: Node) -> Node:
    c = anchor
    for _ in range(24):
        users = t.users(c)
        if len(users) != 1:
            raise Unfit(f"the attention output has {len(users)} users before a projection")
        c = users[0]
        if t.is_linear(c):
            break
    else:
        raise Unfit("no output projection follows")
    while not t.is_hidden(c):  # addmm on flattened tokens, then a view; or tokens before the batch
        if len(t.users(c)) != 1 or t.users(c)[0].target not in LAYOUT:
            raise Unfit("the output projection is not batch x tokens x width")
        c = t.users(c)[0]
    return c


def _check_region(t: _Tokens, x: Node, y: Node) -> None:
    """Single entry x, single exit y."""
    region = (nx.descendants(t.graph, x) & nx.ancestors(t.graph, y)) | {y}
    for n in region:
        if outside := [i for i in inputs(n) if i in t.data and i not in region and i is not x]:
            raise Unfit(f"{n.name} also reads {outside[0].name}, which is not computed from {x.name}")
        if n is not y and (leak := [u for u in t.users(n) if u not in region]):
            raise Unfit(f"{n.name} is also used outside the attention block, by {leak[0].name}")
    for readers in t.readers.values():  # alignment gives each site weights of its own, so layers must not share them
        others = [r for r in readers if r[1] not in region]
        if others and len(others) < len(readers):
            raise Unfit(f"its weight {others[0][0]} is also used outside the attention block, by {others[0][1].name}")


def _readers(gm: GraphModule) -> dict[int, list[tuple[str, Node]]]:
    """By id of a parameter: under which name which nodes read it."""
    found: dict[int, list[tuple[str, Node]]] = {}
    for n in gm.graph.nodes:
        if n.op == "get_attr" and isinstance(p := get_tensor(gm, str(n.target)), torch.nn.Parameter):
            found.setdefault(id(p), []).extend((str(n.target), user) for user in n.users)
    return found


def _mask_facts(t: _Tokens, anchor: Node) -> MaskFacts:
    if argument(anchor, "dropout_p", 0.0):
        raise Unfit(f"dropout {argument(anchor, 'dropout_p')} inside attention; export the model in eval mode")
    mask = argument(anchor, "attn_mask")
    if argument(anchor, "is_causal", False):
        return MaskFacts("causal", None, "is_causal")
    if mask is None:
        return MaskFacts("none", None, "is absent")
    if mask in t.data:
        raise Unfit("its mask depends on the token ids")
    return t.mask_facts(mask)


def _site(t: _Tokens, anchor: Node, index: int, *, written: bool) -> AttentionSite:
    q, k, v = (argument(anchor, n) for n in ("query", "key", "value"))
    if any(n not in t.data for n in (q, k, v)):
        raise Unfit("q, k or v does not depend on the tokens (cross attention or a constant memory)")
    facts = _mask_facts(t, anchor)
    if facts.kind != "causal":
        label = {"none": "not causal", "bias": "a position bias on the scores", "other": "not provably causal"}
        raise Unfit(f"{label[facts.kind]}: the mask {facts.detail}")
    k, v = _before_repeat(t, k), _before_repeat(t, v)
    shapes = [tuple(value(n).shape) for n in (q, k, v)]
    if any(len(s) != 4 for s in shapes):
        raise Unfit(f"q, k, v have {[len(s) for s in shapes]} dimensions, want [B, H, T, D]")
    heads, kv_heads = shapes[0][1], shapes[1][1]
    if shapes[2][1] != kv_heads or heads % kv_heads:
        raise Unfit(f"{heads} query heads, {kv_heads} key heads and {shapes[2][1]} value heads do not group")
    tokens = [str(s[2]) for s in shapes]
    if len(set(tokens)) > 1:
        raise Unfit(f"its queries, keys and values are of {', '.join(tokens)} tokens, want as many of each")
    scale = argument(anchor, "scale")
    if isinstance(scale, Node):
        raise Unfit("its scale is computed from the length")
    sinks = sinks_of(t.capture, anchor)
    if facts.slopes and sinks is not None:
        raise Unfit("attention sinks beside a position bias on the scores")
    slopes = facts.slopes * (int(heads) // len(facts.slopes)) if any(facts.slopes) else ()
    x = _common_source(t, q, k, v)
    y = _output_projection(t, anchor)
    _check_region(t, x, y)
    return AttentionSite(
        index=index,
        layer=module_path(anchor),
        anchor=anchor.name,
        q=q.name,
        k=k.name,
        v=v.name,
        x=x.name,
        y=y.name,
        num_heads=int(heads),
        num_kv_heads=int(kv_heads),
        key_dim=int(shapes[0][3]),
        value_dim=int(shapes[2][3]),
        hidden=int(value(x).shape[-1]),
        scale=float(scale) if scale is not None else 1 / math.sqrt(int(shapes[0][3])),
        window=facts.window,
        first=facts.first,
        rope=any(i in t.position for m in backward_slice(q, x, t.data) for i in inputs(m)),
        proof=facts.detail,
        written=anchor.name.removesuffix(sdpa_name("")) if written else "",
        softcap=float(argument(anchor, "softcap", 0.0)),
        slopes=slopes,
        sinks=tuple(sinks.tolist()) if sinks is not None else (),
    )


def find_attention(capture: Capture) -> SiteScan:
    """All attention cores of the teacher: sites and rejections together are all of them.

    Sites are numbered in graph order, rejections keep their number, so that an index is a layer's position.
    """
    teacher = set(by_name(capture.gm))
    capture, refused = to_sdpa(capture)
    reasons = {r.node: r.reason for r in refused}
    t, tokens = _token_part(capture), token_graph(capture.gm)
    sites: list[AttentionSite] = []
    rejected: list[Rejection] = []
    index = 0
    for n in capture.gm.graph.nodes:
        if n.op != "call_function" or n not in t.data:
            continue
        reason = ""
        if n.target in ANCHORS:
            try:
                sites.append(_site(t, n, index, written=n.name not in teacher))
            except Unfit as e:
                reason = str(e)
            index += 1
        elif n.target in SOFTMAX and reaches_softmax_over_tokens(tokens, n):
            reason = reasons[n.name]
            index += 1
        elif pairs_without_softmax(tokens, n):
            reason = "a product of all tokens with all tokens that no softmax follows"
            index += 1
        elif reason := hides_attention(capture, tokens, n):
            index += 1
        if reason:
            rejected.append(Rejection(n.name, module_path(n), reason))
    assert {s.written or s.anchor for s in sites} <= teacher
    return SiteScan(tuple(sites), tuple(rejected))
