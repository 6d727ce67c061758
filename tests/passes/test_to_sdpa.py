"""Attention that is written out is brought to one form where that is proved, and stays as it is elsewhere."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tiny_models import (
    CORES,
    DIM,
    GROUP,
    HEADS,
    KV_HEADS,
    TinyModel,
    capture_of,
    distances,
    program_of,
    recomputed,
    repeated,
    scanned,
)
from torch import Tensor

from tcal_compiler.passes.base import op_counts
from tcal_compiler.passes.capture import capture_program, example_ids
from tcal_compiler.passes.choose import choose
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.passes.make_stateful import make_stateful
from tcal_compiler.passes.site_program import tap_graph
from tcal_compiler.passes.to_sdpa import _Rewrite, to_sdpa
from tcal_compiler.runtime.initialize import naive_
from tcal_compiler.runtime.statistics import attention_statistics
from tcal_compiler.runtime.student import make_student

IDS = example_ids(2, 11, 64)
LEAST = torch.finfo(torch.float32).min


def hidden(q: Tensor) -> Tensor:
    return distances(q) < 0


def additive(q: Tensor, value: float = float("-inf")) -> Tensor:
    return torch.zeros(q.shape[2], q.shape[2]).masked_fill(hidden(q), value)


def both(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return repeated(k, "expand"), repeated(v, "expand")


def written(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """softmax(change(q k^T, q)) v with heads repeated."""

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = both(k, v)
        return change(q @ k.transpose(-1, -2), q).softmax(-1) @ v

    return core


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = both(k, v)
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) * 0.3 + additive(q)
    return torch.einsum("b h t s, b h s d -> b h t d", scores.softmax(-1), v)


def ellipsis_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = both(k, v)
    scores = torch.einsum("...id,...jd->...ij", q, k) + additive(q)
    return torch.einsum("...ij,...jd->...id", scores.softmax(-1), v)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Broadcast over the heads of a group."""
    q = q.unflatten(1, (KV_HEADS, GROUP))
    scores = (q / 3) @ k[:, :, None].transpose(-1, -2)
    y = scores.masked_fill(distances(q[:, 0]) < 0, LEAST).softmax(-1) @ v[:, :, None]
    return y.flatten(1, 2)


def bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = both(k, v)
    flat = [z.reshape(-1, z.shape[2], DIM) for z in (q, k, v)]
    scores = torch.bmm(flat[0], flat[1].transpose(1, 2)).view(-1, HEADS, q.shape[2], q.shape[2]) + additive(q, LEAST)
    p = scores.softmax(-1).view(-1, q.shape[2], q.shape[2])
    return torch.bmm(p, flat[2]).view(q.shape)


def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = both(k, v)
    flat = [z.reshape(-1, z.shape[2], DIM) for z in (q, k, v)]
    scores = torch.baddbmm(additive(q)[None], flat[0], flat[1].transpose(1, 2), alpha=0.3)
    return torch.bmm(scores.softmax(-1), flat[2]).view(q.shape)


def single_key_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhtd,bsd->bhts", q, k[:, 0]) + additive(q)
    return torch.einsum("bhts,bsd->bhtd", scores.softmax(-1), v[:, 0])


def window(scores: Tensor, q: Tensor) -> Tensor:
    far = distances(q)
    return torch.where((far >= 0) & (far < 5), scores / 2, LEAST)


def stable(scores: Tensor, q: Tensor) -> Tensor:
    scores = scores + additive(q)
    return scores - scores.max(-1, keepdim=True).values


def upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = both(k, v)
    scores = q @ k.transpose(-1, -2) / math.sqrt(DIM) + additive(q, LEAST)
    p = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(p, 0.1, training=False) @ v


SLOPES = torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None, None]
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])


def beside_sinks(scores: Tensor, first: bool = False) -> Tensor:
    """Probabilities of scores [B, H, T, T] with a sink beside them in the softmax."""
    column = SINKS.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[-2], -1)
    both = torch.cat([column, scores] if first else [scores, column], -1)
    probs = (both - both.max(-1, keepdim=True).values).softmax(-1)
    return probs[..., 1:] if first else probs[..., :-1]


def sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = both(k, v)
    return beside_sinks(q @ k.transpose(-1, -2) + additive(q, LEAST), first=True) @ v


def capped_window_with_sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = both(k, v)
    far = distances(q)
    capped = 3 * torch.tanh(q @ k.transpose(-1, -2) / math.sqrt(DIM) / 3)
    return beside_sinks(capped.masked_fill((far < 0) | (far >= 6), float("-inf"))) @ v


def alibi_of_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Slopes times the key's position, added inside the product; the mask behind it, for sequences and heads apart."""
    k, v = both(k, v)
    batch, length = q.shape[0], q.shape[2]
    flat = [z.reshape(-1, length, DIM) for z in (q, k, v)]
    bias = (SLOPES * torch.arange(length)).repeat(batch, 1, 1)
    scores = torch.baddbmm(bias, flat[0], flat[1].transpose(1, 2), beta=1.0, alpha=0.3)
    p = (scores.view(batch, HEADS, length, length) + additive(q, LEAST)).softmax(-1)
    return torch.bmm(p.view(-1, length, length), flat[2]).view(q.shape)


