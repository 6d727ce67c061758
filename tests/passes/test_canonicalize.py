"""Nodes that do nothing go; values and everything else stay."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCAB, TinyModel, program_of
from torch import Tensor, nn

from tcal_compiler.passes.base import PassResult, op_counts, run_passes
from tcal_compiler.passes.canonicalize import FreeViews, RemoveNoOps
from tcal_compiler.passes.graph import copy_module, from_program


class Spellings(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.drop = kind, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = {
            "same cast": lambda: x.to(torch.float32),
            "other cast": lambda: x.to(torch.float64),
            "detach": lambda: x.detach(),
            "full slice": lambda: x[:],
            "short slice": lambda: x[:, 1:],
            "step": lambda: x[:, ::2],
            "dropout off": lambda: self.drop(x),
            "copy": lambda: x.to(torch.float32, copy=True),
        }[self.kind]()
        return y * 2


def graph(module: nn.Module, x: Tensor):
    return from_program(torch.export.export(module.eval(), (x,)))


@pytest.mark.parametrize(
    "kind, gone",
    [
        ("same cast", True),
        ("detach", True),
        ("full slice", True),
        ("dropout off", True),
        ("other cast", False),
        ("short slice", False),
        ("step", False),
        ("copy", False),
    ],
)
def test_only_what_does_nothing_goes(kind, gone):
    x = torch.randn(3, 4)
    gm = graph(Spellings(kind), x)
    before = gm(x)
    run_passes(gm, [RemoveNoOps()])
    assert (sum(op_counts(gm).values()) == 1) == gone, gm.code
    assert torch.equal(gm(x), before) and gm(x).dtype == before.dtype


class WritesToACopy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("start", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float32, copy=True).add_(1)
        return x + y + torch.tensor([1.0, 2.0]).add_(x)


def test_a_copy_that_is_written_to_stays():
    x = torch.randn(2)
    gm = graph(WritesToACopy(), x)
    run_passes(gm, [RemoveNoOps()])
    for _ in range(2):
        assert torch.equal(gm(x.clone()), WritesToACopy()(x.clone()))


def test_a_second_run_finds_nothing():
    gm = graph(Spellings("same cast"), torch.ones(2, 2))
    run_passes(gm, [RemoveNoOps()])
    assert run_passes(gm, [RemoveNoOps()])["RemoveNoOps"] == PassResult(0)


def test_training_dropout_is_not_removed():
    program = torch.export.export(Spellings("dropout off").train(), (torch.ones(2, 2),))
    gm = from_program(program)
    run_passes(gm, [RemoveNoOps()])
    assert any("dropout" in name for name in op_counts(gm))


def test_a_model_keeps_its_bits():
    model = TinyModel("mask")
    gm = from_program(program_of(model))
    ids = torch.arange(26).view(2, 13) % VOCAB
    result = run_passes(gm, [RemoveNoOps()])["RemoveNoOps"]
    assert result.changed > 0 and torch.equal(gm(ids), model(ids))


class ViewsWhatItMade(nn.Module):
    """The view works because relu keeps the strides of its argument."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).relu().transpose(0, 1).view(6, 4)


def test_a_view_survives_a_replacement_with_other_strides():
    x = torch.randn(2, 3, 4)
    gm = graph(ViewsWhatItMade(), x)
    for passes in ([], [FreeViews()]):
        run_passes(gm, passes)
        copy = graph_with_packed_relu(gm)
        if passes:
            assert torch.equal(copy(x), x.relu().view(6, 4))
        else:
            with pytest.raises(RuntimeError, match="view size is not compatible"):
                copy(x)
    assert run_passes(gm, [FreeViews()])["FreeViews"] == PassResult(0)


def graph_with_packed_relu(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    copy = copy_module(gm)
    (relu,) = (n for n in copy.graph.nodes if "relu" in str(n.target))
    with copy.graph.inserting_after(relu):
        packed = copy.graph.call_function(torch.ops.aten.contiguous.default, (relu,))
    relu.replace_all_uses_with(packed, delete_user_cb=lambda user: user is not packed)
    copy.recompile()
    return copy
