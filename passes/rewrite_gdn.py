"""A plan becomes mixers in the graph: softmax cores are replaced, everything around them stays the teacher's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule

from .base import PassResult
from .graph import by_name, is_effect, set_module
from .types import AttentionSite, Plan

MIXERS = "tcal_mixers"


def mixer_path(index: int) -> str:
    """Module path of a converted site's mixer."""
    return f"{MIXERS}.{index}"


@dataclass(frozen=True)
class RewriteToGdn:
    """Replaces the core of each site in plan.convert by make_mixer(site)(q, k, v, x) -> [B, H, T, Dv]."""

    plan: Plan
    sites: tuple[AttentionSite, ...]
    make_mixer: Callable[[AttentionSite], nn.Module]

    def run(self, gm: GraphModule) -> PassResult:
        convert = [s for s in self.sites if s.index in self.plan.convert]
        for s in convert:
            node = by_name(gm)
            core = node[s.anchor]
            set_module(gm, mixer_path(s.index), self.make_mixer(s))
            with gm.graph.inserting_before(core):
                new = gm.graph.call_module(mixer_path(s.index), (node[s.q], node[s.k], node[s.v], node[s.x]))
            new.meta = dict(core.meta)
            core.replace_all_uses_with(new)
            gm.graph.erase_node(core)
        gm.graph.eliminate_dead_code(is_impure_node=is_effect)
        return PassResult(changed=len(convert))

    def ensures(self, gm: GraphModule) -> None:
        names = set(by_name(gm))
        assert not names & {s.anchor for s in self.sites if s.index in self.plan.convert}
        assert {s.written or s.anchor for s in self.sites if s.index in self.plan.keep} <= names
