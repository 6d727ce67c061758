"""Alignment: exact resuming, honest scores, sites that do not touch each other."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tiny_models import VOCAB, student_of

from tcal_compiler.errors import StageError
from tcal_compiler.passes.capture import example_ids
from tcal_compiler.passes.graph import copy_module, move_to
from tcal_compiler.passes.rewrite_gdn import mixer_path
from tcal_compiler.runtime import align as align_module
from tcal_compiler.runtime import taps
from tcal_compiler.runtime.align import GroupTrainer, align, levelled_off
from tcal_compiler.runtime.calibrate import initialise
from tcal_compiler.runtime.config import AlignConfig
from tcal_compiler.runtime.student import Student
from tcal_compiler.runtime.taps import LivePairs, SiteGroup, collect_taps
from tcal_compiler.runtime.training import Checkpoint, TrainState, batch_indices, learning_rate
from tcal_compiler.runtime.weights import changed_names

TRAIN, SEED = 6, 3
CONFIG = AlignConfig(
    steps=11, batch=2, warmup=3, lr_new=1e-2, lr_teacher=1e-3, noise=0.1, score_every=4, checkpoint_every=1
)
MIXED = ("is_causal", "window", "is_causal")  # a window makes no difference to the program, but to the group


def start(init: str = "naive", core: object = "is_causal", device: str = "cpu") -> tuple[Student, list[SiteGroup]]:
    student = student_of(core, "none", sharp=3.0)
    for gm in (student.capture.gm, student.gm):
        move_to(gm, torch.device(device))
    ids = example_ids(TRAIN + 2, 24, VOCAB, seed=1)
    groups = collect_taps(student, student.capture.gm, ids, batch=4)
    train = [replace(g, x=g.x[:, :TRAIN], y=g.y[:, :TRAIN]) for g in groups]
    initialise(student, train, init=init, seed=0, batch=4)
    return student, groups


def run(student: Student, groups: list[SiteGroup], config: AlignConfig = CONFIG, **options):
    return align(student, groups, train=TRAIN, config=config, seed=SEED, **options)


def recording(live: LivePairs, seen: list[torch.Tensor]) -> LivePairs:
    class Recording(LivePairs):
        def __init__(self) -> None:
            self.__dict__ |= live.__dict__

        def __call__(self, index):
            seen.append(index)
            return super().__call__(index)

    return Recording()


def weights(student: Student) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in student.gm.named_parameters()}


@pytest.fixture(scope="module")
def undisturbed():
    """A whole run, with every checkpoint that it could have been stopped at."""
    saved: list[TrainState] = []
    student, groups = start(core=MIXED)
    before = weights(student)
    _, curve = run(student, groups, save=lambda s: saved.append(copy.deepcopy(s)))
    return before, weights(student), curve, saved, groups, student


def test_resuming_at_any_step_gives_the_same_bits(undisturbed, tmp_path):
    _, final, curve, saved, groups, _ = undisturbed
    assert [s.step for s in saved] == list(range(1, CONFIG.steps))
    for state in saved:
        Checkpoint(tmp_path / "state").save(state)
        resumed, _ = start(core=MIXED)
        _, again = run(resumed, groups, resume=Checkpoint(tmp_path / "state").load())
        assert again == curve, state.step
        for name, tensor in weights(resumed).items():
            assert torch.equal(tensor, final[name]), (state.step, name)


def test_patience_stops_where_the_errors_level_off_and_resumes_to_the_same_stop(undisturbed):
    """At a rate of next to nothing no score is 1% better than the one before."""
    small = {"lr_new": 1e-9, "lr_teacher": 1e-9, "steps": 20, "score_every": 2, "patience": 3}
    config = CONFIG.model_copy(update=small)
    saved: list[TrainState] = []
    student, groups = start(core=MIXED)
    _, curve = run(student, groups, config, save=lambda s: saved.append(copy.deepcopy(s)))
    assert [p["step"] for p in curve] == [0, 2, 4, 6] and levelled_off(curve, config) == 6 == saved[-1].step
    for state in (saved[-1], saved[-2], saved[0]):
        assert run(start(core=MIXED)[0], groups, config, resume=state)[1] == curve
    never = config.model_copy(update={"patience": None})
    whole = run(start(core=MIXED)[0], groups, never)[1]
    assert len(whole) == 11 and whole[:4] == curve and levelled_off(whole, never) is None


def test_levelling_off_is_judged_by_the_kept_weights_of_all_sites():
    def curve(*errors: tuple[float, float]) -> list[dict[str, object]]:
        return [{"step": 2 * i, "held_out": {"0": a, "7": b}} for i, (a, b) in enumerate(errors)]

    config = AlignConfig(steps=20, patience=2, least_gain=0.1)
    assert levelled_off(curve((2, 2), (9, 9)), config) is None  # too few scores
    assert levelled_off(curve((2, 2), (9, 9), (2, 1.5)), config) is None
    assert levelled_off(curve((2, 2), (9, 1.5), (1.9, 9)), config) is None  # each site keeps its own best
    assert levelled_off(curve((2, 2), (9, 9), (2, 1.7)), config) == 4
    assert levelled_off(curve((2, 2), (1, 1), (1, 1), (1, 1)), config) == 6
    assert levelled_off(curve((2, 2), (9, 9), (2, 1.7)), AlignConfig(steps=4, patience=2)) is None  # the end anyway
    exact = config.model_copy(update={"least_gain": 0.0})
    assert levelled_off(curve((2, 2), (2, 2), (2, 2)), exact) == 4
    assert levelled_off(curve((2, 2), (2, 2), (2, 1.999)), exact) is None


def test_a_folder_from_before_there_was_patience_stays_valid():
    old = set(AlignConfig().model_dump()) - {"patience", "least_gain", "near_error"}
    assert set(AlignConfig(near_error=0.0).settings()) == old
    assert set(AlignConfig(patience=3).settings()) == old | {"patience", "near_error"}


@pytest.mark.gpu
def test_resuming_on_a_gpu_gives_the_same_weights_within_rounding(tmp_path):
    saved: list[TrainState] = []
    student, groups = start(core=MIXED, device="cuda")
    _, curve = run(student, groups, save=lambda s: saved.append(copy.deepcopy(s)))
    for state in saved[::3]:
        Checkpoint(tmp_path / "state").save(state)
        resumed, _ = start(core=MIXED, device="cuda")
        _, again = run(resumed, groups, resume=Checkpoint(tmp_path / "state").load())
        for a, b in zip(again, curve, strict=True):
            assert a["step"] == b["step"] and a["held_out"] == pytest.approx(b["held_out"], rel=1e-5)
        for name, tensor in weights(student).items():
            torch.testing.assert_close(weights(resumed)[name], tensor, rtol=1e-4, atol=1e-6)


def test_the_scale_of_a_models_weights_and_of_its_hidden_states_changes_nothing():
    """The teacher's input projections 30 times smaller on a 30 times larger x, as in Gemma 3, compute the same."""
    config = AlignConfig(steps=6, batch=2, warmup=2, score_every=2, clip=1e9)
    curves = []
    for scale in (1.0, 30.0):
        student, groups = start("closed-form")
        student = replace(student, capture=replace(student.capture, gm=copy_module(student.capture.gm)))
        paths = {p for g in groups for names in g.names for n, p in names.items() if "attn.proj" in p}
        assert len(paths) == 6
        with torch.no_grad():
            for gm in (student.gm, student.capture.gm):
                for path in paths:
                    gm.get_parameter(path).div_(scale)
        _, curve = run(student, [replace(g, x=scale * g.x) for g in groups], config)
        curves.append(curve)
    for a, b in zip(*curves, strict=True):
        assert b["held_out"] == pytest.approx(a["held_out"], rel=1e-2)
    assert all(curves[0][-1]["held_out"][i] < 0.97 * v for i, v in curves[0][0]["held_out"].items())