def soft_cap(scores: Tensor, q: Tensor) -> Tensor:
    return 5 * torch.tanh(scores / 5) + additive(q)


SPELLED: dict[str, tuple[Callable[..., Tensor], dict]] = {
    "masked_fill": (written(lambda s, q: (s / math.sqrt(DIM)).masked_fill(hidden(q), float("-inf"))), {}),
    "mask before scale": (written(lambda s, q: (s + additive(q)) * 0.25), {"scale": 0.25}),
    "upcast and dropout": (upcast, {}),
    "stable softmax": (written(stable), {"scale": 1.0}),
    "written window": (written(window), {"scale": 0.5, "window": 5}),
    "einsum": (einsum, {"scale": 0.3}),
    "einsum with ellipsis": (ellipsis_einsum, {"scale": 1.0}),
    "broadcast groups": (grouped, {"scale": 1.0}),
    "bmm": (bmm, {"scale": 1.0}),
    "baddbmm": (baddbmm, {"scale": 0.3}),
    "one key head": (single_key_head, {"scale": 1.0, "kv_heads": 1}),
    "soft cap": (written(soft_cap), {"scale": 1.0, "softcap": 5}),
    "sinks": (sinks, {"scale": 1.0, "sinks": SINKS.tolist()}),
    "capped window with sinks": (capped_window_with_sinks, {"softcap": 3, "window": 6, "sinks": SINKS.tolist()}),
    "written alibi": (
        written(lambda s, q: s - SLOPES * distances(q) + additive(q)),
        {"scale": 1.0, "slopes": SLOPES.flatten().tolist()},
    ),
    "alibi of keys": (alibi_of_keys, {"scale": 0.3, "slopes": SLOPES.flatten().tolist()}),
}
CORES |= {name: core for name, (core, _) in SPELLED.items()}


@pytest.mark.parametrize("name", SPELLED)
def test_a_spelling_is_a_site_that_says_what_it_computes(name: str):
    layers = 2 if name in ("einsum", "sinks") else 1
    capture, scan = scanned(name, layers=layers, sharp=2.0)
    plain = {"window": None, "softcap": 0, "slopes": [], "sinks": []}
    facts = {"scale": 1 / math.sqrt(DIM), "kv_heads": KV_HEADS} | plain | SPELLED[name][1]
    assert len(scan.sites) == layers and not scan.rejected
    form, refused = to_sdpa(capture)
    assert not refused and not any("softmax." in op for op in op_counts(form.gm))
    with torch.no_grad():
        torch.testing.assert_close(form.gm(IDS), capture.gm(IDS), rtol=0, atol=1e-5)
    for site in scan.sites:
        assert site.scale == pytest.approx(facts["scale"], rel=1e-9)
        assert site.softcap == pytest.approx(facts["softcap"], rel=1e-9)
        assert list(site.slopes) == pytest.approx(facts["slopes"], rel=1e-6)
        assert list(site.sinks) == facts["sinks"]
        assert (site.window, site.num_heads, site.num_kv_heads) == (facts["window"], HEADS, facts["kv_heads"])
        torch.testing.assert_close(*recomputed(capture, site))


def two_sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = both(k, v)
    scores = q @ k.transpose(-1, -2) + additive(q)
    extra = torch.zeros(1, HEADS, 1, 2).expand(q.shape[0], HEADS, q.shape[2], 2)
    return torch.cat([scores, extra], -1).softmax(-1)[..., :-2] @ v


def alibi_and_sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = both(k, v)
    return beside_sinks(q @ k.transpose(-1, -2) - SLOPES * distances(q) + additive(q)) @ v


def cooled_after_sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = both(k, v)
    scores = q @ k.transpose(-1, -2) + additive(q)
    column = SINKS.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    return (torch.cat([scores, column], -1) / 2).softmax(-1)[..., :-1] @ v


def used_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = both(k, v)
    p = (q @ k.transpose(-1, -2) + additive(q)).softmax(-1)
    return p @ v + p.sum(-1, keepdim=True)


def sharpened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = both(k, v)
    return (q @ k.transpose(-1, -2) + additive(q)).softmax(-1).square() @ v


def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = both(k, v)
    return (q @ k.transpose(-1, -2)).sigmoid().masked_fill(hidden(q), 0) @ v


def training_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = both(k, v)
    return F.dropout((q @ k.transpose(-1, -2) + additive(q)).softmax(-1), 0.1, training=True) @ v


