"""Fewer spellings for matching to meet, by rewrites that do not change a value by one bit."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule, Node

from .base import PassResult
from .graph import argument, aten, inputs, is_effect, is_mutation, iter_targets, value

_ASSERTS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range")
_MAX = 9223372036854775807


_COPIES = (aten.lift_fresh_copy.default, aten._to_copy.default)


def _mutates(gm: GraphModule) -> bool:
    """An in-place op is in the graph: then a copy may be there to be written to."""
    return any(is_mutation(n) for n in gm.graph.nodes)


def _is_noop(n: Node, mutates: bool) -> bool:
    """True for a node whose value is its first argument's, same dtype, shape and strides."""
    if n.op != "call_function" or not n.args or not isinstance(n.args[0], Node):
        return False
    before, after = value(n.args[0]), value(n)
    if not (isinstance(before, Tensor) and isinstance(after, Tensor)) or before.dtype != after.dtype:
        return False
    if n.target in _COPIES and mutates:
        return False
    if n.target in (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default):
        return True
    if n.target in (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default):
        return bool(before.device == after.device and not argument(n, "copy", False))
    if n.target is aten.slice.Tensor:
        start, end, step = (*n.args[2:], *(0, _MAX, 1)[len(n.args) - 2 :])[:3]
        return bool(start in (0, None) and end in (_MAX, None) and step == 1)
    if n.target is aten.dropout.default:
        return bool(n.args[1] == 0 or n.args[2] is False)
    return False


@dataclass(frozen=True)
class PlainCopies:
    """aten.copy(target, source), which functional programs are left with and autograd lacks, becomes its value."""

    def run(self, gm: GraphModule) -> PassResult:
        copies = list(iter_targets(gm, aten.copy.default))
        for n in copies:
            target, source = n.args[:2]
            with gm.graph.inserting_before(n):
                source = gm.graph.call_function(aten.to.dtype, (source, value(n).dtype))
                source.meta = n.meta | {"val": value(inputs(source)[0]).to(value(n).dtype)}
                new = gm.graph.call_function(aten.expand_as.default, (source, target))
                new.meta = dict(n.meta)
            n.replace_all_uses_with(new)
            gm.graph.erase_node(n)
        return PassResult(len(copies))

    def ensures(self, gm: GraphModule) -> None:
        assert not list(iter_targets(gm, aten.copy.default))


@dataclass(frozen=True)
class FreeViews:
    """aten.view, which asks for strides that a replaced attention core need not have, becomes aten.reshape."""

    def run(self, gm: GraphModule) -> PassResult:
        views = list(iter_targets(gm, aten.view.default)) if not _mutates(gm) else []
        for n in views:
            n.target = aten.reshape.default
        return PassResult(len(views))

    def ensures(self, gm: GraphModule) -> None:
        assert _mutates(gm) or not list(iter_targets(gm, aten.view.default))


@dataclass(frozen=True)
class RemoveNoOps:
    """Drops assertions, aliases, casts to the same dtype, full slices and dropout that is off."""

    def run(self, gm: GraphModule) -> PassResult:
        changed, mutates = 0, _mutates(gm)
        for n in list(gm.graph.nodes):
            if n.op == "call_function" and any(a in str(n.target) for a in _ASSERTS) and not n.users:
                gm.graph.erase_node(n)
                changed += 1
            elif _is_noop(n, mutates):
                n.replace_all_uses_with(n.args[0])
                gm.graph.erase_node(n)
                changed += 1
        before = len(gm.graph.nodes)
        gm.graph.eliminate_dead_code(is_impure_node=is_effect)
        return PassResult(changed + before - len(gm.graph.nodes))

    def ensures(self, gm: GraphModule) -> None:
        mutates = _mutates(gm)
        assert not any(_is_noop(n, mutates) for n in gm.graph.nodes)
