"""Faults of the published implementation (arXiv:2606.16429) in heads, gates and inits.

Each test runs its check on the code as it is, puts the fault in, and requires that the same check fails.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support import sums_of
from tiny_models import DIM, GROUP, HEADS, KV_HEADS, VOCAB, WIDTH, capture_of, llama, lone_site, scanned, student_of
from torch import Tensor, nn

from tcal_compiler.kernels.attention_stats import OCTAVES, streaming
from tcal_compiler.kernels.gated_delta_rule import gated_delta_rule_reference
from tcal_compiler.kernels.gates import decay_gate, l2_normalize
from tcal_compiler.passes.capture import example_ids
from tcal_compiler.passes.choose import choose
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.passes.graph import argument, by_name
from tcal_compiler.passes.site_program import tap_graph
from tcal_compiler.passes.types import Capture, SiteScan
from tcal_compiler.runtime import initialize
from tcal_compiler.runtime import mixer as mixer_module
from tcal_compiler.runtime.mixer import GdnMixer
from tcal_compiler.runtime.statistics import SiteStats, attention_statistics
from tcal_compiler.runtime.student import Student, make_student

B, T = 2, 30
LN2 = math.log(2)


def fails(check, *args: object) -> None:
    """The check must not pass."""
    with pytest.raises(AssertionError):
        check(*args)


def qkvx(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, h, T, DIM, generator=gen) for h in (HEADS, KV_HEADS, KV_HEADS))
    return q, k, v, torch.randn(B, T, WIDTH, generator=gen)


def seeded_mixer() -> GdnMixer:
    torch.manual_seed(0)
    mixer = GdnMixer(lone_site())
    initialize.naive_(mixer, torch.Generator().manual_seed(0))
    return mixer


# 1. K/V heads expanded by repeating rows inside a head instead of whole heads.


@torch.no_grad()
def check_whole_heads() -> None:
    """Key/value head j is seen by the query heads of its group, and by no other."""
    mixer, (q, k, v, x) = seeded_mixer(), qkvx()
    outputs = {
        "mixer": lambda k, v: mixer(q, k, v, x),
        "statistics": lambda k, v: attention_statistics(q, k, v, site=lone_site())[1].transpose(1, 2),
    }
    for j in range(KV_HEADS):
        other_k, other_v = k.clone(), v.clone()
        other_k[:, j], other_v[:, j] = other_k[:, j].flip(-1), other_v[:, j] + 1
        for name, run in outputs.items():
            moved = (run(k, v) - run(other_k, other_v)).abs().amax((0, 2, 3)) > 0
            assert moved.nonzero().flatten().tolist() == list(range(j * GROUP, (j + 1) * GROUP)), name
    whole = [z.repeat_interleave(GROUP, 1) for z in (k, v)]
    for name, run in outputs.items():
        assert torch.allclose(run(k, v), run(*whole), atol=1e-6), name


def rows_repeated(x: Tensor, num_heads: int) -> Tensor:
    """[B, T, K, D] -> [B, T, H, D] by repeating each channel."""
    return x.flatten(2).repeat_interleave(num_heads // x.shape[2], -1).unflatten(-1, (num_heads, -1))


@pytest.mark.parametrize("where", ["mixer", "statistics"])
def test_fault_1_rows_repeated_inside_heads(monkeypatch, where):
    check_whole_heads()
    if where == "statistics":
        monkeypatch.setattr(streaming, "expand_heads", rows_repeated)
    else:
        rule = mixer_module.gated_delta_rule
        monkeypatch.setattr(
            mixer_module,
            "gated_delta_rule",
            lambda q, k, v, **gates: rule(q, rows_repeated(k, HEADS), rows_repeated(v, HEADS), **gates),
        )
    fails(check_whole_heads)


# 2. q/k/v biases, RoPE, its scaling and q/k norms of the teacher dropped.


@torch.no_grad()
def check_teachers_own_qkv(student: Student) -> None:
    """What enters each mixer is, bit for bit, what entered the teacher's softmax attention."""
    ids, teacher = example_ids(2, 21, VOCAB), student.capture.gm
    for site in student.converted:
        core = by_name(teacher)[site.anchor]
        theirs = tap_graph(teacher, [argument(core, n).name for n in ("query", "key", "value")])
        call = next(n for n in student.gm.graph.nodes if n.target == f"tcal_mixers.{site.index}")
        mine = tap_graph(student.gm, [a.name for a in call.args[:3]])
        for a, b in zip(theirs(*student.capture.inputs(ids)), mine(*student.capture.inputs(ids)), strict=True):
            if b.shape[1] != a.shape[1]:  # before the teacher repeats its heads
                b = b.repeat_interleave(a.shape[1] // b.shape[1], 1)
            assert torch.equal(a, b)


FULL = {"bias": True, "norm_qk": True, "layers": 1}


@pytest.mark.parametrize("part", ["bias", "norm", "rope"])
def test_fault_2_parts_of_the_teachers_qkv_path_dropped(part):
    student = student_of("is_causal", "none", **FULL)
    check_teachers_own_qkv(student)
    if part == "rope":
        capture, scan = scanned("is_causal", **FULL)
        bare = replace(scan.sites[0], q="rms_norm", k="rms_norm_1")
        student = make_student(capture, SiteScan((bare,), ()), choose(scan, "none"))
    else:
        name = {"bias": "proj.2.bias", "norm": "norm_qk.weight"}[part]
        with torch.no_grad():
            student.gm.get_parameter(f"blocks.0.attn.{name}").fill_(0.0 if part == "bias" else 2.0)
    fails(check_teachers_own_qkv, student)


def test_fault_2_rope_scaling_dropped():
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    student = _llama_student(rope_parameters=scaling)
    check_teachers_own_qkv(student)
    plain = _llama_student()
    for name, tensor in plain.gm.named_buffers():
        if "inv_freq" in name:
            assert not torch.equal(student.gm.get_buffer(name), tensor)
            student.gm.get_buffer(name).copy_(tensor)
    fails(check_teachers_own_qkv, student)


def _llama_student(**changes: object) -> Student:
    class Ids(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama(num_hidden_layers=1, **changes)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.model(input_ids=input_ids, use_cache=False).logits

    capture: Capture = capture_of(Ids())
    scan = find_attention(capture)
    return make_student(capture, scan, choose(scan, "none"))


# 3. W_a random, so that the half-life is noise; no bias on W_b, so that beta* is never reached.

STATS = SiteStats(
    1,
    {
        "distance": torch.tensor([2.0, 9.0, 40.0, 300.0]).double(),
        "entropy": torch.tensor([1.0, 2.0, 3.0, 5.0]).double(),
        "mass": torch.zeros(HEADS, OCTAVES).double(),
    },
)


@torch.no_grad()
def check_memory_as_calibrated(set_memory, prepare=lambda mixer: None) -> None:
    """On any input a state halves after the look-back distance, and beta is what the entropy asks for."""
    mixer, x = seeded_mixer(), qkvx()[3]
    set_memory(mixer, STATS)
    prepare(mixer)
    rate = -decay_gate(mixer.a_proj(x), mixer.A_log, mixer.dt_bias)
    expected = (LN2 / STATS.distance).float().expand(B, T, HEADS)
    assert torch.allclose(rate, expected, rtol=1e-3)
    beta = mixer.b_proj(x).sigmoid()
    assert torch.allclose(beta, torch.tensor([0.7, 0.6, 0.5, 0.3]).expand_as(beta), atol=1e-4)


def random_w_a(mixer: GdnMixer, stats: SiteStats) -> None:
    kept = mixer.a_proj.weight.detach().clone()
    initialize.set_memory_(mixer, stats)
    mixer.a_proj.weight.copy_(kept)


def no_bias_on_w_b(mixer: GdnMixer, stats: SiteStats) -> None:
    initialize.set_memory_(mixer, stats)
    mixer.b_proj.bias.zero_()


@pytest.mark.parametrize("fault", [random_w_a, no_bias_on_w_b])
def test_fault_3_calibrated_gates_never_reached(fault):
    check_memory_as_calibrated(initialize.set_memory_)
    fails(check_memory_as_calibrated, fault)


# 4. sigma undone by the norm behind it; an output gate that mutes everything.


@torch.no_grad()
def check_output_scale(set_output) -> None:
    """The site's output is about as large as the teacher's context, also when that is 10 times as large."""
    q, k, v, x = qkvx()
    for factor in (1.0, 10.0):
        mixer = seeded_mixer()
        initialize.set_memory_(mixer, STATS)
        core = mixer.core(q, k, v, x)
        context = factor * (core + 0.3 * core.square().mean().sqrt() * torch.randn(core.shape))
        set_output(mixer, sums_of(context, core))
        ratio = (mixer(q, k, v, x).square().mean() / context.square().mean()).sqrt().item()
        assert 0.3 < ratio < 3, ratio


def sigma_before_the_norm(mixer: GdnMixer, sums) -> None:
    initialize.taylor_output_(mixer, sums)
    sigma = (sums.co / sums.oo).clamp(0.1, 10).float()[:, None]
    mixer.norm.fill_(1.0)
    plain = mixer.core
    mixer.core = lambda *args: plain(*args) * sigma  # the norm behind it takes any factor away


def muted_gate(mixer: GdnMixer, sums) -> None:
    initialize.taylor_output_(mixer, sums)
    mixer.g_proj.bias.fill_(0.02)


@pytest.mark.parametrize("fault", [sigma_before_the_norm, muted_gate])
def test_fault_4_value_scale_undone_and_gate_muted(fault):
    check_output_scale(initialize.taylor_output_)
    check_output_scale(initialize.closed_form_output_)
    fails(check_output_scale, fault)


# 5. SiLU on q, k, v that the teacher never had.


@torch.no_grad()
def check_rule_on_plain_qkv(mixer: GdnMixer) -> None:
    q, k, v, x = qkvx()
    g = decay_gate(mixer.a_proj(x), mixer.A_log, mixer.dt_bias)
    beta = mixer.b_proj(x).sigmoid()
    qn, kn = (l2_normalize(z.transpose(1, 2)) for z in (q, k))
    start = torch.zeros(B, HEADS, DIM, DIM)
    exact, _ = gated_delta_rule_reference(qn, kn, v.transpose(1, 2), g, beta, start, scale=DIM**-0.5)
    assert torch.allclose(mixer.core(q, k, v, x), exact, atol=1e-5)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_fault_5_silu_on_q_k_v(which):
    mixer = seeded_mixer()
    check_rule_on_plain_qkv(mixer)
    plain = mixer.core
    mixer.core = lambda *a: plain(*(F.silu(z) if i == which else z for i, z in enumerate(a)))
    fails(check_rule_on_plain_qkv, mixer)


# 8, second half: A_log in bfloat16.


def test_fault_8_rates_in_bfloat16():
    def half(mixer: GdnMixer) -> None:
        for name in ("A_log", "dt_bias"):
            getattr(mixer, name).copy_(getattr(mixer, name).bfloat16())

    check_memory_as_calibrated(initialize.set_memory_)
    fails(check_memory_as_calibrated, initialize.set_memory_, half)