REFUSED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "mask under the cap": (written(lambda s, q: 5 * torch.tanh((s + additive(q)) / 5)), "not scaled by one factor"),
    "two sinks": (two_sinks, r"columns that are no tokens, of shapes .*'2'\]\]: want one"),
    "alibi and sinks": (alibi_and_sinks, "attention sinks beside a position bias"),
    "cooled after sinks": (cooled_after_sinks, "on random q, k, v it differs by"),
    "bias of squares": (written(lambda s, q: s - SLOPES * distances(q) ** 2 + additive(q)), "no multiple of the dist"),
    "bias of the query": (written(lambda s, q: s + q.sum(-1, keepdim=True) * distances(q) + additive(q)), "join two"),
    "cubed": (written(lambda s, q: s**3 + additive(q)), "it is not softmax"),
    "scale per head": (written(lambda s, q: s * SLOPES + additive(q)), "not scaled by one factor"),
    "negative": (written(lambda s, q: -s + additive(q)), "scaled by -1"),
    "over queries": (lambda q, k, v: (q @ both(k, v)[0].transpose(-1, -2)).softmax(-2) @ both(k, v)[1], "last dim"),
    "no mask": (written(lambda s, q: s), "not causal"),
    "look ahead": (written(lambda s, q: s.masked_fill(distances(q) < -2, LEAST)), "row 0 sees column"),
    "used twice": (used_twice, "probabilities have 2 users"),
    "sharpened": (sharpened, "probabilities pass through aten"),
    "sigmoid": (sigmoid, "no softmax follows"),
    "training dropout": (training_dropout, "dropout 0.1 inside attention"),
}
CORES |= {name: core for name, (core, _) in REFUSED.items()}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_such_form_stays_and_says_why(name: str):
    model = TinyModel(name, layers=1)
    shapes = () if name == "training dropout" else ((2, 9),)
    capture = capture_program(program_of(model), teacher=model, implementation="test", shapes=shapes)
    scan = find_attention(capture)
    assert not scan.sites and len(scan.rejected) == 1
    assert re.search(REFUSED[name][1], scan.rejected[0].reason), scan.rejected[0].reason


def test_a_wrong_reading_is_caught_by_the_proof(monkeypatch):
    capture = capture_of(TinyModel("einsum", layers=1))
    right = _Rewrite.scale
    monkeypatch.setattr(_Rewrite, "scale", lambda self, core: (1.01 * right(self, core)[0], 0.0))
    code = capture.gm.code
    form, refused = to_sdpa(capture)
    assert "on random q, k, v it differs by" in refused[0].reason and form.gm.code == code
    assert not find_attention(capture).sites


@pytest.mark.parametrize("name", ["masked_fill", "baddbmm"])
def test_nothing_converted_keeps_the_spelling_and_the_bits(name: str):
    capture, scan = scanned(name, layers=2, sharp=2.0)
    student = make_student(capture, scan, choose(scan, "all"))
    assert student.gm.code == capture.gm.code and torch.equal(student.logits(IDS), capture.gm(IDS))
    half = make_student(capture, scan, choose(scan, "keep=1"))
    kept = [n.name for n in half.gm.graph.nodes if "softmax" in str(n.target)]
    assert len(kept) == 1 and not any("scaled_dot" in op for op in op_counts(half.gm))


@pytest.mark.parametrize(
    "name, octaves", [("written window", 4), ("capped window with sinks", 4), ("written alibi", 5)]
)
def test_statistics_see_what_the_teacher_sees(name: str, octaves: int):
    capture, scan = scanned(name, layers=2, sharp=2.0)
    site = scan.sites[0]
    with torch.no_grad():
        taps = tap_graph(to_sdpa(capture)[0].gm, [site.q, site.k, site.v, site.anchor])
        q, k, v, y = taps(*capture.inputs(IDS))
    stats, context = attention_statistics(q, k, v, site=site)
    torch.testing.assert_close(context.transpose(1, 2), y)
    assert (
        stats.mass[:, octaves:].abs().max() == 0 < stats.mass[:, octaves - 1].min()
    )  # distances of 2^(octaves - 1) on
    torch.testing.assert_close(stats.mass.sum(1), torch.ones(HEADS, dtype=torch.float64))


@pytest.mark.parametrize(
    "name", ["capped window with sinks", "alibi of keys", pytest.param("broadcast groups", marks=pytest.mark.slow)]
)
def test_a_half_converted_student_learns_and_carries_its_state(name: str):
    capture, scan = scanned(name, layers=2, sharp=2.0)
    student = make_student(capture, scan, choose(scan, "keep=1"))
    mixer = student.gm.get_submodule("tcal_mixers.0")
    naive_(mixer, torch.Generator().manual_seed(0))
    student.logits(IDS).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in mixer.parameters())
    flat = capture_program(student.export(), teacher=student.gm, implementation="student", shapes=((2, 9),))
    stateful = make_stateful(flat)
    assert {layer.kind for layer in stateful.layers} == {"gdn", "softmax"}
    assert [layer.window for layer in stateful.layers if layer.kind == "softmax"] == [SPELLED[name][1].get("window")]
    assert all(c.passed and c.measured < 1e-9 for c in stateful.checks)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("bmm", "one key head")]


@pytest.mark.parametrize("name", ["broadcast groups", "written out", *SLOW])
def test_verify_measures_a_first_site_that_was_written_out(name):
    """q, k and v of some spellings stand in the student's graph only."""
    from tcal_compiler.runs import _statistics_checks
    from tcal_compiler.runtime.teacher import Teacher
    from tcal_compiler.source import Source

    capture, scan = scanned(name)
    (check,) = _statistics_checks(Source(Teacher("", "factory", None, None, None), None, capture, scan))
    assert check.passed
