"""Reads one of Dynamo's graphs: which module is called, with which arguments, and what is returned.

Dynamo passes everything that a graph reads as an argument, weights included, and notes on each placeholder from where
in the traced function it came: L['self']._modules['head']._parameters['weight'] and L['input_ids'] for example.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .errors import UnsupportedModelError
from .passes.graph import output_node, value

WHERE = "the compiled call"
_OF_MODULE = re.compile(r"(.+?)\.(?:_modules|_parameters|_buffers)\[")
_OWNED = re.compile(r"\._(?:parameters|buffers)\['[^']*'\]$")
_LAST_NAME = re.compile(r"L(?:\['kwargs'\])?\['(\w+)'\]")
_NO_CACHE = "model(..., use_cache=False), or model.config.use_cache = False: the backend computes whole sequences"


@dataclass(frozen=True)
class Call:
    """A call of a module that returns logits [B, T, V] alone.

    Attributes:
        module: the module whose weights the graph reads.
        ids, positions, mask: indices of input_ids, position_ids and attention_mask [B, T] among the graph's arguments.
        weights: indices of the module's parameters and buffers.
    """

    module: weakref.ref[nn.Module]
    ids: int
    positions: int | None
    mask: int | None
    weights: tuple[int, ...]

    def arguments(self, args: Sequence[Any]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """ids, positions and mask of a call.

        Raises UnsupportedModelError when there are no tokens, or padding that is not at the end.
        """
        if not args[self.ids].numel():
            raise UnsupportedModelError(WHERE, f"passes {list(args[self.ids].shape)} token ids", "one token at least")
        mask = None if self.mask is None else args[self.mask] != 0
        if mask is not None and bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            row = int((mask[:, 1:] & ~mask[:, :-1]).any(1).nonzero()[0])
            what = f"attention_mask of row {row} hides tokens before others, which a recurrent state would take in"
            raise UnsupportedModelError(WHERE, what, 'padding at the end: tokenizer.padding_side = "right"')
        return args[self.ids], None if self.positions is None else args[self.positions], mask


def _source(node: Node) -> str:
    """Where the traced function has a placeholder's value from, as Dynamo writes it."""
    name = getattr(getattr(node, "_dynamo_source", None), "name", node.name)
    return name if isinstance(name, str) else name()


def _evaluate(source: str) -> Any:
    """The object that one of Dynamo's sources stands for, in the function that is traced now."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    output = InstructionTranslator.current_tx().output
    return eval(source, {"L": output.local_scope, "G": output.global_scope})


def _describe(source: str, tensor: Any) -> str:
    found = _LAST_NAME.match(source)
    name = f"{found[1]}{source[found.end() :]}" if found else source
    return f"{name} {str(tensor.dtype).removeprefix('torch.')} {[str(n) for n in tensor.shape]}".replace("'", "")


def _is_ids(tensor: Any) -> bool:
    return tensor.dim() == 2 and tensor.dtype == torch.int64


def _arguments(nodes: Sequence[Node], inputs: Sequence[Any], base: str) -> Iterator[tuple[int, str]]:
    """Index and source of every tensor that is an argument of the call, and no part of the module."""
    for i, (node, given) in enumerate(zip(nodes, inputs, strict=True)):
        source = _source(node)
        if isinstance(given, Tensor) and not source.startswith(base):
            yield i, source


def read_call(graph: GraphModule, inputs: Sequence[Any]) -> Call:
    """The call that a graph stands for; inputs are the example arguments that Dynamo gives beside it.

    Raises UnsupportedModelError when it is no call of one module with token ids that returns logits: a cache goes in or
    out, other tensors go in, or several come out.
    """
    nodes = [n for n in graph.graph.nodes if n.op == "placeholder"]
    sources = [_source(n) for n in nodes]
    bases = sorted({m[1] for s in sources if _OWNED.search(s) and (m := _OF_MODULE.match(s))})
    if len(bases) != 1:
        what = f"reads the weights of {len(bases)} models {bases or ''}".rstrip()
        raise UnsupportedModelError(
            WHERE, what, "torch.compile(model, ...) of the teacher itself, without graph breaks"
        )
    base = bases[0]
    weights = tuple(i for i, s in enumerate(sources) if s.startswith(base) and _OWNED.search(s))
    module = _evaluate(base)
    assert isinstance(module, nn.Module)
    found: dict[str, int] = {}
    other = []
    for i, source in _arguments(nodes, inputs, base):
        kind = "positions" if "position" in source else "mask" if "mask" in source else "ids"
        is_mask = kind == "mask" and inputs[i].dim() == 2 and not inputs[i].is_floating_point()
        if kind in found or not (is_mask or (kind != "mask" and _is_ids(inputs[i]))):
            other.append(_describe(source, inputs[i]))
        else:
            found[kind] = i
    if other or "ids" not in found:
        what = f"passes {', '.join(other[:3])}" if other else "passes no token ids"
        hint = "input_ids int64 [B, T], and by name position_ids and attention_mask; nothing else"
        raise UnsupportedModelError(WHERE, what, _NO_CACHE if "past_key_values" in what else hint)
    _check_outputs(graph)
    return Call(weakref.ref(module), found["ids"], found.get("positions"), found.get("mask"), weights)


def _check_outputs(graph: GraphModule) -> None:
    outputs = [value(n) for n in output_node(graph).args[0]]  # type: ignore[union-attr,arg-type]
    shapes = [[str(d) for d in getattr(t, "shape", ())] for t in outputs]
    if len(outputs) != 1:
        cache = any(len(s) == 4 for s in shapes)
        what = f"returns {len(outputs)} tensors" + (", among them a cache of keys and values" if cache else "")
        raise UnsupportedModelError(WHERE, what, _NO_CACHE if cache else "a call that returns the logits alone")
