"""Every attention core becomes a site or a refusal with its reason."""

from __future__ import annotations

import math
import re

import pytest
import torch
from tiny_models import (
    DIM,
    HEADS,
    KV_HEADS,
    VOCAB,
    WIDTH,
    Bag,
    TinyModel,
    capture_of,
    llama,
    program_of,
    recomputed,
    scanned,
)
from torch.export import export

from tcal_compiler.passes.capture import capture_program
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.passes.graph import by_name
from tcal_compiler.runtime.capture_teacher import capture_teacher
from tcal_compiler.runtime.teacher import Teacher

IDS = torch.arange(22).view(2, 11) % VOCAB

EXACT = [
    ("is_causal", {}, KV_HEADS),
    ("mask", {}, KV_HEADS),
    ("additive mask", {}, KV_HEADS),
    ("scale", {}, KV_HEADS),
    ("window", {}, KV_HEADS),
    ("window and first", {}, KV_HEADS),
    ("alibi", {}, KV_HEADS),
    ("expand", {}, KV_HEADS),
    ("written out", {}, KV_HEADS),
    ("interleave", {}, KV_HEADS),
    ("tile", {}, HEADS),  # other order of heads: whole heads cannot be shared by neighbours
    ("late transpose", {}, HEADS),
    ("is_causal", {"fused": True}, KV_HEADS),
    ("is_causal", {"bias": True, "norm_qk": True}, KV_HEADS),
    ("is_causal", {"rope": False}, KV_HEADS),
    ("is_causal", {"router": True}, KV_HEADS),  # the router's softmax is no attention
]


@pytest.mark.parametrize("core, options, kv_heads", EXACT, ids=lambda v: str(v))
def test_a_site_says_what_the_core_computes(core, options, kv_heads):
    capture, scan = scanned(core, layers=1, **options)
    assert len(scan.sites) == 1 and not scan.rejected
    for i, site in enumerate(scan.sites):
        assert (site.index, site.num_heads, site.key_dim, site.hidden) == (i, HEADS, DIM, WIDTH)
        assert site.num_kv_heads == kv_heads
        assert site.window == (5 if core.startswith("window") else None)
        assert site.first == (2 if core == "window and first" else 0)
        assert site.scale == pytest.approx(0.3 if core == "scale" else 1 / math.sqrt(DIM))
        assert site.rope == options.get("rope", True)
        assert site.slopes == pytest.approx([0.1] * HEADS if core == "alibi" else [], rel=1e-6)
        assert f"blocks.{i}.attn" in site.layer and site.proof
        mine, theirs = recomputed(capture, site)
        torch.testing.assert_close(mine, theirs)
        x = by_name(capture.gm)[site.x]
        assert "layer_norm" in str(x.target)


def test_transformers_with_its_mask_subgraph():
    model = llama()
    teacher = Teacher("t", "transformers", model, None, None, {"vocab_size": VOCAB})
    capture = capture_teacher(teacher, shapes=((2, 9),))
    scan = find_attention(capture)
    assert capture.has_positions and [s.num_kv_heads for s in scan.sites] == [KV_HEADS] * 2 and not scan.rejected
    assert all(s.rope and "lower triangle" in s.proof for s in scan.sites)
    for site in scan.sites:
        torch.testing.assert_close(*recomputed(capture, site))


NEAR = [
    ("bidirectional", {}, "not causal: the mask is absent"),
    ("mask that hides nothing", {}, "not causal: the mask hides nothing"),
    ("prefix", {}, "not provably causal: the mask at T=48 row 0 sees column"),
    ("strided", {}, "hides past tokens in a pattern that is no window"),
    ("dropout", {}, "dropout 0.1 inside attention"),
    ("quadratic bias", {}, "a position bias on the scores: .* no multiple of the distance"),
    ("bidirectional", {"memory": True}, "cross attention or a constant memory"),
    ("is_causal", {"share": "k"}, "also used outside|also reads"),
    ("is_causal", {"share": "weights"}, "weight.* also used outside"),
]


@pytest.mark.parametrize("core, options, reason", NEAR, ids=lambda v: str(v)[:40])
def test_near_misses_stay_and_say_why(core, options, reason):
    layers = 2 if "share" in options else 1
    model = TinyModel(core, layers=layers, **options)
    program = program_of(model)
    shapes = () if core == "dropout" else ((2, 9),)
    scan = find_attention(capture_program(program, teacher=model, implementation="test", shapes=shapes))
    assert not scan.sites and len(scan.rejected) == layers
    for r in scan.rejected:
        assert re.search(reason, r.reason), r.reason


def test_numbers_count_refused_cores_too():
    _, scan = scanned(("is_causal", "quadratic bias", "mask"))
    assert [s.index for s in scan.sites] == [0, 2] and len(scan.rejected) == 1
    assert "blocks.1" in scan.rejected[0].layer


def test_lowered_attention_is_refused_and_not_overlooked():
    model = TinyModel()
    dims = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    program = export(model, (IDS,), dynamic_shapes=dims).run_decompositions()
    scan = find_attention(capture_program(program, teacher=model, implementation="test", shapes=()))
    assert not scan.sites and len(scan.rejected) == 2


def test_nothing_to_find():
    scan = find_attention(capture_of(Bag()))
    assert scan.sites == scan.rejected == ()
