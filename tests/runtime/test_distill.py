"""Distillation: exact resuming, honest scores, what is trained and what decays, a loss that is not finite."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_models import VOCAB, student_of

from tcal_compiler.config import build_config
from tcal_compiler.errors import ConfigError, StageError
from tcal_compiler.passes.capture import example_ids
from tcal_compiler.passes.graph import move_to
from tcal_compiler.runtime.config import DistillConfig
from tcal_compiler.runtime.distill import Distiller, cut, distill, stopped_at
from tcal_compiler.runtime.initialize import naive_
from tcal_compiler.runtime.student import Student
from tcal_compiler.runtime.training import Checkpoint, TrainState
from tcal_compiler.runtime.weights import changed_names

TRAIN, SEED = 6, 3
IDS = example_ids(TRAIN + 2, 20, VOCAB, seed=1)
COUNTS = torch.ones(TRAIN + 2, 19, dtype=torch.bool)
COUNTS[2, 11:] = False
CONFIG = DistillConfig(
    steps=8, batch=2, warmup=2, lr_gdn=3e-3, lr_other=1e-3, score_every=3, checkpoint_every=1, chunk=16
)


def start(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Student:
    student = student_of("is_causal", "keep=1", sharp=3.0, tied=True, bias=True)
    for s in student.converted:
        naive_(student.gm.get_submodule(f"tcal_mixers.{s.index}"), torch.Generator().manual_seed(0))
    student.gm.to(dtype)
    for gm in (student.capture.gm, student.gm):
        move_to(gm, torch.device(device))
    return student


def run(student: Student, config: DistillConfig = CONFIG, **options):
    return distill(student, IDS, COUNTS, train=TRAIN, config=config, seed=SEED, **options)


def with_(**changes: object) -> DistillConfig:
    return CONFIG.model_copy(update=changes)


def weights(student: Student) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in student.gm.named_parameters()}


@pytest.fixture(scope="module")
def undisturbed():
    """A whole run, with every checkpoint that it could have been stopped at."""
    saved: list[TrainState] = []
    student = start()
    before = weights(student)
    _, curve = run(student, save=lambda s: saved.append(copy.deepcopy(s)))
    return before, student, curve, saved


def test_resuming_at_any_step_gives_the_same_bits(undisturbed, tmp_path):
    _, student, curve, saved = undisturbed
    assert [s.step for s in saved] == list(range(1, CONFIG.steps))
    final = weights(student)
    for state in saved:
        Checkpoint(tmp_path / "state").save(state)
        resumed = start()
        _, again = run(resumed, resume=Checkpoint(tmp_path / "state").load())
        assert again == curve, state.step
        for name, tensor in weights(resumed).items():
            assert torch.equal(tensor, final[name]), (state.step, name)


@pytest.mark.gpu
def test_resuming_on_a_gpu_gives_the_same_weights_within_rounding(tmp_path):
    saved: list[TrainState] = []
    student = start(device="cuda")
    _, curve = run(student, save=lambda s: saved.append(copy.deepcopy(s)))
    for state in saved[::2]:
        Checkpoint(tmp_path / "state").save(state)
        resumed = start(device="cuda")
        _, again = run(resumed, resume=Checkpoint(tmp_path / "state").load())
        assert [p["step"] for p in again] == [p["step"] for p in curve]
        assert [p["kl"] for p in again] == pytest.approx([p["kl"] for p in curve], rel=1e-5)
        for name, tensor in weights(student).items():
            torch.testing.assert_close(weights(resumed)[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_resumed_run_takes_the_sequences_that_were_left(monkeypatch):
    step, seen, saved = Distiller.step, [], []

    def noted(self, number, index):
        seen.append((number, index.tolist()))
        return step(self, number, index)

    monkeypatch.setattr(Distiller, "step", noted)
    run(start(), save=lambda s: saved.append(copy.deepcopy(s)))
    whole, left, done = list(seen), saved[3], saved[3].step
    assert [n for n, _ in whole] == list(range(CONFIG.steps))
    assert sorted(i for _, index in whole[:3] for i in index) == list(range(TRAIN))  # an epoch has each sequence once
    seen.clear()
    run(start(), resume=left)
    assert seen == whole[done:] and len(seen) == 4


def test_with_every_option_resuming_gives_the_same_bits(tmp_path):
    options = {"divergence": "js", "cross_entropy": 0.1, "hidden": 0.5, "temperature": 1.5, "patience": 2}
    options |= {
        "teacher_dtype": "bfloat16",
        "student_dtype": "bfloat16",
        "checkpoint_activations": True,
        "train": "attention",
    }
    config, saved, student = with_(**options), [], start()
    _, curve = run(student, config, save=lambda s: saved.append(copy.deepcopy(s)))
    assert config.settings().keys() >= options.keys() and {"divergence", "hidden"} <= curve[0].keys()
    for state in saved[::3]:
        Checkpoint(tmp_path / "state").save(state)
        resumed = start()
        assert run(resumed, config, resume=Checkpoint(tmp_path / "state").load())[1] == curve
        assert all(torch.equal(p, weights(student)[n]) for n, p in weights(resumed).items())


@pytest.mark.parametrize("dtype", ["captured", "bfloat16"])
def test_recomputed_activations_give_the_same_curve(dtype):
    student, again = start(), start()
    _, curve = run(student, with_(student_dtype=dtype, steps=4))
    assert run(again, with_(student_dtype=dtype, steps=4, checkpoint_activations=True))[1] == curve
    assert all(torch.equal(p, weights(student)[n]) for n, p in weights(again).items())


@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_steps_in_bfloat16_and_scores_as_captured(undisturbed, whose):
    student = start()
    curve = run(student, with_(**{f"{whose}_dtype": "bfloat16"}))[1]
    assert {p.dtype for p in student.gm.parameters()} == {torch.float32}
    assert curve[0] == undisturbed[2][0]
    for point, known in zip(curve[1:], undisturbed[2][1:], strict=True):
        assert point["train"] != known["train"] and point["train"] == pytest.approx(known["train"], rel=0.02)
        assert point["held_out"] == pytest.approx(known["held_out"], rel=0.02)


def test_the_kept_weights_have_the_best_recorded_score(undisturbed):
    _, student, curve, _ = undisturbed
    assert [p["step"] for p in curve] == [0, 3, 6, 8] and curve[-1]["predictions"] > 0
    found = Distiller(student, IDS, COUNTS, train=TRAIN, config=CONFIG).score()["held_out"]
    assert found == min(p["held_out"] for p in curve) < curve[0]["held_out"]


def test_a_run_that_only_gets_worse_keeps_its_start():
    student = start()
    before = weights(student)
    _, curve = run(student, with_(lr_gdn=3.0, lr_other=3.0, clip=1e6, steps=3, score_every=1))
    assert min(p["held_out"] for p in curve) == curve[0]["held_out"] < curve[-1]["held_out"]
    assert all(torch.equal(before[n], p) for n, p in weights(student).items())


WORSE = with_(lr_gdn=0.3, lr_other=0.3, clip=1e6, steps=30, score_every=2, warmup=1, patience=3)


def test_patience_stops_keeps_the_best_and_resumes_to_the_same_stop():
    saved: list[TrainState] = []
    student = start()
    _, curve = run(student, WORSE, save=lambda s: saved.append(copy.deepcopy(s)))
    best = min(range(len(curve)), key=lambda i: curve[i]["held_out"])
    assert curve[-1]["step"] == stopped_at(curve, WORSE) == saved[-1].step < 30 and len(curve) - 1 - best == 3
    whole = run(start(), WORSE.model_copy(update={"patience": None}))[1]
    assert len(whole) == 16 and whole[: len(curve)] == curve and stopped_at(whole, with_(steps=30)) is None
    found = Distiller(student, IDS, COUNTS, train=TRAIN, config=WORSE).score()["held_out"]
    assert found == curve[best]["held_out"]
    for state in (saved[-1], saved[-2], saved[0]):
        resumed = start()
        assert run(resumed, WORSE, resume=state)[1] == curve
        assert all(torch.equal(p, weights(student)[n]) for n, p in weights(resumed).items())


def test_patience_counts_scores_since_the_best():
    def curve(*scores: float) -> list[dict[str, object]]:
        return [{"step": 2 * i, "held_out": s} for i, s in enumerate(scores)]

    config = with_(steps=10, patience=2)
    assert stopped_at(curve(1.0, 0.9, 0.95), config) is None
    assert stopped_at(curve(1.0, 0.9, 0.95, 0.9), config) == 6  # as good is not better
    assert stopped_at(curve(1.0, 0.9, 0.95, 0.8), config) is None
    assert stopped_at(curve(1.0, 1.1, 1.2, 1.3, 1.4, 1.5), config) is None  # the end comes anyway
    assert stopped_at(curve(1.0, 1.1, 1.2, 1.3), with_(steps=10)) is None


@pytest.mark.parametrize("train", ["gdn", "attention", "all"])
def test_only_the_chosen_part_moves(train):
    student = start()
    before, sites = weights(student), changed_names(student)
    run(student, with_(train=train, steps=3))
    moved = {n for n, p in weights(student).items() if not torch.equal(before[n], p)}
    kept = {n for n in before if n.startswith("blocks.1.attn.")}
    assert len(kept) == 8 and not kept & sites and "tcal_mixers.0.A_log" in sites
    assert {"gdn": moved <= sites, "attention": moved <= kept, "all": bool(moved & {"embed.weight", "head.weight"})}[
        train
    ]
    assert bool(moved & sites) == (train != "attention") and bool(moved & kept) == (train != "gdn")
    asked = {n for n, p in student.gm.named_parameters() if p.requires_grad}
    assert {"gdn": asked == sites, "attention": asked == kept, "all": asked == set(before)}[train]


def test_attention_that_is_written_out_is_found_and_none_at_all_refused():
    student = student_of("written out", "keep=1")
    trainer = Distiller(student, IDS, COUNTS, train=TRAIN, config=with_(train="attention"))
    assert set(trainer.params) == {f"blocks.1.attn.{n}.weight" for n in ("proj.0", "proj.1", "proj.2", "out")}
    with pytest.raises(ConfigError, match="keeps no softmax site"):
        Distiller(student_of(), IDS, COUNTS, train=TRAIN, config=with_(train="attention"))


def test_sites_and_other_weights_have_their_own_rates():
    student = start()
    trainer = Distiller(student, IDS, COUNTS, train=TRAIN, config=with_(weight_decay=0.0, clip=1e6, warmup=1))
    sites, before = changed_names(student), weights(student)
    trainer.step(0, torch.tensor([0, 1]))  # Adam's first step is the learning rate, whatever the gradient
    for name, p in weights(student).items():
        largest = (p - before[name]).abs().max().item()
        rate = CONFIG.lr_gdn if name in sites else CONFIG.lr_other
        assert largest == pytest.approx(rate, rel=0.02), name


def test_only_the_teachers_matrices_decay():
    student = start()
    with torch.no_grad():
        for p in student.gm.parameters():
            p.add_(0.5)  # zero would not show
    trainer = Distiller(student, IDS, torch.zeros_like(COUNTS), train=TRAIN, config=with_(weight_decay=0.5))
    before = weights(student)
    trainer.step(0, torch.tensor([0]))  # no prediction counts: gradients of zero
    moved = {n for n, p in weights(student).items() if not torch.equal(before[n], p)}
    matrices = {n for n, p in before.items() if p.dim() > 1 and not n.startswith("tcal_mixers.")}
    assert moved and moved <= matrices and any("attn" in n for n in moved)


def test_masters_of_a_half_precision_student_are_float32():
    student = start(torch.bfloat16)
    trainer = Distiller(student, IDS, COUNTS, train=TRAIN, config=CONFIG)
    name = "tcal_mixers.0.norm"
    p, master = student.gm.get_parameter(name), trainer.masters[name]
    assert p.dtype == torch.bfloat16 and {m.dtype for m in trainer.masters.values()} == {torch.float32}
    for _ in range(8):  # updates below bfloat16's resolution add up
        before = p.detach().clone()
        master += 2.0**-10
        trainer.write(trainer.masters)
    assert not torch.equal(p, torch.ones_like(p)) and before.dtype == torch.bfloat16
    assert torch.equal(p, master.bfloat16())


def test_a_loss_that_is_not_finite_stops_with_the_last_good_state():
    saved: list[TrainState] = []
    config = with_(lr_gdn=1e30, lr_other=1e30, clip=1e30, warmup=3, score_every=100)
    with pytest.raises(StageError, match="not finite") as e:
        run(start(), config, save=lambda s: saved.append(copy.deepcopy(s)))
    assert e.value.where == "distill, blocks.0.attn" and "distill.lr_gdn" in e.value.hint
    for state in saved:
        assert all(bool(t.isfinite().all()) for n, t in state.tensors.items() if n.startswith("param."))


def test_a_checkpoint_of_something_else_is_a_stage_error(undisturbed):
    *_, saved = undisturbed
    state = saved[1]
    for name in [*list(state.tensors)[::31], "best_score", "predictions"]:
        rest = {n: t for n, t in state.tensors.items() if n != name}
        for tensors in (rest, rest | {name: torch.zeros(3, 1, 4)}):
            if tensors is rest and name.startswith("optimizer.step."):
                continue  # of a weight without a gradient
            with pytest.raises(StageError, match=r"checkpoint of step 2 does not fit.*\n.*--restart"):
                run(start(), resume=TrainState(2, tensors, list(state.curve)))
    with pytest.raises(StageError, match="lacks scores"):
        run(start(), resume=TrainState(2, state.tensors, [{"step": 0}]))


def test_cross_entropy_takes_part_in_loss_and_score():
    first = run(start(), with_(cross_entropy=0.5))[1][0]
    assert first["held_out"] == pytest.approx(first["kl"] + 0.5 * first["nll"])
    pulled = run(start(), with_(cross_entropy=50.0, temperature=2.0, steps=30, lr_other=3e-3))[1]
    assert pulled[-1]["train"] is not None and pulled[-1]["held_out"] != pulled[0]["held_out"]


def test_the_hidden_term_takes_part_in_loss_and_score():
    curve = run(start(), with_(hidden=3.0, cross_entropy=0.5))[1]
    assert "hidden" not in run(start(), with_(steps=1))[1][0]
    for point in curve:
        assert point["held_out"] == pytest.approx(point["kl"] + 0.5 * point["nll"] + 3.0 * point["hidden"])
    pulled, plain = (run(start(), with_(hidden=h, lr_gdn=1e-2, steps=20, score_every=20))[1] for h in (300.0, 1e-6))
    assert pulled[0]["hidden"] == plain[0]["hidden"] > pulled[-1]["hidden"]
    assert pulled[-1]["hidden"] < 0.95 * plain[-1]["hidden"]


@pytest.mark.parametrize("divergence", ["forward-kl", "reverse-kl", "js"])
def test_it_learns(divergence):
    config = with_(steps=20, score_every=20, lr_gdn=1e-2, lr_other=1e-3, batch=6, divergence=divergence)
    _, curve = run(start(), config)
    assert curve[-1]["train"] < 0.7 * curve[0]["held_out"] and math.isfinite(curve[-1]["nll"])
    assert curve[0]["held_out"] == curve[0].get("divergence", curve[0]["kl"])
    assert ("divergence" in curve[0]) == (divergence != "forward-kl")


def test_a_held_out_slice_without_predictions_is_refused():
    counts = COUNTS.clone()
    counts[TRAIN:] = False
    with pytest.raises(StageError, match="held-out"):
        distill(start(), IDS, counts, train=TRAIN, config=CONFIG, seed=0)


def test_tokens_become_whole_steps():
    config = DistillConfig(tokens=1001, batch=4)
    assert config.in_steps(50).steps == 6 and config.in_steps(50).tokens is None
    assert DistillConfig(steps=3).in_steps(50).steps == 3
    with pytest.raises(ValueError, match="both steps and tokens"):
        DistillConfig(steps=3, tokens=100)


def test_later_options_leave_the_identity_of_older_runs():
    old = set(DistillConfig(steps=3).settings())
    assert {"steps", "train", "temperature", "cross_entropy"} <= old and "divergence" not in old
    assert DistillConfig(steps=3, divergence="js").settings()["divergence"] == "js"


@pytest.mark.parametrize(
    "values",
    [
        {"divergence": "kl"},
        {"temperature": math.inf},
        {"temperature": 0.0},
        {"cross_entropy": -1.0},
        {"train": "gates"},
    ],
    ids=str,
)
def test_unknown_values_are_refused(values):
    with pytest.raises(ConfigError, match=f"distill.{next(iter(values))}"):
        build_config({"distill": values}, "test")


@pytest.mark.slow
def test_compiled_steps_give_the_same_curve(undisturbed):
    """Within rounding; and the same again when the steps are split by a checkpoint."""
    saved: list[TrainState] = []
    _, curve = run(start(), with_(compile=True), save=lambda s: saved.append(copy.deepcopy(s)))
    for mine, eager in zip(curve, undisturbed[2], strict=True):
        assert mine["held_out"] == pytest.approx(eager["held_out"], rel=1e-4)
    _, again = run(start(), with_(compile=True), resume=saved[4])
    assert again == curve


def test_what_cannot_be_compiled_is_a_stage_error(monkeypatch):
    def fail(*_: object, **__: object):
        raise torch._dynamo.exc.BackendCompilerFailed(fail, RuntimeError("no compiler"), None)

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    with pytest.raises(StageError, match=r"(?s)cannot be compiled.*distill.compile = false"):
        run(start(), with_(compile=True))
    with pytest.raises(ValueError, match="compile and checkpoint_activations"):
        DistillConfig(steps=1, compile=True, checkpoint_activations=True)


def test_short_steps_see_pieces_without_context():
    """A step that cuts has the loss and gradient of its pieces as sequences of their own."""
    config = with_(short_length=5, short_share=1.0)
    trainer, pieces = Distiller(start(), IDS, COUNTS, train=TRAIN, config=config), cut(IDS, COUNTS, 5)
    other = Distiller(start(), *pieces, train=TRAIN * 4, config=CONFIG)
    a = trainer.step(0, torch.tensor([0, 2]))
    b = other.step(0, torch.tensor([0, 1, 2, 3, 8, 9, 10, 11]))
    assert a == pytest.approx(b, rel=1e-6) and trainer.predictions == other.predictions == 16 + 9
    for n, m in trainer.masters.items():
        torch.testing.assert_close(m, other.masters[n])
    whole = Distiller(start(), IDS, COUNTS, train=TRAIN, config=CONFIG).step(0, torch.tensor([0, 2]))
    assert abs(whole - a) > 1e-4


def test_pieces_begin_as_prompts_do():
    ids, counts = torch.arange(12).view(2, 6), torch.ones(2, 5, dtype=torch.bool)
    counts[1, 1] = False
    rows, kept = cut(ids, counts, 3, (99,))
    assert rows.tolist() == [[99, 1, 2], [99, 4, 5], [99, 7, 8], [99, 10, 11]] and ids[0, 0] == 0
    assert kept.tolist() == [[True, True], [True, True], [True, False], [True, True]]


@pytest.mark.parametrize(("share", "steps"), [(0.5, [1, 3, 5, 7]), (0.25, [3, 7]), (1.0, list(range(8)))])
def test_short_steps_are_spread_evenly(share, steps):
    assert [s for s in range(8) if with_(short_length=5, short_share=share).cuts(s)] == steps
    assert not any(CONFIG.cuts(s) for s in range(8))


@pytest.mark.parametrize("length", [8, 20, 40])
def test_pieces_must_cut_a_sequence_evenly(length):
    with pytest.raises(ConfigError, match=rf"distill.short_length: is {length}, which .* of 20 tokens .*\n.*: 10, or"):
        Distiller(start(), IDS, COUNTS, train=TRAIN, config=with_(short_length=length))
