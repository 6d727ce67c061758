"""The student's graph with its state as input and output: prefill and decode are one graph.

Every softmax core gets a key and a value cache, every gated delta rule its recurrent state. Inside the graph, padding
is moved behind the real tokens of its chunk, and moved back in the logits: so the slot of a token in the caches is its
position, whatever padding came before, and a cache can be one buffer that is written in place. Sites with a sliding
window have a state of a fixed size instead: the keys and values that their window still reaches. So has the attention
over the last tokens beside a recurrent state, with one tensor for both.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

import tcal_compiler.kernels.gated_delta_rule  # noqa: F401  registers an op that the graph is made of
from tcal_compiler.errors import UnsupportedModelError
from tcal_compiler.kernels.cached_attention import held_positions, windowed_attention
from tcal_compiler.kernels.local_attention import window_step
from tcal_compiler.kernels.scores import Scores

from .find_attention import find_attention
from .find_rotary import Rotary, find_rotary
from .graph import (
    argument,
    aten,
    fresh,
    get_tensor,
    module_path,
    placeholders,
    set_tensor,
    taint,
    value,
    widen_to_float64,
)
from .masks import probe_mask
from .pack import pack_tokens, unpack_logits
from .positions import promote_positions, token_free
from .softmax_attention import ANCHORS, sinks_of
from .stateful_graph import LayerState, StatefulGraph
from .stateful_nodes import Tables, Windows
from .to_sdpa import to_sdpa
from .types import AttentionSite, Capture, Check, SiteScan

RULE = torch.ops.tcal.gated_delta_rule.default
ATTENTION = torch.ops.tcal.cached_attention.default


def require_states(scan: SiteScan, hint: str = "") -> None:
    """Raises UnsupportedModelError, with the reasons, when there is an attention core that is no site."""
    if scan.rejected:
        reasons = "; ".join(f"{r.layer or r.node}: {r.reason}" for r in scan.rejected[:4])
        what = f"{len(scan.rejected)} attention cores cannot carry a state ({reasons})"
        raise UnsupportedModelError("student", what, hint)


def make_stateful(
    capture: Capture, *, verify: bool = True, max_length: int = 8192, check_length: int = 24, bounded: bool = True
) -> StatefulGraph:
    """The stateful form of a student's (or a teacher's) graph. Parameters are shared with the capture.

    verify: compare it in float64, cut into chunks, with the whole-sequence graph (needs a float64 copy of the weights).
    check_length: tokens of that comparison; windows of up to 600 tokens make it longer, up to max_length.
    max_length: the longest sequence: rows of the rotary tables, where a kept core's positions are rotary.
    bounded: whether sites whose window is no longer than max_length forget what it has left behind; attention beside
        a state always does.

    Raises UnsupportedModelError when a core cannot carry a state, when positions cannot be followed, or when chunks
    differ from one pass: then something else than the attention cores reads across time.
    """
    scan = find_attention(capture)
    plain = to_sdpa(capture)[0]
    require_states(scan)
    sites = {s.anchor: s for s in scan.sites}
    stateful = _add_state(plain, sites, max_length, bounded)
    if not verify:
        return stateful
    wide = replace(plain, gm=widen_to_float64(plain.gm))
    whole = wide.gm if plain.gm is capture.gm else widen_to_float64(capture.gm)
    longest = check_tokens(max((s.window or 0 for s in scan.sites), default=0), check_length)
    checks = check_chunks(_add_state(wide, sites, max_length, bounded), whole, capture, min(longest, max_length))
    if bad := [c for c in checks if not c.passed]:
        what = f"{bad[0].name}: {bad[0].measured:.3g} (allowed {bad[0].allowed:.3g}), in float64"
        raise UnsupportedModelError("student", what, "only attention cores may read across time")
    return replace(stateful, checks=checks)


def run_chunks(
    stateful: StatefulGraph, ids: Tensor, chunks: tuple[int, ...], *, mask: Tensor | None = None, dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits [B, T, V] of ids [B, T] fed in chunks, and the state after them. dtype: of the states."""
    logits: list[Tensor] = []
    state: tuple[Tensor, ...] = ()
    for out, state in _each_chunk(stateful, ids, chunks, mask, dtype):  # noqa: B007  the last one is returned
        logits.append(out)
    return torch.cat(logits, 1), state


