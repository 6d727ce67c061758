"""Families of models: what is found in each, or why not. All of them: examples/families.py."""

from __future__ import annotations

import importlib.util
import re
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

_SPEC = importlib.util.spec_from_file_location(
    "family_models", Path(__file__).parents[2] / "examples" / "family_models.py"
)
family_models = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(family_models)
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
    ("Mistral (sliding window)", "eager", KV_HEADS, [8, 8]),
    ("Gemma3", "eager", KV_HEADS, [8, None]),
    ("Falcon", "eager", 1, [None, None]),
    ("DeepSeek-V3", "sdpa", HEADS, [None, None]),  # in-place writes in its router
]


@pytest.mark.parametrize("family, implementation, kv_heads, windows", FOUND)
def test_families_whose_attention_is_found(family, implementation, kv_heads, windows):
    capture, scan = captured(family_models.transformers_model(family, implementation))
    assert not scan.rejected and [s.window for s in scan.sites] == windows
    assert [s.num_kv_heads for s in scan.sites] == [kv_heads] * 2
    assert not any(is_mutation(n) for n in capture.gm.graph.nodes)
    assert_sites_are_right(capture, scan)


REFUSED = [
    ("Gemma2", "soft-capped scores"),
    ("GPT-OSS", "attention sinks"),
    ("BLOOM", r"position bias on the scores: adds values up to \d"),
]


@pytest.mark.parametrize("family, reason", REFUSED)
def test_families_that_are_refused(family, reason):
    _, scan = captured(family_models.transformers_model(family, "eager"))
    assert not scan.sites and len(scan.rejected) == 2
    assert all(re.search(reason, r.reason) for r in scan.rejected), scan.rejected


@pytest.mark.parametrize("name", ["nn.MultiheadAttention, need_weights", "nn.TransformerEncoderLayer"])
def test_modules_that_put_tokens_before_the_batch(name):
    capture, scan = captured(family_models.plain_model(name))
    assert len(scan.sites) == 2 and not scan.rejected
    assert_sites_are_right(capture, scan)
