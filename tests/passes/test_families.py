"""Families of models: what is found in each, or why not. All of them, and all that is asked: examples/families.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny_models import recomputed
from torch import nn

from tcal_compiler.passes.capture import example_ids
from tcal_compiler.passes.choose import choose
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.passes.graph import by_name, is_mutation, value
from tcal_compiler.passes.types import Capture, SiteScan
from tcal_compiler.runtime.capture_teacher import capture_teacher
from tcal_compiler.runtime.student import make_student
from tcal_compiler.runtime.teacher import Teacher

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import families
import family_models

VOCAB, HEADS, KV_HEADS = family_models.VOCAB, family_models.HEADS, family_models.KV_HEADS
IDS = example_ids(2, 13, VOCAB)


def captured(model: nn.Module) -> tuple[Capture, SiteScan]:
    info = {"vocab_size": VOCAB, "context_length": family_models.TABLE}
    capture = capture_teacher(Teacher("t", "factory", model, None, None, info), shapes=((2, 9),))
    return capture, find_attention(capture)


def assert_sites_are_right(capture: Capture, scan: SiteScan) -> None:
    batch_and_tokens = value(by_name(capture.gm)["input_ids"]).shape
    for site in scan.sites:
        torch.testing.assert_close(*recomputed(capture, site), rtol=0, atol=1e-5)
        for name in (site.x, site.y):  # in the teacher's own graph, batch first
            assert str(value(by_name(capture.gm)[name]).shape[:2]) == str(batch_and_tokens)
    student = make_student(capture, scan, choose(scan, "all"))
    assert torch.equal(student.logits(IDS), capture.gm(*capture.inputs(IDS)))


FOUND = [
    ("Mistral (sliding window)", "eager", KV_HEADS, [8, 8], "plain"),
    ("Gemma3", "eager", KV_HEADS, [8, None], "plain"),
    pytest.param("Falcon", "eager", 1, [None, None], "plain", marks=pytest.mark.slow),
    # in-place writes in its router
    pytest.param("DeepSeek-V3", "sdpa", HEADS, [None, None], "plain", marks=pytest.mark.slow),
    pytest.param("GPT-OSS", "eager", KV_HEADS, [8, None], "sinks", marks=pytest.mark.slow),
    ("BLOOM", "eager", HEADS, [None, None], "alibi"),
]


@pytest.mark.parametrize("family, implementation, kv_heads, windows, scores", FOUND)
def test_families_whose_attention_is_found(family, implementation, kv_heads, windows, scores):
    capture, scan = captured(family_models.transformers_model(family, implementation))
    assert not scan.rejected and [s.window for s in scan.sites] == windows
    assert [(s.num_kv_heads, s.scores) for s in scan.sites] == [(kv_heads, scores)] * 2
    assert not any(is_mutation(n) for n in capture.gm.graph.nodes)
    assert_sites_are_right(capture, scan)


@pytest.mark.slow
def test_a_family_goes_all_the_way():
    """Soft-capped scores, one layer with a window that is converted, one that stays."""
    row = families.Row("Gemma2", "eager")
    families.examine(row)
    assert (row.cores, row.sites, row.windows, row.scores, row.refused) == ("2", "2", "8", "soft cap 50", "none")
    assert (row.same, row.half) == ("equal", "1 of 2")
    assert row.stateful.startswith("equal (") and row.onnx.startswith("equal ("), row


@pytest.mark.parametrize("name", ["nn.MultiheadAttention, need_weights", "nn.TransformerEncoderLayer"])
def test_modules_that_put_tokens_before_the_batch(name):
    capture, scan = captured(family_models.plain_model(name))
    assert len(scan.sites) == 2 and not scan.rejected
    assert_sites_are_right(capture, scan)
