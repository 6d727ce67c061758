"""Recognises softmax attention that is written out as products, and says which axis of each tensor is what.

scores[.., t, s] = q[.., t, :] k[.., s, :], probabilities p = softmax over s of scale * scores + mask, out = p v.
Axes have letters: b sequences, t query tokens, s key tokens, d and e the dims of keys and values, n sequences x heads
in one axis, and any others are heads.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from typing import Any

from torch import SymInt
from torch.fx import Node

from .graph import LAYOUT, LINEAR, argument, aten, backward_slice, inputs, is_tensor, placeholders, taint, value

SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}
PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default, aten.mm.default}
SHAPING = LAYOUT | {
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.unflatten.int,
    aten.flatten.using_ints,
}
MERGED = "n"
RANKS = range(3, 8)  # of products: those that _lead has letters for


class Unfit(Exception):
    """Why an attention core is not a site."""


@dataclass(frozen=True)
class Product:
    """A product of two tensors: `left` and `right` with one letter for each axis, and the letters of the result."""

    left: Node
    right: Node
    left_axes: str
    right_axes: str
    out_axes: str


@dataclass(frozen=True)
class WrittenCore:
    """softmax: its node. first, second: the products before and behind it.

    between: what the scores pass through, up to `end`: the softmax's argument, or what sinks are put beside.
    sinks: logits that are no products of tokens, one column beside the scores, or None.
    """

    softmax: Node
    scores: Node
    output: Node
    first: Product
    second: Product
    between: tuple[Node, ...]
    end: Node
    sinks: Node | None


@dataclass(frozen=True)
class TokenGraph:
    """What recognition asks of a graph: token-dependent nodes, and the symbols of batch and length."""

    data: frozenset[Node]
    order: dict[Node, int]
    batch: str
    length: str

    @classmethod
    def of(cls, nodes: list[Node], source: Node) -> TokenGraph:
        batch, length = (str(d) for d in value(source).shape)
        return cls(frozenset(taint(nodes, [source])), {n: i for i, n in enumerate(nodes)}, batch, length)

    def tokens(self, node: Node) -> list[Node]:
        """Its token-dependent operands, each once."""
        return [i for i in dict.fromkeys(inputs(node)) if i in self.data]

    def dims(self, node: Node) -> list[str]:
        return [str(d) for d in getattr(value(node), "shape", ())]

    def has_pairs(self, node: Node) -> bool:
        """Its last two axes are query and key tokens."""
        return self.dims(node)[-2:] == [self.length, self.length]

    def has_rows(self, node: Node) -> bool:
        """Its last two axes are query tokens and what grows with the length: key tokens, sinks beside them."""
        dims = self.dims(node)
        return dims[-2:-1] == [self.length] and bool(re.search(rf"\b{self.length}\b", dims[-1]))


def token_graph(gm: Any) -> TokenGraph:
    return TokenGraph.of(list(gm.graph.nodes), placeholders(gm)[0])


def reaches_softmax_over_tokens(t: TokenGraph, node: Node) -> bool:
    """Attention, not a router: the softmax is over an axis that grows with the length, or over a product of tokens."""
    dim, dims = int(argument(node, "dim", -1)), t.dims(node.args[0])  # type: ignore[arg-type]
    if re.search(rf"\b{t.length}\b", dims[dim]):
        return True
    c: Node = node.args[0]  # type: ignore[assignment]
    while len(t.tokens(c)) == 1 and c.target not in LINEAR:
        c = t.tokens(c)[0]
    return c.target in PRODUCTS and len(t.tokens(c)) == 2


def pairs_without_softmax(t: TokenGraph, node: Node) -> bool:
    """A product of all tokens with all tokens that no softmax follows: linear or sigmoid attention, for instance."""
    if node.target not in PRODUCTS or len(t.tokens(node)) != 2 or not t.has_pairs(node):
        return False
    seen, stack = set(), [node]
    while stack:
        n = stack.pop()
        if n.target in SOFTMAX:
            return False
        if n not in seen and t.has_rows(n):
            seen.add(n)
            stack += n.users
    return True


def recognise(t: TokenGraph, softmax: Node) -> WrittenCore:
    """The core around a softmax. Raises Unfit with the reason when it is none that scaled_dot_product_attention has."""
    dims = t.dims(softmax)
    if int(argument(softmax, "dim", -1)) not in (-1, len(dims) - 1):
        raise Unfit("its softmax is not over the last dimension")
    scores, end, sinks = _scores(t, softmax)
    if not t.has_pairs(end):
        raise Unfit(f"its softmax has the shape {dims}, want [.., {t.length}, {t.length}]: tokens x tokens")
    output, weights = _weighted_sum(t, softmax, sinks is not None)
    first = _label(scores, _operands(scores))
    if first.right_axes.count("s") == 0 or first.out_axes[-2:] != "ts":
        raise Unfit(f"its score product has axes {first.left_axes}, {first.right_axes} -> {first.out_axes}")
    second = _label(output, _operands(output), weights=weights)
    between = sorted(backward_slice(end, scores, set(t.data)) - {scores}, key=lambda n: t.order[n])
    return WrittenCore(softmax, scores, output, first, second, tuple(between), end, sinks)


def _scores(t: TokenGraph, softmax: Node) -> tuple[Node, Node, Node | None]:
    """The product of queries and keys; the scores as they are complete, and the sinks beside them."""
    c: Node = softmax.args[0]  # type: ignore[assignment]
    end, sinks = c, None
    while not (c.target in PRODUCTS and len(t.tokens(c)) == 2):
        operands = t.tokens(c)
        if c.target in LINEAR and len(operands) == 1:
            raise Unfit("its scores pass through a linear map")
        if c.target is aten.cat.default:
            end, sinks = _beside_sinks(t, c, operands)
            operands = [end]
        if len(operands) == 2:  # scores - max(scores): both come from one
            near, far = sorted(operands, key=lambda n: t.order[n])
            if near not in backward_slice(far, inputs(near)[0] if inputs(near) else near, set(t.data)):
                raise Unfit(f"its scores join two values of the tokens: {near.name} and {far.name} in {c.name}")
            operands = [near]
        if not operands:
            raise Unfit("its scores are no product of queries and keys")
        c = operands[0]
    return c, end, sinks


def _beside_sinks(t: TokenGraph, cat: Node, scores: list[Node]) -> tuple[Node, Node]:
    """The scores, and the column of sinks that is put beside them."""
    columns = [i for i in inputs(cat) if i not in t.data and is_tensor(i)]
    if len(scores) != 1 or len(columns) != 1 or value(columns[0]).ndim != 4 or value(columns[0]).shape[-1] != 1:
        shapes = [t.dims(i) for i in inputs(cat)]
        raise Unfit(f"its softmax is over columns that are no tokens, of shapes {shapes}: want one for each head")
    return scores[0], columns[0]


def _weighted_sum(t: TokenGraph, softmax: Node, sinks: bool) -> tuple[Node, Node]:
    """The product of probabilities and values, and its operand that holds the probabilities."""
    c = softmax
    while True:
        users = [u for u in c.users if u in t.data]
        if len(users) != 1:
            raise Unfit(f"its probabilities have {len(users)} users: {[u.name for u in users][:4]}")
        user = users[0]
        if user.target in PRODUCTS and len(t.tokens(user)) == 2:
            return user, c
        if user.target is aten.dropout.default:
            raise Unfit(f"dropout {user.args[1]} inside attention; export the model in eval mode")
        if user.target not in SHAPING and not (sinks and user.target is aten.slice.Tensor):
            raise Unfit(f"its probabilities pass through {user.target} before they meet the values")
        c = user


def _operands(node: Node) -> tuple[Node, Node]:
    if node.target is aten.einsum.default:
        operands = node.args[1]
    elif node.target is aten.baddbmm.default:
        operands = node.args[1:3]
    else:
        operands = node.args[:2]
    found: list[Node] = list(operands)  # type: ignore[arg-type]
    if len(found) != 2:
        raise Unfit(f"its product {node.name} has {len(found)} operands")
    return found[0], found[1]


def _lead(rank: int) -> str:
    """Letters of the axes before the last two: merged sequences and heads, or sequences and head axes."""
    return MERGED if rank == 3 else "b" + "hgijk"[: rank - 3]


def _label(node: Node, operands: tuple[Node, Node], *, weights: Node | None = None) -> Product:
    """Letters for a score product, or with `weights` for the weighted sum of values."""
    left, right = operands
    if node.target is aten.einsum.default:
        return _label_einsum(str(node.args[0]), left, right, weights)
    ranks = [value(n).ndim for n in operands]
    if ranks[0] != ranks[1] or ranks[0] not in RANKS:
        raise Unfit(f"its product {node.name} is of tensors with {ranks} dimensions")
    if weights not in (None, left):
        raise Unfit(f"its product {node.name} has the values on the left")
    lead = _lead(ranks[0])
    few = "".join(a for a, size in zip(lead, value(right).shape, strict=False) if a in "b" + MERGED or size != 1)
    if weights is None:
        return Product(left, right, f"{lead}td", f"{_ones(lead, few)}ds", f"{lead}ts")
    return Product(left, right, f"{lead}ts", f"{_ones(lead, few)}se", f"{lead}te")


def _ones(lead: str, few: str) -> str:
    """lead with "1" for each axis that is not in few: an axis of size one, repeated by broadcasting."""
    return "".join(a if a in few else "1" for a in lead)


def _label_einsum(equation: str, left: Node, right: Node, weights: Node | None) -> Product:
    equation = equation.replace(" ", "")
    if "..." in equation:
        rest = [c for c in string.ascii_uppercase if c not in equation]
        count = value(left).ndim - len(equation.split(",")[0].replace("...", ""))
        equation = equation.replace("...", "".join(rest[:count]))
    ins, _, out = equation.partition("->")
    a, b = ins.split(",")
    if weights is right or (weights is None and out[-1] in a and out[-1] not in b):
        left, right, a, b = right, left, b, a
    table = len(a) if weights is not None else len(out)
    source = a if weights is not None else out
    if table not in RANKS:
        raise Unfit(f"its product is the einsum {equation}")
    new = dict(zip(source, _lead(table) + "ts", strict=True))
    inner, outer = (set(a) & set(b)) - set(out), (set(out) | set(b)) - set(new)
    if weights is None:
        new |= dict.fromkeys(inner, "d")
    else:
        new |= dict.fromkeys(outer & set(out), "e")
    unknown = (set(a) | set(b) | set(out)) - set(new)
    if len(inner) != 1 or unknown or len(set(new.values())) != len(new):
        raise Unfit(f"its product is the einsum {equation}")
    a, b, out = ("".join(new[c] for c in part) for part in (a, b, out))
    if weights is not None and (a[-2:] != "ts" or "s" not in b or "s" in out):
        raise Unfit(f"its product is the einsum {equation}")
    return Product(left, right, a, b, out)


def concrete(size: Any, symbols: dict[str, int]) -> int:
    """A size with numbers in place of its symbols."""
    if not isinstance(size, SymInt):
        return int(size)
    expression = size.node.expr
    return int(expression.xreplace({s: symbols[str(s)] for s in expression.free_symbols}))
