"""The student's graph with its state as input and output: prefill and decode are one graph.

Every softmax core gets a key and a value cache, every gated delta rule its recurrent state. The slots of a cache are
counted from 0 over all tokens seen, padding included; positions count real tokens only.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

import tcal_compiler.kernels.gated_delta_rule  # noqa: F401  registers the op that converted sites are made of
from tcal_compiler.errors import UnsupportedModelError

from .find_attention import find_attention
from .graph import argument, aten, by_name, fresh, placeholders, taint, value, widen_to_float64
from .positions import TokenAxes, promote_positions, token_free
from .to_sdpa import to_sdpa
from .types import AttentionSite, Capture, Check

RULE = torch.ops.tcal.gated_delta_rule.default
_ALL = 9223372036854775807  # "to the end" of a slice


@dataclass(frozen=True)
class LayerState:
    """What one attention core carries from token to token.

    softmax: key [B, K, P, Dk] and value [B, K, P, Dv]. gdn: recurrent_state [B, H, Dk, Dv].
    window: visible tokens including oneself, None for all.
    """

    index: int
    kind: Literal["softmax", "gdn"]
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        return ("key", "value") if self.kind == "softmax" else ("recurrent_state",)

    def shape(self, part: str, *, batch: int, past: int = 0) -> tuple[int, int, int, int]:
        if part == "recurrent_state":
            return batch, self.num_heads, self.key_dim, self.value_dim
        return batch, self.num_kv_heads, past, self.key_dim if part == "key" else self.value_dim


@dataclass(frozen=True)
class StatefulGraph:
    """gm(input_ids [B, T], attention_mask [B, P + T], *past) -> (logits [B, T, V], *present), all int64 or float.

    past and present are, layer by layer, the parts of `layers`. attention_mask is 1 for tokens and 0 for padding, over
    all P + T slots; padding leaves recurrent states exactly as they were and is never attended to.
    """

    gm: GraphModule
    layers: tuple[LayerState, ...]
    vocab_size: int
    checks: tuple[Check, ...] = ()

    @property
    def state_names(self) -> tuple[str, ...]:
        return tuple(f"{layer.index}.{part}" for layer in self.layers for part in layer.parts)

    @property
    def input_names(self) -> tuple[str, ...]:
        return ("input_ids", "attention_mask", *(f"past_key_values.{n}" for n in self.state_names))

    @property
    def output_names(self) -> tuple[str, ...]:
        return ("logits", *(f"present.{n}" for n in self.state_names))

    def empty_state(self, batch: int, *, past: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """The state before the first token; past > 0 gives caches of that many zero slots, for tracing."""
        shapes = [layer.shape(part, batch=batch, past=past) for layer in self.layers for part in layer.parts]
        return tuple(torch.zeros(s, dtype=dtype) for s in shapes)


def make_stateful(capture: Capture, *, verify: bool = True) -> StatefulGraph:
    """The stateful form of a student's (or a teacher's) graph. Parameters are shared with the capture.

    verify: compare it in float64, cut into chunks, with the whole-sequence graph (needs a float64 copy of the weights).

    Raises UnsupportedModelError when a core cannot carry a state, when positions cannot be followed, or when chunks
    differ from one pass: then something else than the attention cores reads across time.
    """
    scan = find_attention(capture)
    plain = to_sdpa(capture)[0].gm
    if scan.rejected:
        reasons = "; ".join(f"{r.layer or r.node}: {r.reason}" for r in scan.rejected[:4])
        raise UnsupportedModelError("student", f"{len(scan.rejected)} attention cores cannot carry a state ({reasons})")
    sites = {s.anchor: s for s in scan.sites}
    gm, layers = _add_state(plain, sites)
    stateful = StatefulGraph(gm, layers, capture.vocab_size)
    if not verify:
        return stateful
    whole = widen_to_float64(capture.gm)
    wide = StatefulGraph(_add_state(widen_to_float64(plain), sites)[0], layers, capture.vocab_size)
    checks = check_chunks(wide, whole, capture)
    if bad := [c for c in checks if not c.passed]:
        what = f"{bad[0].name}: {bad[0].measured:.3g} (allowed {bad[0].allowed:.3g}), in float64"
        raise UnsupportedModelError("student", what, "only attention cores may read across time")
    return StatefulGraph(gm, layers, capture.vocab_size, checks)


def run_chunks(
    stateful: StatefulGraph, ids: Tensor, chunks: tuple[int, ...], *, mask: Tensor | None = None, dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits [B, T, V] of ids [B, T] fed in chunks, and the state after them. dtype: of the states."""
    mask = torch.ones_like(ids) if mask is None else mask
    state, logits, start = stateful.empty_state(len(ids), dtype=dtype), [], 0
    with torch.no_grad():
        for size in chunks:
            part = ids[:, start : start + size].clone()
            out, *present = stateful.gm(part, mask[:, : start + size].clone(), *state)
            logits.append(out)
            state, start = tuple(present), start + size
    return torch.cat(logits, 1), state


