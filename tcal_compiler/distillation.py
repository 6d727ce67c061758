"""The distillation stage of a run folder, and which weights count after it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .passes.types import Check
from .resume import resume_stage
from .runtime.distill import distill, stopped_at
from .runtime.parallel import current
from .runtime.run_folder import RunFolder
from .runtime.token_cache import cached_rows
from .runtime.weights import load_weights, save_weights

if TYPE_CHECKING:
    from .conversion import Conversion

ALIGNED, DISTILLED, CURVE = "weights.safetensors", "distilled.safetensors", "distillation.json"


def student_weights(run: RunFolder) -> Path:
    """The weights of the finished student: distilled ones where the stage made some."""
    return run.path / (DISTILLED if DISTILLED in run.record("distill").files else ALIGNED)


def distillation_rows(work: Conversion) -> tuple[Tensor, Tensor, int]:
    """The calibration text as rows, the held-out slice last; predictions that count; number of rows to train on."""
    calib, tokenizer = work.config.calib, work.source.tokenizer
    assert tokenizer is not None
    ids, counts = cached_rows(work.text, tokenizer, length=calib.length, run=work.run.path, say=work.progress.say)
    held = torch.zeros(len(ids), dtype=torch.bool)
    held[calib.sequences : calib.sequences + calib.holdout] = True
    order = torch.cat(((~held).nonzero(), held.nonzero())).squeeze(1)
    return ids[order], counts[order], len(ids) - calib.holdout


def distill_stage(work: Conversion) -> None:
    """Distils the aligned student; without steps, or with nothing converted, records that nothing was done."""
    calib, config = work.config.calib, work.config.distill.in_steps(work.config.calib.length)
    inputs: dict[str, Any] = {"align": work.run.stage_hash("align")}
    settings: dict[str, Any] = {"distill": None}
    active = bool(config.active and work.chosen.convert)
    if active:
        settings = {"distill": config.settings(), "seed": work.config.seed, "holdout": calib.holdout}
        inputs["text"] = work.text.identity()
    with work.run.stage("distill", config=settings, inputs=inputs) as stage:
        if stage.done:
            return
        stage.evidence = {"curve": [], "checks": []}
        if not active:
            return
        load_weights(work.student, work.run.path / ALIGNED)
        ids, counts, train = distillation_rows(work)
        resume, save = resume_stage(stage, work.progress)
        group = current()
        tokens, started = min(config.batch, train) * calib.length, time.monotonic()
        _, curve = distill(
            work.student,
            ids,
            counts,
            train=train,
            config=config,
            seed=work.config.seed,
            resume=resume,
            save=save,
            progress=work.progress.bar("distillation", tokens=tokens, loss_name=config.divergence),
            group=group,
        )
        seconds, stopped = max(time.monotonic() - started, 1e-3), stopped_at(curve, config)
        save_weights(work.student, stage.dir / DISTILLED)
        (stage.dir / CURVE).write_text(json.dumps(curve, indent=1) + "\n", encoding="utf-8")
        scores: list[Any] = [p["held_out"] for p in curve]
        check = Check("held-out score of distillation against its start", min(scores), scores[0])
        tokens *= (stopped or config.steps) - (resume.step if resume else 0)
        stage.evidence = {
            "curve": curve,
            "checks": [asdict(check)],
            "rows": train,
            "steps": config.steps,
            "stopped_at": stopped,
            "processes": group.size,
            "speed": {"tokens": tokens, "seconds": round(seconds, 3), "tokens_per_second": round(tokens / seconds, 1)},
        }
        if stopped is not None:
            work.progress.say(f"distillation stopped at step {stopped}: {config.patience} scores without a better one")
