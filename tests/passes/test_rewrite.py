"""The rewrite puts mixers where the plan says, and changes nothing else."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCAB, TinyModel, capture_of, scanned, student_of
from torch import Tensor, nn

from tcal_compiler.errors import PassError, UnsupportedModelError
from tcal_compiler.passes.base import PassResult, run_passes
from tcal_compiler.passes.capture import capture_program, example_ids
from tcal_compiler.passes.choose import choose
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.passes.graph import by_name, copy_module
from tcal_compiler.passes.rewrite_gdn import RewriteToGdn
from tcal_compiler.passes.types import AttentionSite, Plan, SiteScan
from tcal_compiler.runtime.student import make_student
from tcal_compiler.runtime.weights import unique_state

IDS = example_ids(2, 13, VOCAB)


class SoftmaxMixer(nn.Module):
    """The attention itself, as a mixer."""

    def __init__(self, site: AttentionSite) -> None:
        super().__init__()
        self.scale = site.scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=True
        )


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    for p in model.parameters():
        p.requires_grad_(True)
    logits = model(IDS)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_nothing_converted_is_the_teacher_in_logits_and_gradients():
    model = TinyModel("mask", tied=True, bias=True)
    capture = capture_of(model)
    scan = find_attention(capture)
    student = make_student(capture, scan, choose(scan, "all"))
    for batch, length in ((2, 5), (1, 40)):
        ids = example_ids(batch, length, VOCAB, seed=3)
        assert torch.equal(student.logits(ids), model(ids))
    theirs, mine = gradients(model), gradients(student.gm)
    assert len(mine) == len(theirs) == len(list(model.parameters()))
    for name, grad in mine.items():  # a tied parameter may have taken its other name
        other = {"embed.weight": "head.weight", "head.weight": "embed.weight"}.get(name, name)
        assert torch.equal(grad, theirs.get(name, theirs.get(other))), name


@pytest.mark.parametrize("policy", ["none", "keep=0"])
def test_exact_mixers_give_the_teachers_bits_and_export_again(policy):
    capture, scan = scanned("is_causal")
    gm, plan = copy_module(capture.gm), choose(scan, policy)
    done = run_passes(gm, [RewriteToGdn(plan, scan.sites, SoftmaxMixer)])
    assert done["RewriteToGdn"].changed == len(plan.convert)
    assert sum(n.op == "call_module" for n in gm.graph.nodes) == len(plan.convert)
    for length in (5, 31):
        ids = example_ids(2, length, VOCAB, seed=length)
        assert torch.equal(gm(ids), capture.gm(ids))


def test_a_half_converted_student_exports_again():
    student = student_of("is_causal", "keep=0")
    again = capture_program(student.export(), teacher=student.gm, implementation="student", shapes=((3, 7), (1, 21)))
    assert all(c.measured == 0 for c in again.checks)
    assert [s.index for s in find_attention(again).sites] == [0]  # the one that stayed


def test_ties_are_kept_and_saved_once():
    student = student_of("is_causal", "none", tied=True)
    tied = [n for n, p in student.gm.named_parameters(remove_duplicate=False) if p.shape == (VOCAB, 32)]
    assert len({student.gm.get_parameter(n).data_ptr() for n in tied}) == 1
    assert sum(n in unique_state(student) for n in tied) == 1


def test_the_teachers_graph_and_weights_are_left_alone():
    capture, _ = scanned("is_causal")
    code, before = capture.gm.code, capture.gm(IDS)
    student = student_of("is_causal", "none")
    with torch.no_grad():
        for p in student.gm.parameters():
            p.zero_()
    assert capture.gm.code == code and torch.equal(capture.gm(IDS), before)


def test_nothing_to_do_and_a_lie():
    capture, scan = scanned("is_causal")
    gm = copy_module(capture.gm)
    result = run_passes(gm, [RewriteToGdn(choose(scan, "all"), scan.sites, SoftmaxMixer)])["RewriteToGdn"]
    assert result == PassResult(0)
    lie = Plan((0, 1), (), "a plan whose kept site is not there")
    gm.graph.erase_node(_unlinked(gm, scan))
    with pytest.raises(PassError, match="RewriteToGdn failed"):
        run_passes(gm, [RewriteToGdn(lie, scan.sites, SoftmaxMixer)])


def _unlinked(gm, scan: SiteScan):
    core = by_name(gm)[scan.sites[0].anchor]
    core.replace_all_uses_with(by_name(gm)[scan.sites[0].q])
    return core


def test_no_site_is_a_typed_error():
    capture, scan = scanned("quadratic bias", layers=1)
    with pytest.raises(UnsupportedModelError, match="position bias"):
        make_student(capture, scan, Plan((), (), "none"))
