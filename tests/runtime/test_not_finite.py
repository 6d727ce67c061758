"""NaN and infinity in weights, activations and losses: an error that names the place; the last checkpoint stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import DIM, HEADS, KV_HEADS, VOCAB, WIDTH, TinyModel, lone_site, program_of, student_of
from torch import Tensor

from tcal_compiler import Config, convert
from tcal_compiler.errors import StageError, TeacherError, UnsupportedModelError
from tcal_compiler.runtime import calibrate
from tcal_compiler.runtime.align import GroupTrainer
from tcal_compiler.runtime.config import DistillConfig
from tcal_compiler.runtime.distill import Distiller
from tcal_compiler.runtime.initialize import naive_
from tcal_compiler.runtime.mixer import GdnMixer
from tcal_compiler.runtime.program_file import save_program

CONFIG = Config.model_validate(
    {
        "policy": "none",
        "local_window": 6,
        "calib": {"sequences": 4, "length": 24, "holdout": 2, "batch": 2},
        "align": {"steps": 9, "batch": 2, "checkpoint_every": 3, "score_every": 1},
    }
)


DISTILL = DistillConfig.model_validate({"steps": 7, "batch": 2, "checkpoint_every": 3, "score_every": 7})


def saved(model: TinyModel, folder: Path) -> str:
    save_program(program_of(model, 256), folder / "teacher.pt2")
    return str(folder / "teacher.pt2")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return saved(TinyModel(layers=2, vocab=256), tmp_path_factory.mktemp("teacher"))


def aligned(teacher: str, out: Path, init: str = "closed-form") -> bytes:
    convert(teacher, out=out, config=CONFIG.model_copy(update={"init": init}), tokenizer="bytes", until="align")
    return (out / "weights.safetensors").read_bytes()


def test_weights(tmp_path):
    model = TinyModel(layers=1, vocab=256)
    with torch.no_grad():
        model.blocks[0].attn.proj[0].weight[0, 3] = float("nan")
    with pytest.raises(TeacherError, match=r"blocks\.0\.attn\.proj\.0\.weight has 1 of 1024 values that are NaN"):
        aligned(saved(model, tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_logits(tmp_path):
    model = TinyModel(layers=1, vocab=256)
    with torch.no_grad():
        model.head.weight.fill_(3e38)
    with pytest.raises(UnsupportedModelError, match="logits are not finite on 2 x 24 random tokens"):
        aligned(saved(model, tmp_path), tmp_path / "run")


def test_an_activation_of_the_teacher_on_the_text(tmp_path):
    """Of a token that random ones do not hold."""
    model = TinyModel(layers=2, vocab=256)
    with torch.no_grad():
        model.embed.weight[ord("e")] = 3e38
    with pytest.raises(StageError, match=r"blocks\.0\.attn: the teacher's attention output is not finite on this text"):
        aligned(saved(model, tmp_path), tmp_path / "run")


@pytest.mark.parametrize("name, init", [("closed_form_output_", "closed-form"), ("taylor_output_", "taylor")])
def test_the_output_of_an_initialised_site(teacher, tmp_path, monkeypatch, name, init):
    def spoil(mixer: GdnMixer, _: object) -> None:
        with torch.no_grad():
            mixer.norm[0, 0] = float("nan")

    monkeypatch.setattr(calibrate, name, spoil)
    with pytest.raises(StageError, match=r"calibrate, .*blocks\.0\.attn: its output after init.* not finite"):
        aligned(teacher, tmp_path / "run", init)


def test_a_loss_stops_alignment_and_the_last_checkpoint_is_gone_on_from(teacher, tmp_path, monkeypatch):
    whole = aligned(teacher, tmp_path / "whole")
    calls, real = [], GroupTrainer.losses

    def losses(self: GroupTrainer, x: Tensor, y: Tensor, **options: int) -> Tensor:
        calls.append(1)
        value = real(self, x, y, **options)
        return value * torch.tensor([1.0, float("nan")]) if len(calls) > 15 else value

    with monkeypatch.context() as patch:
        patch.setattr(GroupTrainer, "losses", losses)
        with pytest.raises(StageError, match=r"align, .*blocks\.1\.attn: the loss is not finite at step 8"):
            aligned(teacher, tmp_path / "run")
    assert list((tmp_path / "run/.scratch/align").rglob("align.safetensors")), "the checkpoint of step 6"
    steps: list[int] = []
    step = GroupTrainer.step
    monkeypatch.setattr(GroupTrainer, "step", lambda self, n, *args: (steps.append(n), step(self, n, *args))[1])
    assert aligned(teacher, tmp_path / "run") == whole and steps == [6, 7, 8]


def test_an_activation_stops_distillation_and_the_last_checkpoint_is_gone_on_from(teacher, tmp_path, monkeypatch):
    def distilled(out: Path) -> bytes:
        config = CONFIG.model_copy(update={"distill": DISTILL})
        convert(teacher, out=out, config=config, tokenizer="bytes", until="distill")
        return (out / "distilled.safetensors").read_bytes()

    whole, steps, write = distilled(tmp_path / "whole"), list[int](), Distiller.write

    def spoil(self: Distiller, values: dict[str, Tensor]) -> None:
        write(self, values)
        steps.append(1)
        if len(steps) == 5:
            with torch.no_grad():
                self.student.gm.get_submodule("tcal_mixers.1").norm[0, 0] = float("inf")

    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "write", spoil)
        with pytest.raises(StageError, match=r"distill, .*blocks\.1\.attn: step 6: .*not finite"):
            distilled(tmp_path / "run")
    assert list((tmp_path / "run/.scratch/distill").rglob("distill.safetensors")), "the checkpoint of step 3"
    resumed = []
    step = Distiller.step
    monkeypatch.setattr(Distiller, "step", lambda self, n, index: (resumed.append(n), step(self, n, index))[1])
    assert distilled(tmp_path / "run") == whole and resumed == [3, 4, 5, 6]


def test_a_hundred_steps_of_fine_tuning_stay_finite_and_learn():
    """Cross entropy from an initialised student on, all its weights at once."""
    torch.manual_seed(0)
    student = student_of(layers=1)
    for site in student.converted:
        naive_(student.gm.get_submodule(f"tcal_mixers.{site.index}"), torch.Generator().manual_seed(1))
    weights = [p.requires_grad_() for p in student.gm.parameters()]
    optimizer, losses = torch.optim.AdamW(weights, lr=3e-3), list[float]()
    for step in range(100):
        start = torch.randint(0, VOCAB, (2, 1), generator=torch.Generator().manual_seed(step))
        ids = (start + 3 * torch.arange(16)) % VOCAB  # each token is the one before it, plus 3
        logits = student.gm(ids)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(w.grad is None or bool(w.grad.isfinite().all()) for w in weights)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1 < 3 < losses[0] and all(w.isfinite().all() for w in weights)


def test_values_near_the_end_of_half_precision_do_not_overflow():
    """The recurrence runs in float32 whatever the teacher's dtype, and the norm comes before the cast back."""
    torch.manual_seed(0)
    mixer = GdnMixer(lone_site()).half()
    x = torch.randn(1, 40, WIDTH).half()
    q, k, v = (60_000 * torch.randn(1, heads, 40, DIM).clamp(-1, 1).half() for heads in (HEADS, KV_HEADS, KV_HEADS))
    core = mixer.core(q, k, v, x)
    assert core.dtype == torch.float32 and core.abs().max() > 65504 / 8
    y = mixer(q, k, v, x)
    assert y.dtype == torch.float16 and bool(y.isfinite().all())
