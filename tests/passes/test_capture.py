"""A capture is the teacher bit for bit, or it is refused."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCAB, WIDTH, Bag, TinyModel, capture_of, program_of
from torch import Tensor, nn

from tcal_compiler.errors import UnsupportedModelError
from tcal_compiler.passes.capture import capture_program, example_ids, require_causal
from tcal_compiler.runtime.capture_teacher import capture_teacher
from tcal_compiler.runtime.teacher import Teacher


@pytest.mark.parametrize("tied", [False, True])
def test_bit_equal_at_lengths_that_were_never_traced(tied):
    model = TinyModel("mask", tied=tied)
    capture = capture_of(model, shapes=((3, 7), (1, 1)))
    assert [c.measured for c in capture.checks] == [0.0, 0.0] and capture.vocab_size == VOCAB
    for batch, length in ((1, 2), (5, 61)):
        ids = example_ids(batch, length, VOCAB, seed=9)
        assert torch.equal(capture.gm(*capture.inputs(ids)), model(ids))
    names = [n for n, _ in capture.gm.named_parameters()]
    assert sum(n.endswith(("embed.weight", "head.weight")) for n in names) == (1 if tied else 2)


class Specialised(nn.Module):
    """Export freezes a number that depends on the length."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TinyModel("scale by length", layers=1)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(input_ids)


class Otherwise(TinyModel):
    """Rounds otherwise while it is exported, as the chunked delta rule of transformers does."""

    def forward(self, input_ids: Tensor) -> Tensor:
        logits = super().forward(input_ids)
        return logits / 3 if torch.compiler.is_exporting() else logits * (1 / 3)


def test_a_model_that_computes_otherwise_while_it_is_exported_is_refused_for_that():
    with pytest.raises(UnsupportedModelError, match=r"asks torch\.compiler\.is_exporting\(\)"):
        capture_of(Otherwise(layers=1))


def test_a_graph_that_differs_is_refused_with_the_measured_error():
    with pytest.raises(UnsupportedModelError, match=r"differs from the model: .*T=9 by \d.*allowed 0") as e:
        capture_of(Specialised())
    assert e.value.hint


def test_the_comparison_is_not_of_the_graph_with_itself():
    model, other = TinyModel(layers=1), TinyModel(layers=1, seed=1)
    with pytest.raises(UnsupportedModelError, match="differs"):
        capture_program(program_of(model), teacher=other, implementation="test", shapes=((1, 3),))


class Bounded(nn.Module):
    """Learned positions for 40 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(40, VOCAB), Bag()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(input_ids) + self.table(torch.arange(input_ids.shape[1]))


def test_a_short_context_is_captured_within_its_bound():
    teacher = Teacher("t", "factory", Bounded().eval(), None, None, {"vocab_size": VOCAB, "context_length": 40})
    capture = capture_teacher(teacher)
    assert "T=40" in capture.checks[-1].name and all(c.passed for c in capture.checks)
    assert require_causal(capture, context=40).measured == 0.0
    assert require_causal(capture, context=2).measured == 0.0


def test_what_torch_export_cannot_trace_says_how_to_go_on():
    class Branches(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return torch.ones(*input_ids.shape, 3) if input_ids.sum() > 0 else torch.zeros(*input_ids.shape, 3)

    teacher = Teacher("branches", "factory", Branches(), None, None, {"vocab_size": VOCAB})
    with pytest.raises(UnsupportedModelError, match=r"branches: torch\.export cannot capture it"):
        capture_teacher(teacher)


class Peek(nn.Module):
    """Attention that is causal, and something else that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.mix = TinyModel(layers=1), nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(input_ids) + self.inner(input_ids.flip(1)).mean(1, keepdim=True)


@pytest.mark.parametrize("model", [Peek(), TinyModel("prefix", layers=1)], ids=["beside attention", "in attention"])
def test_a_model_that_sees_later_tokens_is_found_out(model):
    with pytest.raises(UnsupportedModelError, match=r"not causal: .* changes the logits of token \d+ by"):
        require_causal(capture_of(model))


def test_causal_models_pass():
    assert require_causal(capture_of(TinyModel("mask"))).measured == 0.0
