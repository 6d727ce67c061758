"""Initial values reach what they promise, and recover a teacher that is itself a GDN."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support import sums_of
from tiny_models import DIM as D
from tiny_models import HEADS as H
from tiny_models import KV_HEADS as K
from tiny_models import VOCAB, scanned, student_of
from tiny_models import lone_site as site

from tcal_compiler.config import Config
from tcal_compiler.kernels.gated_delta_rule import gated_delta_rule
from tcal_compiler.kernels.gates import decay_gate
from tcal_compiler.passes.capture import example_ids
from tcal_compiler.passes.choose import choose
from tcal_compiler.passes.local_windows import with_local_windows
from tcal_compiler.runtime import calibrate
from tcal_compiler.runtime.calibrate import SiteCalibrator, initialise
from tcal_compiler.runtime.config import ALL_PARTS, INIT_PARTS
from tcal_compiler.runtime.initialize import (
    OPEN,
    PARAMETERS,
    closed_form_output_,
    inverse_silu,
    inverse_softplus,
    naive_,
    ridge_update,
    set_memory_,
    taylor_output_,
    zero_gate_,
)
from tcal_compiler.runtime.mixer import GdnMixer
from tcal_compiler.runtime.statistics import SiteStats, normal_sums
from tcal_compiler.runtime.student import make_student
from tcal_compiler.runtime.taps import collect_taps


def stats(distance: list[float], entropy: list[float]) -> SiteStats:
    sums = {"distance": torch.tensor(distance).double(), "entropy": torch.tensor(entropy).double()}
    return SiteStats(1, sums)


def mixer_with(distance: list[float], entropy: list[float]) -> GdnMixer:
    torch.manual_seed(0)
    mixer = GdnMixer(site())
    naive_(mixer, torch.Generator().manual_seed(3))  # leftovers of a random start must not show
    set_memory_(mixer, stats(distance, entropy))
    return mixer


def test_the_state_halves_after_the_look_back_distance():
    distance = [1.0, 3.0, 16.0, 100.0]
    mixer = mixer_with(distance, [1.0, 2.0, 3.0, 4.0])
    x = 5 * torch.randn(1, 1, 32)
    for h, tokens in enumerate(distance):
        t = int(tokens)
        g = decay_gate(mixer.a_proj(x.expand(1, t, 32)), mixer.A_log, mixer.dt_bias)
        state = torch.randn(1, H, D, D)
        zero = torch.zeros(1, t, H, D)
        _, after = gated_delta_rule(zero, zero, zero, g=g, beta=torch.zeros(1, t, H), initial_state=state)
        torch.testing.assert_close(after[:, h], state[:, h] / 2, rtol=1e-4, atol=1e-6)


def test_the_write_gate_is_reached_on_any_input():
    mixer = mixer_with([4.0] * 4, [1.0, 2.0, 3.0, 5.0])
    beta = mixer.b_proj(100 * torch.randn(7, 32)).sigmoid()
    expected = torch.tensor([0.7, 0.6, 0.5, 0.3])  # 0.3 + 0.4 (1 - (E - 1) / 4)
    torch.testing.assert_close(beta, expected.expand(7, 4), rtol=1e-5, atol=1e-6)


def test_extreme_statistics_stay_finite():
    mixer = mixer_with([0.5, 1e-9, 1e9, 1e5], [0.0, 0.0, 0.0, 0.0])
    assert all(p.isfinite().all() for p in mixer.parameters())
    rate = F.softplus(mixer.dt_bias)
    assert rate.min() >= 0.999e-3 and rate.max() <= 5.001


def test_inverses():
    y = torch.logspace(-3, 1.5, 50, dtype=torch.float64)
    torch.testing.assert_close(F.softplus(inverse_softplus(y)), y, rtol=1e-10, atol=0)
    c = torch.linspace(-0.25, 50, 500, dtype=torch.float64)
    torch.testing.assert_close(F.silu(inverse_silu(c)), c, rtol=1e-9, atol=1e-9)
    assert F.silu(inverse_silu(torch.tensor([-9.0, 99.0]))).tolist() == pytest.approx([-0.25, 50])
    assert F.silu(torch.tensor(OPEN, dtype=torch.float64)).item() == pytest.approx(1, abs=1e-12)


def test_ridge_is_the_least_squares_of_the_stacked_system():
    gen = torch.Generator().manual_seed(0)
    z, r = (torch.randn(300, n, generator=gen).double() for n in (12, 5))
    fit = ridge_update(normal_sums(z, r), 1e-2)
    assert fit.ridge == pytest.approx(1e-2 * z.square().sum(0).mean().item())
    stacked = torch.cat([z, math.sqrt(fit.ridge) * torch.eye(12).double()])
    target = torch.cat([r, torch.zeros(12, 5).double()])
    exact = torch.linalg.lstsq(stacked, target).solution.T
    torch.testing.assert_close(fit.delta, exact, rtol=1e-9, atol=1e-11)
    plain = ridge_update(normal_sums(z, r), 1e-14).delta
    torch.testing.assert_close(plain, torch.linalg.lstsq(z, r).solution.T, rtol=1e-8, atol=1e-10)


def test_ridge_of_silence_changes_nothing():
    assert ridge_update(normal_sums(torch.zeros(9, 4), torch.zeros(9, 3))).delta.abs().max() == 0


def test_closed_form_recovers_a_teacher_that_is_a_gdn():
    """The context is a mixer's own output with constant gates and a gate of its own per channel."""
    gen = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, h, 80, D, generator=gen) for h in (H, K, K))
    x = torch.randn(2, 80, 32, generator=gen)
    teacher, mixer = mixer_with([2.0, 5.0, 9.0, 30.0], [1.0, 2.0, 3.0, 5.0]), mixer_with([9.0] * 4, [1.0] * 4)
    with torch.no_grad():
        teacher.norm.copy_(torch.rand(H, D, generator=gen) + 0.5)
        teacher.g_proj.weight.zero_()
        teacher.g_proj.bias.copy_(inverse_silu(torch.rand(H * D, generator=gen) * 3 - 0.2))
        context = teacher(q, k, v, x).transpose(1, 2)
        set_memory_(mixer, stats([2.0, 5.0, 9.0, 30.0], [1.0, 2.0, 3.0, 5.0]))
        closed_form_output_(mixer, sums_of(context, mixer.core(q, k, v, x)))
        error = (mixer(q, k, v, x).transpose(1, 2) - context).norm() / context.norm()
        assert error < 1e-3
        taylor_output_(mixer, sums_of(context, mixer.core(q, k, v, x)))
        assert (mixer(q, k, v, x).transpose(1, 2) - context).norm() / context.norm() > 10 * error


