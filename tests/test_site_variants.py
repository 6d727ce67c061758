"""examples/site_variants.py: every variant starts where it should, and the script goes from teacher to JSON."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from command_line import HELD_OUT, TINY
from tiny_models import VOCAB, TinyModel

from tcal_compiler.api import CALIBRATION_TEXT
from tcal_compiler.errors import UnsupportedModelError
from tcal_compiler.passes.capture import example_ids
from tcal_compiler.passes.choose import choose
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.passes.rewrite_gdn import mixer_path
from tcal_compiler.runtime.calibrate import SiteCalibrator, initialise
from tcal_compiler.runtime.config import AlignConfig
from tcal_compiler.runtime.live import capture_live
from tcal_compiler.runtime.statistics import SiteStats
from tcal_compiler.runtime.student import Student, make_student
from tcal_compiler.runtime.taps import SiteGroup, collect_taps

ROOT = Path(__file__).parents[1]
TOKENS = 24


@pytest.fixture
def variants(monkeypatch) -> tuple[ModuleType, ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("site_variants"), importlib.import_module("variant_mixer")


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    capture = capture_live(TinyModel(layers=2))
    return capture, find_attention(capture)


def started(mixers: ModuleType, teacher, name: str) -> tuple[Student, list[SiteGroup]]:
    capture, scan = teacher
    variant = mixers.Variant.of(name)
    student = mixers.with_mixers(make_student(capture, scan, choose(scan, "none")), variant)
    groups = collect_taps(student, capture.gm, example_ids(4, TOKENS, VOCAB), batch=2)
    mixers.start_(student, groups, variant, 2)
    return student, groups


@torch.no_grad()
def logits(student: Student) -> torch.Tensor:
    return student.logits(example_ids(2, 21, VOCAB))


def test_the_base_is_the_products(variants, teacher):
    student, groups = started(variants[1], teacher, "base")
    mine = logits(student)
    initialise(student := make_student(*teacher, student.plan), groups, init="closed-form", seed=0, batch=2)
    assert torch.equal(logits(student), mine)


@pytest.mark.parametrize("name", ["conv", "window", "window-8+sinks", "conv+window", "beta2"])
def test_a_variant_starts_as_the_base(variants, teacher, name):
    base, student = (logits(started(variants[1], teacher, n)[0]) for n in ("base", name))
    torch.testing.assert_close(student, base, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["kvstate-wide", "kvstate-wide-x"])
def test_a_wider_key_starts_as_the_shared_state(variants, teacher, name):
    base, shared, wide = (logits(started(variants[1], teacher, n)[0]) for n in ("base", "kvstate", name))
    torch.testing.assert_close(wide, shared, atol=1e-5, rtol=0)
    assert (shared - base).abs().max() > 1e-4


def test_shared_states_are_those_of_heads_with_like_gates(variants, teacher):
    student, _ = started(variants[1], teacher, "kvstate")
    plain, _ = started(variants[1], teacher, "base")
    for site in student.converted:
        shared, own = (s.gm.get_submodule(mixer_path(site.index)) for s in (student, plain))
        q, k, v = (torch.randn(2, n, TOKENS, 8) for n in (4, 2, 2))
        with torch.no_grad():
            for mixer in (shared, own):
                for p in (mixer.dt_bias, mixer.b_proj.bias):
                    p.copy_(torch.tensor([0.3, 0.3, -1.0, -1.0]))
            x = torch.randn(2, TOKENS, site.hidden)
            torch.testing.assert_close(shared.core(q, k, v, x), own.core(q, k, v, x))


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("length", [2, 8, 21])
def test_window_attention_is_masked_attention(variants, length, sinks):
    q, k, v = (torch.randn(2, n, length, 8) for n in (4, 2, 2))
    far = torch.arange(length)[:, None] - torch.arange(length)
    seen = (far >= 0) & ((far < 8) | (torch.arange(length) < sinks))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.3, enable_gqa=True)
    found = variants[1].window_attention(q, k, v, scale=0.3, window=8, sinks=sinks)
    torch.testing.assert_close(found, expected)


def test_the_convolution_is_causal(variants):
    x, taps = torch.randn(1, 2, 6, 3), torch.randn(4, 2, 3)
    found = variants[1].convolve(x, taps)
    expected = sum(taps[j] * x[0, :, 5 - j] for j in range(4))
    torch.testing.assert_close(found[0, :, 5], expected)
    torch.testing.assert_close(found[0, :, 0], taps[0] * x[0, :, 0])


@pytest.mark.parametrize("name", ["window-fit", "window-only"])
def test_a_window_over_everything_is_fitted_to_be_the_teacher(variants, teacher, name):
    student, groups = started(variants[1], teacher, name)  # 64 tokens of 24
    for site in student.converted:
        scale = student.gm.get_submodule(mixer_path(site.index)).window_scale
        torch.testing.assert_close(scale, torch.ones_like(scale), atol=0.02, rtol=0)
    assert all(SiteCalibrator(student, g, i, 2).error() < 1e-3 for g in groups for i in range(len(g.sites)))


def test_what_needs_a_window_is_refused_without(variants, teacher):
    with pytest.raises(UnsupportedModelError, match="gets no window"):
        started(variants[1], teacher, "sinks")


def test_distances_beyond_the_window(variants):
    stats = SiteStats(2, {"mass": 2 * torch.tensor([[0.5, 0.3, 0.0, 0.1, 0.1]])})  # 0, 1, 2-3, 4-7, 8-15
    assert variants[1].far_distance(stats, 4).tolist() == pytest.approx([(6 * 0.1 + 12 * 0.1) / 0.2])


def test_entropy_of_even_attention_is_1(variants):
    site = SimpleNamespace(window=None, scale=1.0, num_kv_heads=2)
    q, k = torch.zeros(3, 4, 10, 8), torch.randn(3, 2, 10, 8)
    job = SimpleNamespace(site=site, rows=lambda: [(None, (q, k, k), None)] * 2)
    torch.testing.assert_close(variants[1].relative_entropy(job).float(), torch.ones(4))


def test_the_losses_of_other_trainers(variants, teacher):
    script = variants[0]
    student, groups = started(variants[1], teacher, "base")
    (group,) = groups
    config = AlignConfig(steps=3, batch=2, clip=1e9)
    plain = script.GroupTrainer(student, group, 3, config)
    stream = torch.rand(*group.y.shape[:3], 1).expand_as(group.y) + 0.5
    target = script.weighted(group.y, stream)
    residual = script.ResidualTrainer(student, script.replace(group, y=target), 3, config)
    wrong = ((plain._forward(group.x) - group.y) / stream).square().mean((1, 2, 3))
    power = (group.y / stream)[:, :3].square().mean((1, 2, 3))
    torch.testing.assert_close(residual.losses(group.x, target), wrong / power)
    known = {s.index: 1000.0 + s.index for s in group.sites}
    by_site = script.SiteWeightedTrainer(student, group, 3, config, weights=known)
    factors = torch.tensor(list(known.values()))
    torch.testing.assert_close(by_site.losses(group.x, group.y), plain.losses(group.x, group.y) * factors)
    for step in range(3):
        for trainer in (plain, by_site):
            trainer.step(step, group.x[:, :2], group.y[:, :2], 0)
    for name, p in plain.params.items():  # constants change nothing, but for the epsilon of AdamW
        torch.testing.assert_close(by_site.params[name], p, atol=2e-3, rtol=1e-2)


def test_the_residual_stream_is_what_y_is_added_to(variants, teacher):
    capture, scan = teacher
    for site in scan.sites:
        name = variants[0].residual_stream(capture.gm, site)
        node = next(n for n in capture.gm.graph.nodes if n.name == name)
        assert site.y in {n.name for n in node.all_input_nodes}


def test_an_unknown_variant_is_refused(variants):
    with pytest.raises(ValueError, match="no variant wide; there are base, conv"):
        variants[1].Variant.of("conv+wide")


def test_one_command_gives_the_json(variants, tmp_path, monkeypatch):
    out = tmp_path / "variants.json"
    names = (
        "base,conv+window-fit-8+sinks+far+beta2,window-only-8,kvstate-wide-x,residual-loss,site-weights,batch2+rate2"
    )
    words = [TINY, "--tokenizer", "bytes", "--policy", "none", "--calib", CALIBRATION_TEXT, "--sequences", 6]
    words += [
        "--init-sequences",
        4,
        "--holdout",
        2,
        "--length",
        32,
        "--batch",
        2,
        "--steps",
        3,
        "--distill-steps",
        1,
        "--distill-recompute",
    ]
    words += ["--eval", f"books={HELD_OUT}", "--eval-length", 32, "--eval-sequences", 1, "--device", "cpu"]
    words += ["--variants", names, "--json", out]
    monkeypatch.setattr(sys, "argv", ["site_variants.py", *map(str, words)])
    variants[0].main()
    body = json.loads(out.read_text())
    assert body["site_variants"].keys() == set(names.split(","))
    assert body["scores"].keys() == {f"{n}, {s}" for n in names.split(",") for s in ("aligned", "distilled")}
    rows = body["site_variants"]
    assert rows["base"]["extra_state_bytes"] == rows["base"]["extra_parameters"] == 0
    assert all(r["mean_aligned"] < r["mean_start"] for r in rows.values())
    assert rows["kvstate-wide-x"]["extra_state_bytes"] == 0 < rows[names.split(",")[1]]["extra_state_bytes"]
    assert rows["batch2+rate2"]["mean_aligned"] != rows["base"]["mean_aligned"]
    page = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", ["write_results.py", str(tmp_path), "--out", str(page)])
    importlib.import_module("write_results").main()
    assert "| base | 1." in page.read_text() and "| +0 | +0 |" in page.read_text()