def check_chunks(stateful: StatefulGraph, whole: GraphModule, capture: Capture) -> tuple[Check, ...]:
    """Chunked against whole-sequence logits, both graphs in float64, relative to the largest logit."""
    longest = max((layer.window or 0 for layer in stateful.layers), default=0)
    tokens = min(longest + 3, 600) if longest else 24
    gen = torch.Generator().manual_seed(0)
    ids = torch.randint(0, capture.vocab_size, (2, max(tokens, 24)), generator=gen)
    with torch.no_grad():
        exact = whole(*capture.inputs(ids))
    checks = []
    for chunks in ((ids.shape[1] - 2, 1, 1), (1, 3, 17, ids.shape[1] - 21)):
        logits, _ = run_chunks(stateful, ids, chunks, dtype=torch.float64)
        error = ((logits - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()
        checks.append(Check(f"chunks of {chunks} equal one pass", error, 1e-7))
    return tuple(checks)


@dataclass
class _Shared:
    """Nodes that all cores of one stateful graph use."""

    mask: Node
    valid: Node
    axes: TokenAxes
    all_positions: Node
    key_slot: Node
    query_slot: Node
    visible: dict[int | None, Node]


def _cores(gm: GraphModule) -> list[Node]:
    data = taint(gm.graph.nodes, placeholders(gm)[:1])
    kinds = (aten.scaled_dot_product_attention.default, RULE)
    return [n for n in gm.graph.nodes if n.op == "call_function" and n.target in kinds and n in data]


def _layer(index: int, core: Node, sites: dict[str, AttentionSite]) -> LayerState:
    if core.target is RULE:
        if argument(core, "initial_state").target is not aten.new_zeros.default:
            raise UnsupportedModelError(core.name, "its state does not start from zeros: the graph is stateful already")
        _, heads, key_dim, value_dim = value(argument(core, "initial_state")).shape
        return LayerState(index, "gdn", heads, int(value(argument(core, "k")).shape[2]), key_dim, value_dim)
    s = sites[core.name]
    return LayerState(index, "softmax", s.num_heads, s.num_kv_heads, s.key_dim, s.value_dim, s.window)


def _add_state(source: GraphModule, sites: dict[str, AttentionSite]) -> tuple[GraphModule, tuple[LayerState, ...]]:
    """The surgery, on a copy of the graph."""
    cores = _cores(source)
    if not cores:
        raise UnsupportedModelError("student", "has no attention core and no gated delta rule: no state to carry")
    layers = tuple(_layer(i, c, sites) for i, c in enumerate(cores))
    graph = Graph()
    old: dict[Node, Node] = {}
    logits = graph.graph_copy(source.graph, old)
    ins = [old[n] for n in placeholders(source)]
    batch_symbol, length_symbol = (str(d) for d in value(ins[0]).shape)
    free = token_free(graph.nodes, ins, length_symbol)
    mask, past = _state_inputs(graph, ins[-1], layers)
    shared = _shared_nodes(graph, ins[0], mask, past, layers, symbols=(batch_symbol, length_symbol))
    if len(ins) > 1:
        ins[1].replace_all_uses_with(shared.axes.positions)
    present: list[Node] = []
    for layer, core in zip(layers, cores, strict=True):
        with graph.inserting_before(old[core]):
            if layer.kind == "gdn":
                present.append(_carry_rule(graph, old[core], past[f"{layer.index}.recurrent_state"], shared.valid))
            else:
                names = by_name(source)
                site = sites[core.name]
                nodes = tuple(old[names[n]] for n in (site.q, site.k, site.v))
                kv = tuple(past[f"{layer.index}.{part}"] for part in layer.parts)
                present += _carry_attention(graph, old[core], nodes, kv, layer, shared)
    graph.output((logits, *present))
    for unused in ins[1:]:
        graph.erase_node(unused)
    promote_positions(graph, free, shared.axes)
    return fresh(source, graph), layers


def _state_inputs(graph: Graph, after: Node, layers: tuple[LayerState, ...]) -> tuple[Node, dict[str, Node]]:
    """Placeholders of the mask and of every state, behind the node `after`."""
    past: dict[str, Node] = {}
    with graph.inserting_after(after):
        last = mask = graph.placeholder("attention_mask")
    for layer in layers:
        for part in layer.parts:
            with graph.inserting_after(last):
                last = graph.placeholder(f"past_{layer.index}_{part.removeprefix('recurrent_')}")
            past[f"{layer.index}.{part}"] = last
    return mask, past


def _shared_nodes(
    graph: Graph, ids: Node, mask: Node, past: dict[str, Node], layers: tuple[LayerState, ...], symbols: tuple[str, str]
) -> _Shared:
    """Sizes, positions and slots, computed once, right behind the placeholders."""
    last = list(past.values())[-1]
    device = {"device": value(ids).device}

    def call(target: Any, *args: Any, **kwargs: Any) -> Node:
        return graph.call_function(target, args, kwargs)

    with graph.inserting_before(last.next):
        batch, length = call(aten.sym_size.int, ids, 0), call(aten.sym_size.int, ids, 1)
        total = call(aten.sym_size.int, mask, 1)
        key = next((past[f"{layer.index}.key"] for layer in layers if layer.kind == "softmax"), None)
        # one source for the past length, so that re-export sees one symbol: a cache where there is one
        start = call(aten.sym_size.int, key, 2) if key is not None else call(operator.sub, total, length)
        count = call(aten.cumsum.default, mask, 1)
        all_positions = call(aten.clamp.default, call(aten.sub.Tensor, count, 1), 0)
        positions = call(aten.slice.Tensor, all_positions, 1, start, _ALL)
        valid = call(aten.ne.Scalar, call(aten.slice.Tensor, mask, 1, start, _ALL), 0)
        key_slot = call(aten.arange.default, total, **device)
        query_slot = call(aten.unsqueeze.default, call(aten.slice.Tensor, key_slot, 0, start, _ALL), 1)
    axes = TokenAxes(positions, batch, length, *symbols)
    return _Shared(mask, valid, axes, all_positions, key_slot, query_slot, {})


def _visible(graph: Graph, window: int | None, shared: _Shared) -> Node:
    """Boolean mask [B, 1, T, P + T]: earlier real tokens of the window, and always oneself.

    Oneself also on padding: a row without any visible key would be NaN, and NaN times 0 would enter the states.
    """
    if window in shared.visible:
        return shared.visible[window]

    def call(target: Any, *args: Any) -> Node:
        return graph.call_function(target, args)

    def rows(n: Node, first: int, second: int) -> Node:
        return call(aten.unsqueeze.default, call(aten.unsqueeze.default, n, first), second)

    real = call(aten.ne.Scalar, rows(shared.mask, 1, 1), 0)
    seen = call(aten.logical_and.default, call(aten.le.Tensor, shared.key_slot, shared.query_slot), real)
    if window is not None:
        distance = call(aten.sub.Tensor, rows(shared.axes.positions, 1, 3), rows(shared.all_positions, 1, 1))
        seen = call(aten.logical_and.default, seen, call(aten.lt.Scalar, distance, window))
    oneself = call(aten.eq.Tensor, shared.key_slot, shared.query_slot)
    shared.visible[window] = call(aten.logical_or.default, seen, oneself)
    return shared.visible[window]


def _carry_attention(
    graph: Graph, core: Node, qkv: tuple[Node, ...], past: tuple[Node, ...], layer: LayerState, shared: _Shared
) -> list[Node]:
    """Attention over the cache and the new tokens, in place of `core`; returns the new caches."""
    q, k, v = qkv
    cache = [graph.call_function(aten.cat.default, ([old, new], 2)) for old, new in zip(past, (k, v), strict=True)]
    options: dict[str, Any] = {"enable_gqa": True} if layer.num_heads != layer.num_kv_heads else {}
    if (scale := argument(core, "scale")) is not None:
        options["scale"] = scale
    args: tuple[Any, ...] = (q, *cache, _visible(graph, layer.window, shared), 0.0, False)
    new = graph.call_function(aten.scaled_dot_product_attention.default, args, options)
    new.meta = dict(core.meta)
    core.replace_all_uses_with(new)
    graph.erase_node(core)
    return cache


def _carry_rule(graph: Graph, core: Node, past: Node, valid: Node) -> Node:
    """The recurrence from the given state; padding neither decays (g = 0) nor writes (beta = 0)."""
    padding = graph.call_function(aten.unsqueeze.default, (graph.call_function(aten.logical_not.default, (valid,)), -1))
    q, k, v, g, beta, _, scale = (argument(core, a.name) for a in RULE._schema.arguments)
    g, beta = (graph.call_function(aten.masked_fill.Scalar, (gate, padding, 0.0)) for gate in (g, beta))
    core.args, core.kwargs = (q, k, v, g, beta, past, scale), {}
    with graph.inserting_after(core):
        return graph.call_function(operator.getitem, (core, 1))


def export_stateful(stateful: StatefulGraph) -> torch.export.ExportedProgram:
    """The stateful graph as a program; batch, sequence and past_sequence are shared dimensions of its inputs."""
    dim = torch.export.Dim
    batch, sequence, past = dim("batch"), dim("sequence"), dim("past_sequence")
    gen = torch.Generator().manual_seed(0)
    ids = torch.randint(0, stateful.vocab_size, (2, 3), generator=gen)
    args = (ids, torch.ones(2, 8, dtype=torch.int64), *stateful.empty_state(2, past=5, dtype=_state_dtype(stateful)))
    shapes: list[dict[int, Any]] = [{0: batch, 1: sequence}, {0: batch, 1: dim.DYNAMIC}]
    shapes += [{0: batch, 2: past} if "state" not in n else {0: batch} for n in stateful.state_names]
    with torch.no_grad():
        return torch.export.export(stateful.gm, args, dynamic_shapes=(tuple(shapes)), strict=False)


def _state_dtype(stateful: StatefulGraph) -> torch.dtype:
    return next(p.dtype for p in stateful.gm.parameters() if p.is_floating_point())