@pytest.fixture(scope="module")
def calibrated():
    """A student, and its taps over random tokens."""
    student = student_of("is_causal", "none", sharp=3.0)
    groups = collect_taps(student, student.capture.gm, example_ids(4, 40, VOCAB), batch=2)
    return student, groups


def test_a_site_that_is_a_gdn_is_recovered_through_the_projection(calibrated):
    """y is the site's own output with known gates and another output projection: the refit finds it."""
    student, groups = calibrated
    job = SiteCalibrator(student, groups[0], 0, 2)
    set_memory_(job.mixer, stats([4.0] * H, [1.0, 2.0, 3.0, 4.0]))
    weight = student.gm.get_parameter("blocks.0.attn.out.weight")
    original = weight.detach().clone()
    with torch.no_grad():
        job.mixer.g_proj.weight.zero_()
        job.mixer.g_proj.bias.fill_(OPEN)
        job.mixer.norm.fill_(1.0)
        weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        job.y = groups[0].program.gm(job.x, *job.outside(len(job.x)))
        weight.copy_(original)
    assert job.error() > 0.1
    job.refit(1e-6)
    assert job.error() < 1e-6  # mean square, so 1e-3 in norm
    with torch.no_grad():
        weight.copy_(original)


def test_inits_rank_as_measured_and_touch_only_what_they_may(calibrated):
    _, groups = calibrated
    errors = {}
    for init in ("naive", "zero-gate", "taylor", "closed-form"):
        fresh = student_of("is_causal", "none", sharp=3.0)
        before = {n: p.detach().clone() for n, p in fresh.gm.named_parameters()}
        _, reports = initialise(fresh, groups, init=init, seed=0, batch=2)
        errors[init] = sum(r.error for r in reports)
        changed = {n for n, p in fresh.gm.named_parameters() if not torch.equal(p, before[n])}
        others = {n for n in changed if "tcal_mixers" not in n}
        assert others == ({f"blocks.{i}.attn.out.weight" for i in (0, 1)} if init == "closed-form" else set())
        assert [r.index for r in reports] == [0, 1] and all(len(r.distance) == H for r in reports)
    assert errors["closed-form"] < 0.8 * min(errors["taylor"], errors["zero-gate"], errors["naive"])
    assert errors["zero-gate"] == pytest.approx(2, rel=1e-4)  # the site is silent


