"""How well the student predicts the held-out slice of the calibration text, beside its teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from tcal_compiler.passes.types import Capture

from .logits import Losses, compare_all, split_model
from .taps import Progress


@dataclass(frozen=True)
class HeldOut:
    """On so many sequences of so many tokens: perplexities, and the mean KL(teacher || student), nats per token."""

    sequences: int
    length: int
    teacher: float
    student: float
    kl: float


@torch.no_grad()
def score_held_out(
    student: GraphModule, capture: Capture, ids: Tensor, *, batch: int = 1, progress: Progress | None = None
) -> HeldOut:
    """Scores tokens 1..T-1 of ids [N, T]. capture: the teacher, whose arguments the student takes too."""
    device = next(student.parameters()).device
    teacher, model = split_model(capture.gm), split_model(student)
    found = [Losses.none(device)] * 2
    for start in range(0, len(ids), batch):
        args = capture.inputs(ids[start : start + batch].to(device))
        known = teacher.with_hidden(teacher.hidden(args))
        parts = (compare_all(m, known, args) for m in (known, model))
        found = [a + b for a, b in zip(found, parts, strict=True)]
        if progress:
            progress(min(start + batch, len(ids)), len(ids))
    nll = [losses.means()["nll"] for losses in found]
    first, second = (math.exp(min(x, 700.0)) for x in nll)
    return HeldOut(len(ids), ids.shape[1], first, second, found[1].means()["kl"])
