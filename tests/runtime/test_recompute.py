"""Gradient checkpointing of a student's graph: the same bits from less memory, and a refusal where it could not be."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCAB, llama, scanned, student_of
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

from tcal_compiler.errors import StageError
from tcal_compiler.passes.capture import example_ids
from tcal_compiler.passes.choose import choose
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.passes.local_windows import with_local_windows
from tcal_compiler.runtime.logits import split_model
from tcal_compiler.runtime.recompute import recompute_between, segments
from tcal_compiler.runtime.student import Student, make_student

IDS = example_ids(2, 33, VOCAB, seed=2)


def llama_student() -> Student:
    from tcal_compiler.passes.capture import capture_program, export_module

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama(num_hidden_layers=3)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.model(input_ids, use_cache=False).logits

    model = Logits().eval()
    program = export_module(model, has_positions=False, vocab_size=VOCAB)
    capture = capture_program(program, teacher=model, implementation="test", shapes=((2, 9),))
    scan = find_attention(capture)
    return make_student(capture, scan, choose(scan, "keep=1"))


def windowed_student() -> Student:
    capture, scan = scanned("is_causal", layers=3)
    student = make_student(capture, with_local_windows(scan, 8), choose(scan, "keep=1"))
    for name, p in student.gm.named_parameters():
        p.data.fill_(0.5) if name.endswith("local_scale") else None
    return student


STUDENTS = {
    "local windows": windowed_student,
    "tied": lambda: student_of("is_causal", "keep=1", tied=True, bias=True, layers=3),
    "written out": lambda: student_of("written out", "keep=1"),
    "Llama": llama_student,
}


def saved_bytes(student: Student, body, ids: Tensor) -> tuple[list[Tensor], list[Tensor], int]:
    """Outputs, gradients, and bytes kept for the backward pass besides the parameters."""
    parameters = list(student.gm.parameters())
    seen, kept = {p.untyped_storage().data_ptr(): p for p in parameters}, 0

    def pack(t: Tensor) -> Tensor:
        nonlocal kept
        storage = t.untyped_storage()
        if storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = t  # kept alive, so that no address is used twice
            kept += storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = body(ids)
    gradients = torch.autograd.grad(sum(x.square().mean() for x in out), parameters, allow_unused=True)
    return list(out), [torch.zeros(0) if g is None else g for g in gradients], kept


@pytest.mark.parametrize("name", STUDENTS)
def test_the_same_bits_from_less_memory(name):
    student = STUDENTS[name]()
    for p in student.gm.parameters():
        p.requires_grad_()
    taps = [s.y for s in student.converted]
    body = split_model(student.gm, taps).body
    again = recompute_between(body, [s.y for s in student.sites])
    assert len(again.meta["partition_names"]) == len(student.sites) + 1
    out, gradients, kept = saved_bytes(student, body, IDS)
    out_again, gradients_again, kept_again = saved_bytes(student, again, IDS)
    assert all(torch.equal(a, b) for a, b in zip(out, out_again, strict=True))
    assert sum(g.numel() > 0 and bool(g.any()) for g in gradients) > 10
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))
    assert kept_again < 0.3 * kept
    other = IDS[:1, :7]  # lengths are free as before
    assert all(torch.equal(a, b) for a, b in zip(body(other), again(other), strict=True))


class Writes(nn.Module):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        aten = torch.ops.aten
        a = aten.mul.Tensor(x, 2.0)
        cut = aten.add.Tensor(a, 1.0)
        b = aten.mul.Tensor(cut, 3.0)
        base = {"inside": b, "another": a, "input": x}[self.where]
        aten.add_.Tensor(aten.view.default(base, [-1]), 1.0)
        return aten.add.Tensor(aten.add.Tensor(a, b), x)


@pytest.mark.parametrize("where", ["inside", "another", "input"])
def test_writing_across_a_cut_is_refused(where):
    gm = symbolic_trace(Writes(where))
    cut = next(n.name for n in gm.graph.nodes if n.target is torch.ops.aten.add.Tensor)

    def split() -> GraphModule:
        return recompute_between(gm, [cut])

    if where == "inside":
        x = torch.ones(2, 3)
        assert torch.equal(split()(x), gm(x))
        return
    with pytest.raises(StageError, match="writes into") as e:
        split()
    assert "checkpoint_activations = false" in e.value.hint
    with pytest.raises(StageError, match=r"shard: .* writes into") as e:
        segments(gm, [cut], "shard")
    assert "shard = false" in e.value.hint
