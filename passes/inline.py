"""Parts of a graph that torch.export sets apart, for a mode that changes nothing here, put back into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from .base import PassResult
from .graph import placeholders


def _part(n: Node) -> tuple[Node, tuple[Any, ...]] | None:
    """The part that a node calls with which operands: under no_grad or enable_grad, checkpointed, or autocast off."""
    name = getattr(n.target, "__name__", "") if n.op == "call_function" else ""
    if name == "tag_activation_checkpoint":
        found = n.args
    elif name == "wrap_with_set_grad_enabled":
        found = n.args[1:]
    elif name == "wrap_with_autocast" and n.args[2] is False:
        found = n.args[4:]
    else:
        return None
    return found[0], found[1:]  # type: ignore[return-value]


@dataclass(frozen=True)
class InlineParts:
    """Such parts become nodes of the graph that calls them, without changing a value by one bit."""

    def run(self, gm: GraphModule) -> PassResult:
        calls = [(n, part) for n in gm.graph.nodes if (part := _part(n))]
        for n, (called, operands) in calls:
            inner = gm.get_submodule(str(called.target))
            assert isinstance(inner, GraphModule)
            self.run(inner)
            env = dict(zip(placeholders(inner), operands, strict=True))
            with gm.graph.inserting_before(n):
                for own in inner.graph.nodes:
                    if own.op == "get_attr":
                        env[own] = gm.graph.create_node("get_attr", f"{called.target}.{own.target}")
                        env[own].meta = dict(own.meta)
                values: Any = gm.graph.graph_copy(inner.graph, env)
            for user in list(n.users):
                user.replace_all_uses_with(values[user.args[1]])  # type: ignore[index]
                gm.graph.erase_node(user)
            gm.graph.erase_node(n)
        return PassResult(len(calls))

    def ensures(self, gm: GraphModule) -> None:
        assert not any(_part(n) for n in gm.graph.nodes)
