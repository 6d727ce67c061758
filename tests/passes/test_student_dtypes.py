"""Whole students in half precision, of head dims that are no powers of two and of the largest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import assert_within_budget
from tiny_models import VOCAB, llama

from tcal_compiler.passes.capture import capture_program, example_ids
from tcal_compiler.passes.choose import choose
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.passes.graph import widen_to_float64
from tcal_compiler.passes.make_stateful import make_stateful, run_chunks
from tcal_compiler.passes.types import Capture
from tcal_compiler.runtime.capture_teacher import capture_teacher
from tcal_compiler.runtime.initialize import naive_
from tcal_compiler.runtime.student import make_student
from tcal_compiler.runtime.teacher import live_teacher

IDS = example_ids(2, 70, VOCAB, seed=1)
CUT = 40


def captures(dtype: torch.dtype, head_dim: int) -> tuple[Capture, Capture]:
    """A transformers teacher of two layers, and its student with one of them converted, all in one dtype."""
    module = llama(use_cache=False, head_dim=head_dim, num_attention_heads=2, num_key_value_heads=1).to(dtype)
    teacher = capture_teacher(live_teacher(module, "test"))
    scan = find_attention(teacher)
    made = make_student(teacher, scan, choose(scan, "keep=0"))
    for site in made.converted:
        assert (site.key_dim, site.value_dim) == (head_dim, head_dim)
        naive_(made.gm.get_submodule(f"tcal_mixers.{site.index}"), torch.Generator().manual_seed(1))
    made.gm.to(dtype)
    return teacher, capture_program(made.export(), teacher=made.gm, implementation="student", shapes=((2, 9),))


def logits(capture: Capture, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return capture.gm(*capture.inputs(ids))


@pytest.mark.parametrize(
    "dtype, head_dim",
    [
        (torch.float16, 12),
        (torch.bfloat16, 80),
        pytest.param(torch.float16, 256, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 16, marks=pytest.mark.slow),
        pytest.param(torch.float32, 200, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_student_rounds_no_more_than_its_teacher_sees_nothing_later_and_may_be_cut(dtype, head_dim):
    teacher, student = captures(dtype, head_dim)
    exact, own = (logits(replace(c, gm=widen_to_float64(c.gm))) for c in (teacher, student))
    rounding = (logits(teacher) - exact) / exact.square().mean().sqrt() * own.square().mean().sqrt()
    whole = logits(student)
    stateful = make_stateful(student, verify=False)
    pieces, states = run_chunks(stateful, IDS, (CUT - 1, 1, IDS.shape[1] - CUT), dtype=dtype)
    assert {whole.dtype, pieces.dtype, *(s.dtype for s in states)} == {dtype}
    for name, actual in (("whole", whole), ("in pieces", pieces)):
        assert_within_budget(name, actual=actual, exact=own, naive=own + rounding)
    later = torch.cat([IDS[:, :CUT], (IDS[:, CUT:] + 1) % VOCAB], 1)
    assert torch.equal(logits(student, later)[:, :CUT], whole[:, :CUT])
