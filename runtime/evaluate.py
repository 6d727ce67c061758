"""Perplexity and divergence on text that was not calibrated on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class EvalResult:
    """Attributes:
    tokens: predicted tokens. perplexity: exp of the mean negative log likelihood.
    kl: mean KL(teacher || student), nats per token; 0 for the teacher itself.
    log_perplexity_stderr, kl_stderr: standard errors over sequences.
    """

    tokens: int
    perplexity: float
    log_perplexity_stderr: float
    kl: float
    kl_stderr: float


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean, and its standard error sqrt(sum (x - mean)^2 / (n - 1) / n), NaN for a single value."""
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), x.std().item() / math.sqrt(len(x)) if len(x) > 1 else math.nan


@torch.no_grad()
def evaluate(
    ids: Tensor,
    *,
    teacher: Logits,
    students: dict[str, Logits],
    batch: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, EvalResult]:
    """Scores the teacher (key "teacher") and students on sequences ids [N, T]: tokens 1..T-1 from scratch.

    All run on the same batches, so that the teacher's logits are computed once. Log-softmax in float32.
    """
    nll: dict[str, list[float]] = {n: [] for n in ("teacher", *students)}
    kl: dict[str, list[float]] = {n: [] for n in students}
    for start in range(0, len(ids), batch):
        part = ids[start : start + batch]
        target = part[:, 1:].unsqueeze(-1)
        reference = F.log_softmax(teacher(part)[:, :-1].float(), -1)
        nll["teacher"] += (-reference.gather(-1, target).squeeze(-1).double().mean(1)).tolist()
        for name, logits in students.items():
            log_p = F.log_softmax(logits(part)[:, :-1].float(), -1)
            nll[name] += (-log_p.gather(-1, target).squeeze(-1).double().mean(1)).tolist()
            divergence = (reference.exp() * (reference - log_p)).sum(-1).double().mean(1)
            kl[name] += divergence.tolist()
        if progress:
            progress(min(start + batch, len(ids)), len(ids))
    out = {}
    for name, losses in nll.items():
        loss, loss_error = mean_and_error(losses)
        div, div_error = mean_and_error(kl[name]) if name in kl else (0.0, 0.0)
        out[name] = EvalResult(ids[:, 1:].numel(), math.exp(min(loss, 700.0)), loss_error, div, div_error)
    return out