def test_values_computed_in_each_step_give_what_stored_ones_give(undisturbed):
    _, final, curve, _, _, _ = undisturbed
    student, groups = start(core=MIXED)
    ids = example_ids(TRAIN + 2, 24, VOCAB, seed=1)[:TRAIN]
    _, again = run(student, groups, live=LivePairs(student, groups, ids))
    assert again != [] and [p["step"] for p in again] == [p["step"] for p in curve]
    for a, b in zip(again, curve, strict=True):
        assert a["held_out"] == pytest.approx(b["held_out"], rel=1e-4)
        assert a["train"] == pytest.approx(b["train"], rel=1e-4)
    for name, tensor in weights(student).items():
        torch.testing.assert_close(tensor, final[name], rtol=1e-3, atol=1e-4)


def test_sequences_that_are_not_stored_are_trained_on_and_resume_exactly(tmp_path):
    def go(**options):
        student, groups = start(core=MIXED)
        ids = example_ids(10 * TRAIN, 24, VOCAB, seed=5)
        seen = []
        live = LivePairs(student, groups, ids)
        _, curve = align(
            student,
            groups,
            train=TRAIN,
            config=CONFIG,
            seed=SEED,
            live=recording(live, seen),
            **options,
        )
        return weights(student), curve, seen

    saved: list[TrainState] = []
    final, curve, seen = go(save=lambda s: saved.append(copy.deepcopy(s)))
    rows = [i for index in seen for i in index.tolist()]
    assert len(set(rows)) == len(rows) == CONFIG.steps * CONFIG.batch and max(rows) >= TRAIN
    Checkpoint(tmp_path / "state").save(saved[5])
    again, same, rest = go(resume=Checkpoint(tmp_path / "state").load())
    assert same == curve and [i.tolist() for i in rest] == [i.tolist() for i in seen[6:]]
    assert all(torch.equal(t, final[n]) for n, t in again.items())


