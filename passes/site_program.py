"""Cuts a small program out of a graph: given nodes from given nodes, parameters as attributes of their own.

Programs of like layers come out with the same code, so one of them can run with the parameters of all, stacked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from .graph import by_name, get_tensor, inputs, is_effect, set_tensor


@dataclass(frozen=True)
class SiteProgram:
    """gm(*inputs, *outside) -> outputs.

    Attributes:
        params: attribute name in gm -> path in the source graph, in order of use; mixers appear as mixer.<name>.
        outside: names of source nodes that are computed elsewhere (RoPE tables, sizes) and passed as arguments.
    """

    gm: GraphModule
    params: dict[str, str]
    outside: tuple[str, ...]

    def same_as(self, other: SiteProgram) -> bool:
        """True when one program can run with the other's parameters."""
        mine, theirs = dict(self.gm.named_parameters()), dict(other.gm.named_parameters())
        return (
            self.gm.code == other.gm.code
            and list(mine) == list(theirs)
            and all(mine[n].shape == theirs[n].shape for n in mine)
        )


def _region(outs: Sequence[Node], ins: Sequence[Node], order: list[Node]) -> list[Node]:
    after = set(ins)
    for n in order:
        if any(i in after for i in inputs(n)):
            after.add(n)
    before: set[Node] = set()
    stack = list(outs)
    while stack:
        n = stack.pop()
        if n not in before and n not in ins:
            before.add(n)
            stack += inputs(n)
    return [n for n in order if n in after and n in before]


def _with_values_of_parameters(region: list[Node], order: list[Node], source: GraphModule) -> list[Node]:
    """The region and the nodes that make values of parameters alone for it, such as 1 + w of a norm."""
    alone: set[Node] = set()
    for n in order:
        if n.op == "get_attr":
            known = isinstance(get_tensor(source, str(n.target)), nn.Parameter)
        else:
            known = n.op == "call_function" and bool(inputs(n)) and alone.issuperset(inputs(n))
        if known:
            alone.add(n)
    wanted = set(region)
    for n in reversed(order):
        if n in wanted:
            wanted |= {i for i in inputs(n) if i in alone and i.op != "get_attr"}
    return [n for n in order if n in wanted]


def cut_program(source: GraphModule, *, inputs_from: Sequence[str], outputs: Sequence[str]) -> SiteProgram:
    """The part of `source` between the named nodes, and what makes values of parameters alone for it.

    Parameters are shared with the source, not copied.
    """
    nodes = by_name(source)
    ins, outs = [nodes[n] for n in inputs_from], [nodes[n] for n in outputs]
    order = list(source.graph.nodes)
    region = _region(outs, ins, order)
    region = _with_values_of_parameters(region, order, source)
    inside = set(region) | set(ins)
    graph, root = Graph(), nn.Module()
    params: dict[str, str] = {}
    mapped: dict[Node, Node] = {n: graph.placeholder(f"in{i}") for i, n in enumerate(ins)}
    outside: list[Node] = []
    for n in region:
        outside += [i for i in inputs(n) if i not in inside and i.op != "get_attr" and i not in outside]
    for j, n in enumerate(outside):
        mapped[n] = graph.placeholder(f"outside{j}")
    for n in region:
        for a in inputs(n):
            if a.op == "get_attr" and a not in mapped:
                name = f"w{len(params)}"
                set_tensor(root, name, get_tensor(source, str(a.target)))
                params[name] = str(a.target)
                mapped[a] = graph.get_attr(name)
        if n.op == "call_module":
            mixer = source.get_submodule(str(n.target))
            root.add_module("mixer", mixer)
            params |= {f"mixer.{k}": f"{n.target}.{k}" for k, _ in mixer.named_parameters()}
            mapped[n] = graph.call_module("mixer", torch.fx.node.map_arg(n.args, lambda a: mapped[a]))
        else:
            mapped[n] = graph.node_copy(n, lambda a: mapped[a])
    result = tuple(mapped[n] for n in outs)
    graph.output(result[0] if len(result) == 1 else result)
    for k, n in enumerate(graph.nodes):  # names by position, so that the code of like layers is the same text
        if n.op in ("call_function", "call_module"):
            n.name = f"n{k}"
    graph.lint()
    return SiteProgram(GraphModule(root, graph), params, tuple(n.name for n in outside))


def tap_graph(source: GraphModule, names: Sequence[str]) -> GraphModule:
    """The source graph with the named nodes as its only outputs; parameters are shared."""
    graph = Graph()
    mapped: dict[Node, Node] = {}
    graph.graph_copy(source.graph, mapped)
    node = by_name(source)
    graph.output(tuple(mapped[node[n]] for n in names))
    graph.eliminate_dead_code(is_impure_node=is_effect)
    return GraphModule(source, graph)


def outside_values(source: GraphModule, names: Sequence[str], args: Sequence[Tensor]) -> tuple[object, ...]:
    """Values of token-independent nodes (RoPE tables, sizes) for the given graph inputs."""
    if not names:
        return ()
    with torch.no_grad():
        return tuple(tap_graph(source, names)(*args))
