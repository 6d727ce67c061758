"""The distillation stage of a run folder, and which weights count after it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .passes.types import Check
from .resume import resuming
from .runtime.distill import distill, stopped_at
from .runtime.flops import device_peak, distillation_flops
from .runtime.meter import Peak
from .runtime.parallel import current
from .runtime.run_folder import RunFolder
from .runtime.token_cache import cached_rows
from .runtime.tokenizer import prompt_start
from .runtime.weights import load_weights, save_weights

if TYPE_CHECKING:
    from .conversion import Conversion
    from .scoring import Scoring

ALIGNED, DISTILLED, CURVE = "weights.safetensors", "distilled.safetensors", "distillation.json"


class StepClock:
    """A progress callback that also notes when each step was done; a step ends with its loss read back."""

    def __init__(self, shown: Callable[..., None]) -> None:
        self._shown, self._times = shown, list[float]()

    def __call__(self, done: int, total: int, loss: float) -> None:
        self._times.append(time.monotonic())
        self._shown(done, total, loss)

    def median(self) -> float | None:
        """Seconds of a step, which seldom has a score or a checkpoint in it; None where fewer than two were taken."""
        steps = [b - a for a, b in pairwise(self._times)]
        return median(steps) if steps else None


def student_weights(run: RunFolder) -> Path:
    """The weights of the finished student: distilled ones where the stage made some."""
    return run.path / (DISTILLED if DISTILLED in run.record("distill").files else ALIGNED)


def distillation_rows(work: Conversion | Scoring) -> tuple[Tensor, Tensor, int]:
    """The calibration text as rows, the held-out slice last; predictions that count; number of rows to train on."""
    calib, tokenizer = work.config.calib, work.source.tokenizer
    assert tokenizer is not None
    shown = work.progress
    ids, counts = cached_rows(
        work.text, tokenizer, length=calib.length, run=work.run.path, say=shown.say, progress=shown.bar
    )
    held = torch.zeros(len(ids), dtype=torch.bool)
    held[calib.sequences : calib.sequences + calib.holdout] = True
    order = torch.cat(((~held).nonzero(), held.nonzero())).squeeze(1)
    return ids[order], counts[order], len(ids) - calib.holdout


def _utilisation(work: Conversion, sequences: float) -> float | None:
    """MFU of a step of so many sequences on a card, were it done in a second; None on a CPU or an unknown card."""
    peak = device_peak(work.device)
    return sequences * distillation_flops(work.student, work.config.calib.length) / peak if peak else None


def _speed(
    work: Conversion, tokens: int, seconds: float, step: float | None, utilisation: float | None
) -> dict[str, Any]:
    """Of the whole work, scores and checkpoints included, and of its median step."""
    return {
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "step_seconds": None if step is None else round(step, 4),
        "mfu": None if step is None or utilisation is None else round(utilisation / step, 4),
        "card": torch.cuda.get_device_name(work.device) if work.device.type == "cuda" else None,
    }


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
        assert work.source.tokenizer is not None
        group, start = current(), prompt_start(work.source.tokenizer)
        sequences = min(config.batch, train)
        tokens, utilisation = sequences * calib.length, _utilisation(work, sequences / group.size)
        clock = StepClock(
            work.progress.bar("distillation", tokens=tokens, utilisation=utilisation, loss_name=config.divergence)
        )
        peak = Peak(work.device)
        with peak, resuming(stage, work.progress, config.steps) as (resume, save):
            started, begun = time.monotonic(), resume.step if resume else 0
            _, curve = distill(
                work.student,
                ids,
                counts,
                train=train,
                config=config,
                seed=work.config.seed,
                resume=resume,
                save=save,
                progress=clock,
                group=group,
                start=start,
            )
        seconds, stopped = max(time.monotonic() - started, 1e-3), stopped_at(curve, config)
        save_weights(work.student, stage.dir / DISTILLED)
        (stage.dir / CURVE).write_text(json.dumps(curve, indent=1) + "\n", encoding="utf-8")
        scores: list[Any] = [p["held_out"] for p in curve]
        check = Check("held-out score of distillation against its start", min(scores), scores[0])
        tokens *= (stopped or config.steps) - begun
        stage.evidence = {
            "curve": curve,
            "checks": [asdict(check)],
            "rows": train,
            "steps": config.steps,
            "stopped_at": stopped,
            "processes": group.size,
            "shard": config.shard,
            "peak_memory": group.each(peak.bytes, work.device),
            "speed": _speed(work, tokens, seconds, clock.median(), utilisation),
        }
        if stopped is not None:
            work.progress.say(f"distillation stopped at step {stopped}: {config.patience} scores without a better one")