def test_a_pass_of_the_teacher_that_serves_several_steps_changes_nothing(undisturbed, monkeypatch):
    """11 steps in passes of 3, as on a GPU, the last one short; stopped and resumed amid one with the same numbers."""
    _, _, curve, _, _, _ = undisturbed
    monkeypatch.setitem(taps.PASS_TOKENS, "cpu", 3 * CONFIG.batch * 24 + 1)

    def go(**options):
        student, groups = start(core=MIXED)
        seen = []
        live = recording(LivePairs(student, groups, example_ids(TRAIN + 2, 24, VOCAB, seed=1)[:TRAIN]), seen)
        return run(student, groups, live=live, **options)[1], [len(i) // CONFIG.batch for i in seen]

    saved: list[TrainState] = []
    found, passes = go(save=lambda s: saved.append(copy.deepcopy(s)))
    assert passes == [3, 3, 3, 2]
    for a, b in zip(found, curve, strict=True):
        for key in ("held_out", "train"):
            assert a[key] == pytest.approx(b[key], rel=1e-4)
    same, passes = go(resume=saved[4])  # five steps were done
    assert same == found and passes == [3, 3, 2]


def test_kept_weights_score_what_was_recorded_and_no_site_is_worse(undisturbed):
    _, _, curve, _, groups, student = undisturbed
    assert [p["step"] for p in curve] == [0, 4, 8, 11]
    for group in groups:
        trainer = GroupTrainer(student, group, TRAIN, CONFIG)
        scored = trainer.score()
        for site, error in zip(group.sites, scored.tolist(), strict=True):
            recorded = [p["held_out"][str(site.index)] for p in curve]
            assert error == min(recorded) < recorded[0]


def test_a_site_that_starts_near_its_teacher_takes_smaller_steps():
    student, groups = start()
    batch, moves = (groups[0].x[:, :2], groups[0].y[:, :2]), []
    for near in (0.0, 1e-3, 50.0):
        config = CONFIG.model_copy(update={"weight_decay": 0.3, "warmup": 0, "noise": 0.0, "near_error": near})
        trainer = GroupTrainer(student, groups[0], TRAIN, config)
        before, error = {n: p.detach().clone() for n, p in trainer.params.items()}, trainer.start(TRAIN)
        assert 0.001 < error.min() < error.max() < 50
        trainer.step(0, *batch, seed=0)
        moves.append({n: p.detach() - before[n] for n, p in trainer.params.items()})
    numbers = sum(p[0].numel() for p in trainer.params.values())
    m = (CONFIG.batch * groups[0].x.shape[2] / numbers / align_module.TOKENS_PER_NUMBER) ** (2 / 3)
    share = (error / align_module.FAR).clamp_min(m) * (error / 50).sqrt()
    assert share.max() < 0.9
    for name, whole in moves[0].items():
        assert torch.equal(moves[1][name], whole) and whole.abs().max() > 1e-5, name
        small = share.view(-1, *[1] * (whole.dim() - 1)) * whole
        torch.testing.assert_close(moves[2][name], small, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("near", "error", "share"),
    [(1e-300, 0.0, 0.0), (1e-300, 1e-13, 1.0), (1e300, 1e-13, 0.0), (1.0, math.inf, 1.0), (1.0, math.nan, 1.0)],
)
def test_the_share_of_a_step_is_a_number_whatever_the_error_at_the_start(near, error, share, monkeypatch):
    student, groups = start()
    trainer = GroupTrainer(student, groups[0], TRAIN, CONFIG.model_copy(update={"near_error": near}))
    monkeypatch.setattr(trainer, "score", lambda: torch.full((len(groups[0].sites),), error))
    trainer.start(TRAIN)
    assert trainer.share.dtype == torch.float32 and trainer.share.tolist() == [share] * len(groups[0].sites)


def test_frozen_weights_keep_their_bits(undisturbed):
    before, after, _, _, _, student = undisturbed
    may = changed_names(student)
    for name in before:
        if name not in may:
            assert torch.equal(before[name], after[name]), name
    moved = [n for n in before if not torch.equal(before[n], after[n])]
    assert any("attn.out" in n for n in moved) and any("A_log" in n for n in moved)


def test_noise_depends_on_its_seed_and_never_reaches_a_score(undisturbed):
    _, _, _, _, groups, student = undisturbed
    trainer, pair = GroupTrainer(student, groups[0], TRAIN, CONFIG), (groups[0].x[:, :2], groups[0].y[:, :2])
    clean, one, again, other = (trainer.losses(*pair, s).tolist() for s in (None, 1, 1, 2))
    assert one == again and len({tuple(x) for x in (clean, one, other)}) == 3
    assert one == pytest.approx(clean, rel=0.5)
    quiet = GroupTrainer(student, groups[0], TRAIN, CONFIG.model_copy(update={"noise": 0.0}))
    assert quiet.losses(*pair, 1).tolist() == clean and torch.equal(quiet.score(), trainer.score())


def test_groups_differ_by_window_and_cover_every_site(undisturbed):
    groups = undisturbed[4]
    assert [[s.index for s in g.sites] for g in groups] == [[0, 2], [1]]


def test_groups_of_different_shapes_train_together():
    from tiny_models import TinyModel, capture_of

    from tcal_compiler.passes.choose import choose
    from tcal_compiler.passes.find_attention import find_attention
    from tcal_compiler.runtime.student import make_student

    model = TinyModel(layers=2)
    fused = TinyModel(layers=1, fused=True, bias=True)
    model.blocks[1] = fused.blocks[0]
    capture = capture_of(model)
    scan = find_attention(capture)
    student = make_student(capture, scan, choose(scan, "none"))
    groups = collect_taps(student, capture.gm, example_ids(8, 24, VOCAB), batch=4)
    assert len(groups) == 2
    initialise(student, groups, init="naive", seed=0, batch=4)
    _, curve = run(student, groups)
    assert all(set(p["held_out"]) == {"0", "1"} for p in curve)
    assert all(curve[-1]["held_out"][i] < curve[0]["held_out"][i] for i in "01")


def test_a_stack_trains_each_site_as_if_it_were_alone():
    together, groups = start()
    assert len(groups) == 1 and len(groups[0].sites) == 2
    quiet = CONFIG.model_copy(update={"noise": 0.0})  # a stack draws its noise at once
    _, curve = run(together, groups, quiet)
    for i, site in enumerate(groups[0].sites):
        alone, _ = start()
        single = replace(
            groups[0],
            sites=(site,),
            names=groups[0].names[i : i + 1],
            x=groups[0].x[i : i + 1],
            y=groups[0].y[i : i + 1],
        )
        _, own = run(alone, [single], quiet)
        for a, b in zip(own, curve, strict=True):
            assert a["held_out"][str(i)] == pytest.approx(b["held_out"][str(i)], rel=1e-3)
        for path in groups[0].names[i].values():
            torch.testing.assert_close(alone.gm.get_parameter(path), together.gm.get_parameter(path), rtol=0, atol=3e-3)


def test_a_bad_step_is_not_kept():
    """A rate that ruins the weights: the starting weights stay."""
    student, groups = start()
    before = weights(student)
    _, curve = run(student, groups, AlignConfig(steps=4, batch=2, warmup=0, lr_new=3.0, lr_teacher=3.0, score_every=1))
    worse = [i for i in ("0", "1") if min(p["held_out"][i] for p in curve[1:]) > curve[0]["held_out"][i]]
    assert worse
    for i in worse:
        path = f"{mixer_path(int(i))}.A_log"
        assert torch.equal(student.gm.get_parameter(path), before[path])


@pytest.mark.parametrize("score_every", [1, 100])
def test_a_loss_that_is_not_finite_is_a_stage_error_and_never_saved(score_every):
    student, groups = start()
    before, saved = weights(student), []
    bad = replace(groups[0], x=groups[0].x.clone())
    bad.x[1, :TRAIN] = float("nan")
    config = AlignConfig(steps=8, batch=2, score_every=score_every, checkpoint_every=2)
    with pytest.raises(StageError, match=r"align, .*blocks\.1\.attn: the loss is not finite at step \d") as e:
        run(student, [bad], config, save=saved.append)
    assert "align.lr_new" in e.value.hint and not saved
    assert all(torch.equal(p, before[n]) for n, p in student.gm.named_parameters())


def test_a_checkpoint_of_something_else_is_a_stage_error(undisturbed):
    *_, saved, groups, student = undisturbed
    names = list(saved[1].tensors)
    for name in [*names[::12], "group0.best_error"]:
        rest = {n: t for n, t in saved[1].tensors.items() if n != name}
        for tensors in (rest, rest | {name: torch.zeros(3, 1, 4, 1, 5)}):
            with pytest.raises(StageError, match=r"checkpoint of step 2 does not fit.*\n.*--restart"):
                run(student, groups, resume=TrainState(2, tensors, []))
    old = {n: t for n, t in saved[1].tensors.items() if not n.endswith(".share")}  # of before there was near_error
    run(student, groups, CONFIG.model_copy(update={"near_error": 0.0}), resume=TrainState(11, old, saved[1].curve))
    with pytest.raises(StageError, match=r"it has no group0\.share\n.*--restart"):
        run(student, groups, resume=TrainState(2, old, []))


def test_every_epoch_is_a_permutation_and_depends_on_seed_and_step_alone():
    epochs = [[batch_indices(s, sequences=8, batch=2, seed=1) for s in range(e * 4, e * 4 + 4)] for e in range(2)]
    assert all(sorted(torch.cat(e).tolist()) == list(range(8)) for e in epochs)
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))
    assert not torch.equal(
        batch_indices(0, sequences=8, batch=8, seed=1), batch_indices(0, sequences=8, batch=8, seed=2)
    )
    assert len(batch_indices(5, sequences=3, batch=8, seed=0)) == 3
    assert batch_indices(10, sequences=9, batch=2, seed=2**31 - 1).max() < 9


def test_the_rate_warms_up_and_ends_at_zero():
    config = AlignConfig(steps=100, warmup=10)
    rates = [learning_rate(s, config) for s in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(rates[9], rel=1e-3)
    assert rates[100] == pytest.approx(0, abs=1e-12) and all(b <= a for a, b in pairwise(rates[9:]))
    assert math.isfinite(learning_rate(0, AlignConfig(steps=1, warmup=0)))