def _each_chunk(
    stateful: StatefulGraph, ids: Tensor, chunks: tuple[int, ...], mask: Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """Logits of a chunk and the state after it."""
    mask = torch.ones_like(ids) if mask is None else mask
    state, start = stateful.empty_state(len(ids), dtype=dtype), 0
    for size in chunks:
        part, seen = ids[:, start : start + size].clone(), mask[:, : start + size].clone()
        with torch.no_grad():
            out, *present = stateful.gm(part, seen, *state)
        state, start = tuple(present), start + size
        yield out, state


def runs_behind(stateful: StatefulGraph, length: int) -> bool:
    """Whether a token can be read behind so many others that only recurrent states remember: no table of positions ends
    before it."""
    one, mask = torch.ones(1, 1, dtype=torch.int64), torch.ones(1, length + 1, dtype=torch.int64)
    try:
        with torch.no_grad():
            stateful.gm(one, mask, *stateful.empty_state(1))
    except (IndexError, RuntimeError):  # what torch raises for a row that a table does not have
        return False
    return True


def check_tokens(longest_window: int, least: int = 24) -> int:
    """Tokens of the comparison of chunks with one pass; longest_window: 0 where there is none."""
    return max(min(longest_window + 3, 600) if longest_window else 0, least)


def cuts(length: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Chunks of these sizes, as far as they go in so many tokens, and one of what is left."""
    chunks: list[int] = []
    for size in sizes:
        if sum(chunks) + size < length:
            chunks.append(size)
    return (*chunks, length - sum(chunks))


def check_chunks(stateful: StatefulGraph, whole: GraphModule, capture: Capture, length: int = 24) -> tuple[Check, ...]:
    """Chunked against whole-sequence logits of so many tokens, both in float64, relative to the largest logit."""
    gen = torch.Generator().manual_seed(0)
    ids = torch.randint(0, capture.vocab_size, (2, length), generator=gen)
    with torch.no_grad():
        exact = whole(*capture.inputs(ids))
    largest = _largest(exact).clamp_min(1e-30)
    checks = []
    for chunks in (cuts(length, (max(1, length - 2), 1)), cuts(length, (1, 3, 17))):
        errors, rest = [], exact
        for logits, _ in _each_chunk(stateful, ids, chunks, None, torch.float64):
            errors.append(_largest(logits.sub_(rest[:, : logits.shape[1]])))
            rest = rest[:, logits.shape[1] :]
            del logits  # of a large vocabulary, the next ones beside these would be too many
        error = (torch.stack(errors).max() / largest).item()
        checks.append(Check(f"chunks of {chunks} equal one pass", error, 1e-7))
    return tuple(checks)


def _largest(x: Tensor) -> Tensor:
    """Largest absolute value [], NaN where there is one; without a copy, unlike abs()."""
    low, high = x.aminmax()
    return torch.maximum(-low, high)


def _cores(gm: GraphModule) -> list[Node]:
    data = taint(gm.graph.nodes, placeholders(gm)[:1])
    return [n for n in gm.graph.nodes if n.op == "call_function" and n.target in (*ANCHORS, RULE) and n in data]


def _layers(
    cores: list[Node], sites: dict[str, AttentionSite], max_length: int, bounded: bool
) -> tuple[LayerState, ...]:
    """By core. Windows beside a state are held in as many slots as the longest of them: onnxruntime-genai gives all
    states of a kind one shape."""
    numbers = _layer_numbers(cores)
    layers = [
        _layer(n, c, sites, max_length, n in numbers[:i], bounded)
        for i, (n, c) in enumerate(zip(numbers, cores, strict=True))
    ]
    local = [layer for layer in layers if layer.kind == "local"]
    front = max((layer.first for layer in local), default=0)
    held = max((held_positions(layer.window or 0) for layer in local), default=0) + front
    return tuple(replace(layer, held=held) if layer.kind == "local" else layer for layer in layers)


def _layer(
    index: int, core: Node, sites: dict[str, AttentionSite], max_length: int, beside: bool, bounded: bool
) -> LayerState:
    """beside: whether the core stands beside a rule of the same layer."""
    if core.target is RULE:
        if argument(core, "initial_state").target is not aten.new_zeros.default:
            raise UnsupportedModelError(core.name, "its state does not start from zeros: the graph is stateful already")
        if argument(core, "cu_seqlens") is not None:
            raise UnsupportedModelError(core.name, "its sequences are packed", "a graph of one sequence a row")
        _, heads, key_dim, value_dim = value(argument(core, "initial_state")).shape
        return LayerState(index, "gdn", heads, int(value(argument(core, "k")).shape[2]), key_dim, value_dim)
    s = sites[core.name]
    sizes = s.num_heads, s.num_kv_heads, s.key_dim, s.value_dim
    if beside and s.window and s.scores == "plain" and s.first <= 1:
        return LayerState(index, "local", *sizes, s.window, first=s.first)
    held = held_positions(s.window) + s.first if bounded and s.window and s.window <= max_length else None
    return LayerState(index, "softmax", *sizes, s.window, held, s.first)


def _layer_numbers(cores: list[Node]) -> list[int]:
    """By core: attention that a rule of the same module stands before, a converted site's over its last tokens, is of
    the rule's layer."""
    numbers: list[int] = []
    for before, core in zip([None, *cores], cores, strict=False):
        beside = before is not None and before.target is RULE and core.target is not RULE
        same = beside and module_path(core) == module_path(before) != ""  # type: ignore[arg-type]
        numbers.append(numbers[-1] if same else len(set(numbers)))
    return numbers


def _add_state(capture: Capture, sites: dict[str, AttentionSite], max_length: int, bounded: bool) -> StatefulGraph:
    """The surgery, on a copy of the graph."""
    source = capture.gm
    cores = _cores(source)
    if not cores:
        raise UnsupportedModelError("student", "has no attention core and no gated delta rule: no state to carry")
    layers = _layers(cores, sites, max_length, bounded)
    graph, root = Graph(), nn.Module()
    old: dict[Node, Node] = {}
    logits: Any = graph.graph_copy(source.graph, old)
    ins = [old[n] for n in placeholders(source)]
    batch_symbol, length_symbol = (str(d) for d in value(ins[0]).shape)
    free = token_free(graph.nodes, ins, length_symbol)
    mask, past = _state_inputs(graph, ins[-1], layers)
    packing = pack_tokens(graph, ins[0], mask, list(past.values())[-1].next, symbols=(batch_symbol, length_symbol))
    if len(ins) > 1:
        ins[1].replace_all_uses_with(packing.axes.positions)
    tables, windows = Tables(graph, root), Windows(graph, packing, layers)
    present: list[Node] = []
    for layer, core in zip(layers, cores, strict=True):
        states = tuple(past[f"{layer.index}.{part}"] for part in layer.parts)
        with graph.inserting_before(old[core]):
            if layer.kind == "gdn":
                present.append(_carry_rule(graph, old[core], states[0], packing.valid))
                continue
            site = sites[core.name]
            hidden = next(n for n in source.graph.nodes if n.name == site.x)
            apart = value(core).dtype != value(hidden).dtype  # a core in another precision than the rest
            rotary = find_rotary(capture, site, rows=max_length) if layer.grows and not apart else None
            qkv: tuple[Node, ...] = _core_inputs(graph, site, rotary, {n.name: copy for n, copy in old.items()})
            like = qkv[0] if apart else None
            if apart:
                qkv = tuple(graph.call_function(aten.to.dtype, (n, _dtype(source))) for n in qkv)
            if layer.kind == "local":
                args: tuple[Any, ...] = *qkv, *states, windows.of(layer, states[0]), site.scale
                present += _carry_attention(graph, old[core], window_step, args, like)
                continue
            slopes, sinks = map(tables.vector, _head_values(capture, core, site))
            scores: Any = Scores(site.scale, site.window or 0, site.softcap, slopes, sinks, site.first)  # type: ignore[arg-type]
            sizes: tuple[Any, ...] = packing.past_lengths, packing.new_lengths, packing.past_tokens
            if layer.grows:
                sizes = packing.past_lengths, packing.total, *tables.of(rotary)
            target = ATTENTION if layer.grows else windowed_attention
            present += _carry_attention(graph, old[core], target, (*qkv, *states, *sizes, *scores.flat), like)
    graph.output((unpack_logits(graph, logits, packing), *present))
    for unused in ins[1:]:
        graph.erase_node(unused)
    promote_positions(graph, free, packing.axes)
    for n in graph.nodes:
        if n.op == "get_attr" and not tables.holds(str(n.target)):
            set_tensor(root, str(n.target), get_tensor(source, str(n.target)))
    return StatefulGraph(fresh(root, graph), layers, capture.vocab_size)


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


def _head_values(capture: Capture, core: Node, site: AttentionSite) -> tuple[Tensor | None, Tensor | None]:
    """Slopes and sinks [H] of a kept core, in the precision of this graph."""
    slopes = None
    if site.slopes:
        found = probe_mask(capture, argument(core, "attn_mask")).slopes
        slopes = torch.tensor(found * (site.num_heads // len(found)), dtype=_dtype(capture.gm))
    return slopes, sinks_of(capture, core)


def _core_inputs(
    graph: Graph, site: AttentionSite, rotary: Rotary | None, nodes: dict[str, Node]
) -> tuple[Node, Node, Node]:
    """q, k, v as the cached core takes them: before rotary positions where the core rotates."""
    if rotary is None:
        return nodes[site.q], nodes[site.k], nodes[site.v]
    q, k = nodes[rotary.q], nodes[rotary.k]
    if rotary.token_axis == 1:
        q, k = (graph.call_function(aten.transpose.int, (n, 1, 2)) for n in (q, k))
    return q, k, nodes[site.v]


def _carry_attention(graph: Graph, core: Node, target: Any, args: tuple[Any, ...], like: Node | None) -> list[Node]:
    """Attention over the past and the new tokens, in place of `core`; returns the next keys and values.

    like: what has the precision that the result is to have, where that is not the caches'.
    """
    new = graph.call_function(target, args)
    results = 2 if target is window_step else 3
    context, *caches = (graph.call_function(operator.getitem, (new, i)) for i in range(results))
    if like is not None:
        context = graph.call_function(aten.type_as.default, (context, like))
    context.meta = dict(core.meta)
    core.replace_all_uses_with(context)
    graph.erase_node(core)
    return caches


def _carry_rule(graph: Graph, core: Node, past: Node, valid: Node) -> Node:
    """The recurrence from the given state; padding neither decays (g = 0) nor writes (beta = 0)."""
    padding = graph.call_function(aten.unsqueeze.default, (graph.call_function(aten.logical_not.default, (valid,)), -1))
    q, k, v, g, beta, _, scale, _ = (argument(core, a.name) for a in RULE._schema.arguments)
    g, beta = (graph.call_function(aten.masked_fill.Scalar, (gate, padding, 0.0)) for gate in (g, beta))
    core.args, core.kwargs = (q, k, v, g, beta, past, scale), {}
    with graph.inserting_after(core):
        return graph.call_function(operator.getitem, (core, 1))


def export_stateful(stateful: StatefulGraph) -> torch.export.ExportedProgram:
    """The stateful graph as a program; batch, sequence and past_sequence (slots of a cache) are its dimensions."""
    dim = torch.export.Dim
    batch, sequence, past = dim("batch"), dim("sequence"), dim("past_sequence")
    gen = torch.Generator().manual_seed(0)
    ids = torch.randint(0, stateful.vocab_size, (2, 3), generator=gen)
    args = (ids, torch.ones(2, 8, dtype=torch.int64), *stateful.empty_state(2, past=6, dtype=_dtype(stateful.gm)))
    shapes: list[dict[int, Any]] = [{0: batch, 1: sequence}, {0: batch, 1: dim.DYNAMIC}]
    for layer in stateful.layers:
        shapes += [{0: batch, 2: past} if layer.grows else {0: batch} for _ in layer.parts]
    with torch.no_grad():
        return torch.export.export(stateful.gm, args, dynamic_shapes=(tuple(shapes)), strict=False)


def _dtype(gm: GraphModule) -> torch.dtype:
    """Of weights, and so of states."""
    return next(p.dtype for p in gm.parameters() if p.is_floating_point())
