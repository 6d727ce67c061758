"""Gradient checkpointing of a graph: only what crosses a cut is kept for the backward pass, the rest is computed again.

Source of the idea: Chen et al., arXiv:1604.06174; the work is done by torch.utils.checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.passes.split_module import split_module
from torch.utils.checkpoint import checkpoint

from tcal_compiler.errors import StageError
from tcal_compiler.passes.graph import argument, is_mutation


class Recomputed(nn.Module):
    """A part of a graph whose inner values are computed again in the backward pass. It must not draw random numbers."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *args: Any) -> Any:
        return checkpoint(self.part, *args, use_reentrant=False, preserve_rng_state=False)


def recompute_between(gm: GraphModule, cuts: Collection[str]) -> GraphModule:
    """The same function and gradients, with a segment ending at each named node. Parameters are shared with gm.

    Raises StageError when the graph writes into a value of another segment: doing so twice is not doing it once.
    """
    parts = segments(gm, cuts, "checkpoint_activations")
    for name in parts.meta["partition_names"]:
        setattr(parts, name, Recomputed(parts.get_submodule(name)))
    return parts


def segments(gm: GraphModule, cuts: Collection[str], option: str) -> GraphModule:
    """The same function, with a submodule for each segment, which ends at a named node.

    Its names are in meta["partition_names"]; gm's parameters are handed to them as arguments, those of gm's modules are
    shared. option: the key of [distill] that asks for it.

    Raises StageError when the graph writes into a value of another segment.
    """
    segment: dict[Node, int] = {}
    number = 0
    for node in gm.graph.nodes:
        if node.op in ("call_function", "call_module", "call_method"):
            segment[node] = number
            number += node.name in cuts
    for node in filter(is_mutation, gm.graph.nodes):
        for base in _written(node):
            if segment.get(base) != segment[node]:
                what = f"{option}: {node.name} writes into {base.name}, which another part computes"
                raise StageError("distill", what, f"distill.{option} = false")
    parts = split_module(gm, gm, segment.__getitem__, keep_original_order=True)
    parts.meta["partition_names"] = {str(n.target) for n in parts.graph.nodes if n.op == "call_module"}
    return parts


def _written(node: Node) -> list[Node]:
    """The values that a node writes into, followed back through views to what made them."""
    found = []
    for a in node.target._schema.arguments:  # type: ignore[union-attr]
        written = argument(node, a.name)
        if a.alias_info is None or not a.alias_info.is_write or not isinstance(written, Node):
            continue
        while (source := _viewed(written)) is not None:
            written = source
        found.append(written)
    return found


def _viewed(node: Node) -> Node | None:
    """What a node is a view of, or writes into and gives back; None when its value is its own."""
    for a in getattr(getattr(node.target, "_schema", None), "arguments", ()):
        if a.alias_info is not None and isinstance(source := argument(node, a.name), Node):
            return source
    return None
