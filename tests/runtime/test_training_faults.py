"""Faults of the published implementation (arXiv:2606.16429) in measuring and training.

Each test runs its check on the code as it is, puts the fault in, and requires that the same check fails.
"""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import DIM, HEADS, KV_HEADS, VOCAB, student_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tcal_compiler.errors import DataError, TcalError
from tcal_compiler.kernels.attention_stats import streaming
from tcal_compiler.kernels.gates import decay_gate
from tcal_compiler.kernels.scores import Scores
from tcal_compiler.passes.capture import example_ids
from tcal_compiler.runtime import align as align_module
from tcal_compiler.runtime import initialize
from tcal_compiler.runtime.align import GroupTrainer, align
from tcal_compiler.runtime.config import AlignConfig
from tcal_compiler.runtime.student import Student
from tcal_compiler.runtime.taps import SiteGroup, collect_taps
from tcal_compiler.runtime.training import TrainState


def fails(check, *args: object) -> None:
    """The check must not pass."""
    with pytest.raises(AssertionError):
        check(*args)


# 6. Statistics from full T x T maps; calibration on the text that is then reported.


class _Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def check_no_full_map() -> None:
    length = 400
    q, k, v = (torch.randn(1, h, length, DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
    with _Largest() as spy:
        streaming.attention_statistics_streaming(q, k, v, scores=Scores(0.9), block=16)
    assert spy.numel <= HEADS * 16 * length


def test_fault_6_full_attention_maps(monkeypatch):
    check_no_full_map()
    rows = streaming.attention_rows

    def whole_map(q, k, *, start, stop, **kind):
        return rows(q, k, start=0, stop=q.shape[2], **kind)[:, :, start:stop, :stop]

    monkeypatch.setattr(streaming, "attention_rows", whole_map)
    fails(check_no_full_map)


def test_fault_6_reporting_on_the_calibration_text(tmp_path, monkeypatch):
    from tcal_compiler import evaluation
    from tcal_compiler.api import ASSETS, convert
    from tcal_compiler.config import build_config

    lines = [f"Line {i} of a text about {i * i} things that differ from one another." for i in range(60)]
    text, copy_ = tmp_path / "calib.txt", tmp_path / "renamed.txt"
    text.write_text("\n".join(lines))
    copy_.write_text("A new first line.\n" + "\n".join(lines[:50]))
    config = build_config(
        {"policy": "keep=0,1,2", "calib": {"text": str(text), "sequences": 4, "length": 64, "holdout": 1}}, "test"
    )
    teacher = str(ASSETS / "tiny" / "teacher.pt2")
    run = convert(teacher, out=tmp_path / "run", config=config, tokenizer="bytes", until="calibrate")

    def check_refused() -> None:
        for file in (text, copy_):
            try:
                evaluation.evaluate_run(run, evaluation.Measures(text=str(file)))
            except TcalError as e:
                assert isinstance(e, DataError) and "calibrated on" in e.what

    check_refused()
    monkeypatch.setattr(evaluation.data, "check_not_calibrated", lambda *_: None)
    fails(check_refused)


# 7. The kept weights were scored before the step that made them; no optimiser state, so no true resume.

CONFIG = AlignConfig(steps=6, batch=2, warmup=0, lr_new=1e-2, lr_teacher=1e-3, score_every=1, checkpoint_every=3)


@pytest.fixture(scope="module")
def tapped() -> list[SiteGroup]:
    student = student_of("is_causal", "none", layers=1)
    return collect_taps(student, student.capture.gm, example_ids(8, 20, VOCAB), batch=4)


def fresh_student() -> Student:
    student = student_of("is_causal", "none", layers=1)
    for site in student.converted:
        initialize.naive_(student.gm.get_submodule(f"tcal_mixers.{site.index}"), torch.Generator().manual_seed(0))
    return student


def check_kept_weights_have_the_recorded_score(groups: list[SiteGroup]) -> None:
    student = fresh_student()
    _, curve = align(student, groups, train=6, config=CONFIG, seed=0)
    scored = GroupTrainer(student, groups[0], 6, CONFIG)
    error = _held_out_error(scored)
    assert error == min(p["held_out"]["0"] for p in curve) < curve[0]["held_out"]["0"]


def held_out(trainer: GroupTrainer) -> tuple[Tensor, Tensor]:
    return trainer.group.x[:, 6:], trainer.group.y[:, 6:]


@torch.no_grad()
def _held_out_error(trainer: GroupTrainer) -> float:
    return trainer.losses(*held_out(trainer)).item()


class ScoredBeforeTheStep(GroupTrainer):
    stale: Tensor | None = None

    def step(self, step: int, x: Tensor, y: Tensor, seed: int) -> Tensor:
        with torch.no_grad():
            self.stale = self.losses(*held_out(self))
        return super().step(step, x, y, seed)

    def score(self) -> Tensor:
        if self.stale is None:
            return super().score()
        error = self.stale
        if error < self.best_error:
            self.best_error, self.best = error, {n: p.detach().clone() for n, p in self.params.items()}
        return error


def test_fault_7_best_weights_stored_after_but_scored_before_the_step(monkeypatch, tapped):
    check_kept_weights_have_the_recorded_score(tapped)
    monkeypatch.setattr(align_module, "GroupTrainer", ScoredBeforeTheStep)
    fails(check_kept_weights_have_the_recorded_score, tapped)


def check_resumes_to_the_same_curve(groups: list[SiteGroup]) -> None:
    saved: list[TrainState] = []
    _, whole = align(
        fresh_student(), groups, train=6, config=CONFIG, seed=0, save=lambda s: saved.append(copy.deepcopy(s))
    )
    _, resumed = align(fresh_student(), groups, train=6, config=CONFIG, seed=0, resume=saved[0])
    assert whole == resumed


class WithoutOptimizerState(GroupTrainer):
    def load_state(self, tensors: dict[str, Tensor], prefix: str) -> None:
        super().load_state(tensors, prefix)
        for optimizer in self.optimizers:
            optimizer.state.clear()


def test_fault_7_no_optimizer_state_in_the_checkpoint(monkeypatch, tapped):
    check_resumes_to_the_same_curve(tapped)
    monkeypatch.setattr(align_module, "GroupTrainer", WithoutOptimizerState)
    fails(check_resumes_to_the_same_curve, tapped)


# 8. Weight decay on A_log, dt_bias and norms; rates in half precision. (KL without a padding mask: in test_logits.)


def check_only_matrices_decay(trainer: GroupTrainer) -> None:
    """With gradients of zero a step moves nothing but the teacher's matrices."""
    trainer.losses = lambda x, y, **_: sum(p.flatten(1).sum(1) * 0 for p in trainer.params.values())
    before = {n: p.detach().clone() for n, p in trainer.params.items()}
    trainer.step(0, *held_out(trainer), 0)
    moved = {n for n, p in trainer.params.items() if not torch.equal(p, before[n])}
    assert moved and all(trainer.params[n].dim() == 3 and not n.startswith("mixer.") for n in moved), moved


@pytest.mark.parametrize("group", [0, 1], ids=["mixer", "vectors"])
def test_fault_8_weight_decay_on_rates_biases_and_norms(group):
    student = student_of("is_causal", "none", bias=True, norm_qk=True, layers=1)
    groups = collect_taps(student, student.capture.gm, example_ids(4, 12, VOCAB), batch=4)
    check_only_matrices_decay(GroupTrainer(student, groups[0], 2, CONFIG))
    faulty = GroupTrainer(student, groups[0], 2, CONFIG)
    faulty.optimizers[0].param_groups[group]["weight_decay"] = 0.01
    with torch.no_grad():  # zero would not show
        for p in faulty.params.values():
            p.add_(0.5)
    fails(check_only_matrices_decay, faulty)


def test_fault_8_training_in_the_teachers_half_precision(tapped):
    student = fresh_student()
    student.gm.to(torch.bfloat16)
    trainer = GroupTrainer(student, tapped[0], 6, CONFIG)
    assert {p.dtype for p in trainer.params.values()} == {torch.float32}
    g = decay_gate(torch.zeros(1, HEADS, dtype=torch.bfloat16), torch.zeros(HEADS), torch.full((HEADS,), -7.0))
    assert g.dtype == torch.float32
