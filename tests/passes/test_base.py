"""The runner believes no pass: each lie is caught and named as our bug."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from tcal_compiler.errors import PassError, UnsupportedModelError
from tcal_compiler.passes.base import PassResult, run_passes
from tcal_compiler.passes.graph import aten, from_program, output_node, placeholders


class Add(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + 1).relu()


def graph() -> GraphModule:
    return from_program(torch.export.export(Add(), (torch.ones(2, 3),)))


@dataclass(frozen=True)
class Scripted:
    """Does one thing to the graph and claims another."""

    deed: str
    claims: int = 1

    def run(self, gm: GraphModule) -> PassResult:
        x, last = placeholders(gm)[0], output_node(gm)
        if self.deed == "edit":
            with gm.graph.inserting_before(last):
                new = gm.graph.call_function(aten.neg.default, (last.args[0],))
                new.meta = dict(last.args[0].meta)
                last.args = (new,)
        elif self.deed == "border":
            with gm.graph.inserting_before(last):
                new = gm.graph.call_function(aten.sum.default, (x,))
                new.meta["val"] = x.meta["val"].sum()
                last.args = (new,)
        elif self.deed == "broken graph":
            first = next(n for n in gm.graph.nodes if n.op == "call_function")
            gm.graph.inserting_before(x)
            first.prepend(last)
        elif self.deed == "crash":
            raise KeyError("lost")
        elif self.deed == "user's fault":
            raise UnsupportedModelError("x", "not ours")
        return PassResult(self.claims)

    def ensures(self, gm: GraphModule) -> None:
        assert self.deed != "unfulfilled"


@pytest.mark.parametrize(
    "deed, claims, message",
    [
        ("edit", 0, "miscounted: it says changed=0"),
        ("nothing", 1, "miscounted: it says changed=1"),
        ("border", 1, "moved the graph's border"),
        ("broken graph", 1, "Scripted failed"),
        ("crash", 1, "Scripted failed .KeyError"),
        ("unfulfilled", 0, "Scripted failed .AssertionError"),
    ],
)
def test_a_lie_is_caught(deed, claims, message):
    with pytest.raises(PassError, match=message):
        run_passes(graph(), [Scripted(deed, claims)])


def test_honest_passes_run_in_order_and_report():
    gm = graph()
    done = run_passes(gm, [Scripted("nothing", 0)])
    assert done == {"Scripted": PassResult(0)}
    run_passes(gm, [Scripted("edit")])
    assert torch.equal(gm(torch.zeros(2, 3)), -torch.ones(2, 3))


def test_what_is_the_users_fault_passes_through():
    with pytest.raises(UnsupportedModelError):
        run_passes(graph(), [Scripted("user's fault")])
