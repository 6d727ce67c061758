"""Positions that a graph makes by itself (arange over the length, tables cut to the length) become inputs.

A stateful graph sees T tokens that start anywhere, and the rows of a batch may start at different places. The part of
the graph that depends on positions alone is computed for all B * T positions as one long row, and cut into [B, T]
where it meets token data.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from tcal_compiler.errors import UnsupportedModelError

from .graph import argument, aten, backward_slice, inputs, placeholders, taint, value
from .masks import Evaluator
from .types import Capture

_ARANGE = {aten.arange.default, aten.arange.start, aten.arange.start_step}
_BROADCAST = {
    aten.add.Tensor,
    aten.add_.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.mul_.Tensor,
    aten.div.Tensor,
    aten.where.self,
    aten.expand.default,
}
_MIXES_ROWS = ("cumsum", "cumprod", "tril", "triu", "linspace", "roll", "flip", "eye", "diff", "sort")


@dataclass(frozen=True)
class TokenAxes:
    """Nodes of a stateful graph: positions [B, T] int64, and the sizes B and T; and their symbols in the old graph."""

    positions: Node
    batch: Node
    length: Node
    batch_symbol: str
    length_symbol: str


def _dims(n: Node) -> list[str]:
    v = value(n)
    return [str(d) for d in v.shape] if isinstance(v, Tensor) else []


def _refuse(node: Node, why: str) -> UnsupportedModelError:
    hint = "give the model a position_ids [B, T] input, or compute positions with torch.arange(T)"
    return UnsupportedModelError(node.name, f"cannot follow token positions: {why}", hint)


def token_free(nodes: Iterable[Node], sources: Iterable[Node], length_symbol: str) -> set[Node]:
    """Tensors with a dimension of the sequence length whose values do not depend on the sources."""
    order = list(nodes)
    data = taint(order, sources)
    return {n for n in order if n not in data and n.op == "call_function" and length_symbol in _dims(n)}


def _option(n: Node, name: str, default: Any) -> Any:
    found = argument(n, name, default)
    return default if found is None else found


def _is_source(n: Node, length_symbol: str) -> bool:
    """A range over the length, or the first T rows of a table."""
    if n.target in _ARANGE:
        return True
    if n.target is not aten.slice.Tensor:
        return False
    dim = int(_option(n, "dim", 0))
    return _dims(n)[dim] == length_symbol != _dims(n.args[0])[dim]  # type: ignore[arg-type]


def longest_positions(capture: Capture) -> int | None:
    """The most tokens for which every table whose rows positions choose has a row for each; None without such a table.

    How an index grows with the length is read off two short ones.
    """
    graph = capture.gm.graph
    data = taint(graph.nodes, placeholders(capture.gm)[:1])
    short, long = Evaluator(capture, 2), Evaluator(capture, 9)
    found = []
    for n in graph.nodes:
        if (pair := _looked_up(n)) is None or pair[1] in data:
            continue
        rows, index = pair
        low, high = int(short(index).max()), int(long(index).max())
        if step := (high - low) // 7:
            found.append(2 + (rows - 1 - low) // step)
    return min(found, default=None)


def _looked_up(n: Node) -> tuple[int, Node] | None:
    """Rows of a table, and the node of indices that chooses among them."""
    if n.target is aten.embedding.default:
        table, index, dim = argument(n, "weight"), argument(n, "indices"), 0
    elif n.target is aten.index_select.default:
        table, index, dim = argument(n, "self"), argument(n, "index"), int(argument(n, "dim"))
    elif n.target is aten.index.Tensor and len(n.args[1]) == 1:  # type: ignore[arg-type]
        table, index, dim = argument(n, "self"), n.args[1][0], 0  # type: ignore[index]
    else:
        return None
    rows = value(table).shape[dim]
    integers = isinstance(index, Node) and not value(index).is_floating_point() and value(index).dtype != torch.bool
    return (rows, index) if integers and isinstance(rows, int) else None


@dataclass
class _Promotion:
    graph: Graph
    axes: TokenAxes
    free: set[Node]
    flat: Node
    count: Node
    mapped: dict[Node, Node] = field(default_factory=dict)
    cut: dict[tuple[Node, int], Node] = field(default_factory=dict)

    @classmethod
    def start(cls, graph: Graph, axes: TokenAxes, free: set[Node]) -> _Promotion:
        flat = graph.call_function(aten.reshape.default, (axes.positions, [-1]))
        return cls(graph, axes, free, flat, graph.call_function(aten.sym_size.int, (flat, 0)))

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        return self.graph.call_function(target, args, kwargs)

    def _source(self, n: Node) -> Node:
        """Row `position` of what n holds for 0..T-1."""
        if n.target in _ARANGE:
            start, step = _option(n, "start", 0), _option(n, "step", 1)
            if isinstance(start, Node) or isinstance(step, Node):
                raise _refuse(n, "a range whose start is computed")
            row = self.flat if step == 1 else self._call(aten.mul.Tensor, self.flat, step)
            row = row if start == 0 else self._call(aten.add.Tensor, row, start)
            return self._call(aten.to.dtype, row, _option(n, "dtype", value(n).dtype))
        if _option(n, "start", 0) != 0 or _option(n, "step", 1) != 1:
            raise _refuse(n, "a table that is cut from a row other than the first")
        return self._call(aten.index_select.default, n.args[0], _option(n, "dim", 0), self.flat)

    def _argument(self, n: Node, arg: Node) -> Any:
        """arg as the long row sees it: T becomes B * T, B becomes 1."""
        if arg in self.free:
            return self.flattened(arg)
        v = value(arg)
        if isinstance(v, SymInt):
            if str(v) == self.axes.length_symbol:
                return self.count
            if str(v) == self.axes.batch_symbol:
                return 1
            raise _refuse(n, f"a size {v} that is neither batch nor length")
        if self.axes.length_symbol in _dims(arg):
            raise _refuse(n, f"it reads {arg.name}, which depends on the tokens")
        return arg

    def flattened(self, n: Node) -> Node:
        """A copy of a token-free node with B * T rows."""
        if n not in self.mapped:
            if any(word in str(n.target) for word in _MIXES_ROWS):
                raise _refuse(n, f"{n.target} mixes positions")
            if _dims(n).count(self.axes.length_symbol) != 1:
                raise _refuse(n, f"a table of shape {_dims(n)} over pairs of positions")
            if _is_source(n, self.axes.length_symbol):
                self.mapped[n] = self._source(n)
            else:
                args: Any = map_arg(n.args, lambda i: self._argument(n, i))
                kwargs: Any = map_arg(n.kwargs, lambda i: self._argument(n, i))
                self.mapped[n] = self._call(n.target, *args, **kwargs)
        return self.mapped[n]

    def for_user(self, n: Node, user: Node) -> Node:
        """The long row of n as [B, 1, .., T, ..], to be broadcast in user's output."""
        dims, rank = _dims(n), len(_dims(user))
        at = dims.index(self.axes.length_symbol)
        lead, tail = dims[:at], dims[at + 1 :]
        missing = rank - len(dims)
        if missing == 0 and lead and lead[0] in ("1", self.axes.batch_symbol):
            lead, missing = lead[1:], 1  # the batch takes the place of a leading 1
        fits = user.target in _BROADCAST and missing > 0 and _dims(user)[0] == self.axes.batch_symbol
        if not fits or _dims(user)[rank - len(tail) - 1] != self.axes.length_symbol:
            raise _refuse(user, f"{user.target} joins {n.name} of shape {dims} with token data {_dims(user)}")
        if (n, rank) not in self.cut:
            self.cut[n, rank] = self._unflatten(n, [1] * (missing - 1) + self._sizes(n, lead), self._sizes(n, tail))
        return self.cut[n, rank]

    def _unflatten(self, n: Node, lead: list[int], tail: list[int]) -> Node:
        batch, length = self.axes.batch, self.axes.length
        row = self.flattened(n)
        if all(s == 1 for s in lead):
            return self._call(aten.reshape.default, row, [batch, *lead, length, *tail])
        split = self._call(aten.reshape.default, row, [*lead, batch, length, *tail])
        at, rank = len(lead), len(lead) + 2 + len(tail)
        return self._call(aten.permute.default, split, [at, *range(at), *range(at + 1, rank)])

    def _sizes(self, n: Node, dims: list[str]) -> list[int]:
        if any(not d.isdigit() and d != self.axes.batch_symbol for d in dims):
            raise _refuse(n, f"shape {_dims(n)}")
        return [int(d) if d.isdigit() else 1 for d in dims]


def _positional(free: set[Node], order: list[Node], axes: TokenAxes) -> set[Node]:
    """Token-free nodes whose values differ along the sequence."""
    found: set[Node] = set()
    for n in order:
        if n not in free:
            continue
        varies = _is_source(n, axes.length_symbol) or any(i in found for i in inputs(n))
        if varies or any(word in str(n.target) for word in _MIXES_ROWS):
            found.add(n)
    return found


def promote_positions(graph: Graph, free: set[Node], axes: TokenAxes) -> int:
    """Makes every use of the graph's own positions read axes.positions. Returns the number of uses.

    free: from `token_free`, on the graph before it was edited.

    Raises UnsupportedModelError when a use is not understood.
    """
    alive = backward_slice(graph.output_node(), stop=axes.positions)
    order = [n for n in graph.nodes if n in alive]
    own = _positional(free, order, axes)
    uses = [(n, u) for u in order if u not in own and isinstance(value(u), Tensor) for n in inputs(u) if n in own]
    work: _Promotion | None = None
    for n, user in dict.fromkeys(uses):
        with graph.inserting_before(user):
            work = work or _Promotion.start(graph, axes, free)
            user.replace_input_with(n, work.for_user(n, user))
    return len(uses)
