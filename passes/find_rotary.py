"""Finds the rotary positions of an attention core: what lies between plain q and k and the core, and its tables.

The sub-graph is evaluated, not recognised by its spelling: it is rotary when it turns pairs of channels by an angle
that depends on the position alone, and then the tables are read off it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import networkx as nx
import torch
from torch import Tensor
from torch.fx import Node

from tcal_compiler.errors import UnsupportedModelError
from tcal_compiler.kernels.cached_attention.onnx_rule import can_rotate, is_fused
from tcal_compiler.kernels.cached_attention.reference import rotate

from .graph import backward_slice, by_name, inputs, placeholders, taint, value
from .masks import SHORT, Evaluator
from .positions import token_free
from .types import AttentionSite, Capture


@dataclass(frozen=True)
class Rotary:
    """q and k, by node name, before they are rotated by cos and sin [N, R / 2]; row = position.

    token_axis: 2 where the nodes are [B, H, T, D], 1 where they are [B, T, H, D].
    """

    q: str
    k: str
    token_axis: int
    cos: Tensor
    sin: Tensor
    interleaved: bool


@dataclass(frozen=True)
class _Turn:
    """One rotated node: where it comes from, and its tables."""

    source: str
    token_axis: int
    cos: Tensor
    sin: Tensor
    interleaved: bool


def find_rotary(capture: Capture, site: AttentionSite, *, rows: int) -> Rotary | None:
    """The rotary positions of a site, with tables of `rows` positions.

    None when q and k are made in another way, or in sizes that the fused attention does not rotate. Raises
    UnsupportedModelError when the angles of a position differ between a short sequence and one of `rows` tokens.
    """
    if not is_fused(site.key_dim, site.value_dim):
        return None
    nodes = by_name(capture.gm)
    q, k = (_find_turn(capture, nodes[n], nodes[site.x], rows) for n in (site.q, site.k))
    if q is None or k is None or (q.token_axis, q.interleaved) != (k.token_axis, k.interleaved):
        return None
    if not (torch.equal(q.cos, k.cos) and torch.equal(q.sin, k.sin)):
        return None
    return Rotary(q.source, k.source, q.token_axis, q.cos, q.sin, q.interleaved)


def _source(capture: Capture, node: Node, x: Node) -> Node | None:
    """The last node on every way from x to `node` that does not depend on positions yet."""
    gm = capture.gm
    ins = placeholders(gm)
    data = taint(gm.graph.nodes, ins[:1])
    positional = token_free(gm.graph.nodes, ins[:1], str(value(ins[0]).shape[1])) | set(ins[1:])
    region = backward_slice(node, x, data)
    graph = nx.DiGraph((i, n) for n in region for i in inputs(n) if i in region or i is x)
    if node not in graph or x not in graph:
        return None
    dominators = nx.immediate_dominators(graph, x)
    found = node
    while not isinstance(value(found), Tensor) or any(
        i in positional for n in backward_slice(found, x, data) for i in inputs(n)
    ):
        above = dominators.get(found)
        if above is None or above is found or above is x:
            return None
        found = above
    return None if found is node else found


def _find_turn(capture: Capture, node: Node, x: Node, rows: int) -> _Turn | None:
    source = _source(capture, node, x)
    shape = [str(d) for d in value(source).shape] if source is not None else []
    length = str(value(placeholders(capture.gm)[0]).shape[1])
    if source is None or len(shape) != 4 or shape.count(length) != 1 or shape.index(length) not in (1, 2):
        return None
    axis, heads, width = shape.index(length), value(node).shape[1], int(value(node).shape[3])
    if not isinstance(heads, int) or shape[3 - axis] != str(heads) or shape[3] != str(width):
        return None

    def turned(probe: Tensor) -> Tensor:
        """probe [1, H, T, D] -> what the sub-graph makes of it."""
        known = {source: probe if axis == 2 else probe.transpose(1, 2)}
        return Evaluator(capture, probe.shape[2], known)(node)

    try:
        found = _read_tables(turned, source.name, axis, (1, heads, rows, width), value(node).dtype)
        short = _read_tables(turned, source.name, axis, (1, heads, min(rows, SHORT), width), value(node).dtype)
    except (RuntimeError, IndexError):  # a table of positions with fewer rows
        return None
    if found and short and not torch.allclose(found.cos[: len(short.cos)], short.cos, rtol=0, atol=1e-4):
        what = f"its rotary angles change with the length of the sequence, between {len(short.cos)} and {rows} tokens"
        raise UnsupportedModelError(node.name, what, "export.max_length, the longest sequence up to which they stay")
    return found


def _read_tables(
    turned: Callable[[Tensor], Tensor], source: str, axis: int, shape: tuple[int, ...], dtype: torch.dtype
) -> _Turn | None:
    """turned: what the sub-graph makes of [1, H, T, D]."""
    gen = torch.Generator().manual_seed(0)
    probe = torch.randn(shape, generator=gen).to(dtype)
    expected = turned(probe)
    changed = (expected != probe).flatten(0, 2).any(0).nonzero()
    if expected.shape != probe.shape or len(changed) == 0:
        return None
    rotated = int(changed.max()) + 1
    if not can_rotate(shape[3], rotated):
        return None
    for interleaved in (False, True):
        first = torch.zeros(rotated, dtype=dtype)
        first[slice(0, None, 2) if interleaved else slice(rotated // 2)] = 1
        unit = torch.zeros(shape, dtype=dtype)
        unit[..., :rotated] = first
        row = turned(unit)[0, 0, :, :rotated]
        cos, sin = row[:, first == 1].contiguous(), row[:, first == 0].contiguous()
        again = rotate(probe, cos[None, None], sin[None, None], interleaved=interleaved)
        if torch.allclose(again, expected, rtol=0, atol=8 * torch.finfo(dtype).eps * float(expected.abs().max())):
            return _Turn(source, axis, cos, sin, interleaved)
    return None
