"""Nodes of a stateful graph that several of its layers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from tcal_compiler.kernels.local_attention import window_rows

from .find_rotary import Rotary
from .graph import set_tensor
from .pack import Packing
from .stateful_graph import LayerState


class Tables:
    """Rotary tables, and values of heads, as buffers of the new graph; equal tables once."""

    def __init__(self, graph: Graph, root: nn.Module) -> None:
        self.graph, self.root = graph, root
        self.known: list[Rotary] = []
        self.names: list[str] = []

    def vector(self, values: Tensor | None) -> Node | None:
        """Values [H] as a node; call it where that is to be inserted."""
        if values is None:
            return None
        self.names.append(f"head_values.{len(self.names)}")
        set_tensor(self.root, self.names[-1], values.detach().clone())
        return self.graph.create_node("get_attr", self.names[-1])

    def of(self, rotary: Rotary | None) -> tuple[Node | None, Node | None, bool]:
        """Nodes of cos and sin, and whether channels are interleaved; call it where they are to be inserted."""
        if rotary is None:
            return None, None, False
        same = (torch.equal(r.cos, rotary.cos) and torch.equal(r.sin, rotary.sin) for r in self.known)
        index = next((i for i, equal in enumerate(same) if equal), len(self.known))
        names = [f"rotary.{index}.{part}" for part in ("cos", "sin")]
        if index == len(self.known):
            self.known.append(rotary)
            for name, table in zip(names, (rotary.cos, rotary.sin), strict=True):
                set_tensor(self.root, name, table)
        cos, sin = (self.graph.create_node("get_attr", name) for name in names)
        return cos, sin, rotary.interleaved

    def holds(self, target: str) -> bool:
        return target in self.names or (target.startswith("rotary.") and target.split(".")[1].isdigit())


class Windows:
    """Nodes of `window_rows`, for cores that see the same once."""

    def __init__(self, graph: Graph, packing: Packing, layers: tuple[LayerState, ...]) -> None:
        self.graph, self.packing = graph, packing
        self.front = any(layer.first for layer in layers if layer.kind == "local")
        self.known: dict[tuple[Any, ...], Node] = {}

    def of(self, layer: LayerState, past: Node) -> Node:
        """Call it where what is not known yet is to be inserted."""
        sizes: dict[str, Any] = {"window": layer.window, "first": layer.first > 0}
        sizes |= {"slots": layer.held, "front": self.front, "heads": layer.num_heads, "kv_heads": layer.num_kv_heads}
        key = tuple(sizes.values())
        if key not in self.known:
            lengths = self.packing.past_lengths, self.packing.new_lengths
            self.known[key] = self.graph.call_function(window_rows, (self.packing.valid, *lengths, past), sizes)
        return self.known[key]