def test_a_part_that_is_left_out_is_as_naive_has_it_and_the_later_ones_know(calibrated):
    _, groups = calibrated

    def made(init: str, *without: str) -> dict[str, torch.Tensor]:
        capture, scan = scanned("is_causal", sharp=3.0)
        fresh = make_student(capture, with_local_windows(scan, 6), choose(scan, "none"))
        initialise(fresh, groups, init=init, without=without, seed=0, batch=2)
        return {n.removeprefix("tcal_mixers.1."): p.detach() for n, p in fresh.gm.named_parameters()}

    own = {n for names in PARAMETERS.values() for n in names}
    wo, naive = "blocks.1.attn.out.weight", made("naive")
    assert own == {n for n in naive if "." not in n or n.split(".")[0].endswith("_proj")}
    for init, parts in INIT_PARTS.items():
        whole = made(init)
        for part in parts:
            found, left = made(init, part), PARAMETERS[part]
            assert all(torch.equal(found[n], naive[n]) and not torch.equal(found[n], whole[n]) for n in left), part
            refit = {"norm", "g_proj.bias"} if part in ("decay", "write-gate", "local-window") else set()
            if init == "closed-form" and part in ("decay", "write-gate"):
                refit.add("local_scale")
            assert all(torch.equal(found[n], whole[n]) for n in own - set(left) - refit), part
            assert not refit or not torch.equal(found["norm"], whole["norm"]), part
            assert torch.equal(found[wo], naive[wo]) == (part == "ridge" or init == "taylor")
    nothing = made("closed-form", *ALL_PARTS)
    assert all(torch.equal(nothing[n], p) for n, p in naive.items())


def test_a_folder_from_before_parts_could_be_left_out_stays_valid():
    assert Config(local_window=0).initial_values() == {"init": "closed-form", "seed": 0}
    some = Config(init_without=["ridge", "decay"], local_window=0).initial_values()
    assert some == {"init": "closed-form", "seed": 0, "init_without": ["decay", "ridge"]}


def test_where_more_sequences_run_at_a_time_the_start_is_the_same(calibrated, monkeypatch):
    """As on a GPU, which small batches leave idle."""
    _, groups = calibrated
    made, sizes = [], []

    def batches(x, y, size, device, plain=calibrate._batches):
        sizes.append(size)
        return plain(x, y, size, device)

    monkeypatch.setattr(calibrate, "_batches", batches)
    for least in (0, 3 * groups[0].x.shape[2] + 1):
        monkeypatch.setitem(calibrate.PASS_TOKENS, "cpu", least)
        fresh = student_of("is_causal", "none", sharp=3.0)
        initialise(fresh, groups, init="closed-form", seed=5, batch=1)
        made.append(torch.cat([p.flatten() for p in fresh.gm.parameters()]))
    half = len(sizes) // 2
    assert set(sizes[:half]) == {1} and set(sizes[half:]) == {3}
    torch.testing.assert_close(*made, rtol=1e-4, atol=1e-5)


def test_same_seed_same_bits_and_batch_is_invisible(calibrated):
    _, groups = calibrated
    made = []
    for seed, batch in ((0, 2), (0, 2), (1, 2), (0, 4)):
        fresh = student_of("is_causal", "none", sharp=3.0)
        initialise(fresh, groups, init="naive" if batch == 2 else "closed-form", seed=seed, batch=batch)
        made.append(torch.cat([p.flatten() for n, p in fresh.gm.named_parameters() if "mixers" in n]))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    again = student_of("is_causal", "none", sharp=3.0)
    initialise(again, groups, init="closed-form", seed=5, batch=1)
    mixed = torch.cat([p.flatten() for n, p in again.gm.named_parameters() if "mixers" in n])
    torch.testing.assert_close(mixed, made[3], rtol=1e-4, atol=1e-5)


def test_zero_gate_is_silent_on_any_input():
    mixer = GdnMixer(site())
    zero_gate_(mixer, torch.Generator().manual_seed(0))
    q, k, v = (torch.randn(1, h, 9, D) for h in (H, K, K))
    assert mixer(q, k, v, torch.randn(1, 9, 32)).abs().max() == 0
