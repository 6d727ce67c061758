"""How far a student's next-token distribution is from the teacher's, and what a distillation minimises.

N rows, V vocabulary. p = softmax(teacher / temperature), q = softmax(student / temperature), in float32 at least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import DivergenceName

# Log of the smallest probability of the teacher that the reverse KL tells from others, about float32's smallest number:
# a token that the teacher rules out costs so many nats and not infinitely many.
LEAST_LOG_P = -100.0


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, -1)


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """sum_v p (log p - log q) per row [N], for logits [N, V].

    A token that the teacher rules out (-inf) adds 0, as p log p does in the limit.
    """
    log_p, log_q = _log_softmax(teacher, temperature), _log_softmax(student, temperature)
    return torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """sum_v q (log q - max(log p, -100)) per row [N], for logits [N, V]; a token without probability adds 0.

    The gradient is taken through the factor q alone, because sum_v q d(log q) = d(sum_v q) = 0: so it is 0 where the
    distributions are equal, and it needs no 1 / q.
    """
    log_q = _log_softmax(student, temperature)
    with torch.no_grad():
        surprise = log_q - _log_softmax(teacher, temperature).clamp_min_(LEAST_LOG_P)
        surprise.masked_fill_(log_q == -torch.inf, 0.0)
    return (log_q.exp() * surprise).sum(-1)


def jensen_shannon(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """1/2 sum_v p (log p - log m) + 1/2 sum_v q (log q - log m) per row [N], m = (p + q) / 2; at most log 2.

    Of logits [N, V]. The gradient with respect to q_v is 1/2 (log q_v - log m_v), again through the factor q alone.
    """
    log_q = _log_softmax(student, temperature)
    with torch.no_grad():
        log_p = _log_softmax(teacher, temperature)
        log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
        of_p = (log_p.exp() * (log_p - log_m).masked_fill_(log_p == -torch.inf, 0.0)).sum(-1)
        surprise = (log_q - log_m).masked_fill_(log_q == -torch.inf, 0.0)
    return (of_p + (log_q.exp() * surprise).sum(-1)) / 2


def hidden_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over taps of sum (student - teacher)^2 / sum teacher^2, in float32 at least.

    student, teacher: one tensor [N, C] per tap, of the same N tokens; there is at least one tap.
    """

    def one(s: Tensor, t: Tensor) -> Tensor:
        s, t = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (s, t))
        return (s - t).square().sum() / t.square().sum().clamp_min(1e-30)

    return torch.stack([one(s, t) for s, t in zip(student, teacher, strict=True)]).mean()


DIVERGENCES: dict[DivergenceName, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward-kl": forward_kl,
    "reverse-kl": reverse_kl,
    "js": jensen_shannon,
}


@dataclass(frozen=True)
class Objective:
    """Mean over counted predictions of temperature^2 divergence + cross_entropy * negative log likelihood, plus hidden
    times the distance of the tapped hidden states (`hidden_distance`).

    The factor temperature^2 keeps the size of the gradient: all three divergences are of second order in differences of
    logits, which the temperature divides.
    """

    divergence: DivergenceName = "forward-kl"
    temperature: float = 1.0
    cross_entropy: float = 0.0
    hidden: float = 0.0

    def rows(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The divergence of each row [N], without the factor, for logits [N, V]."""
        return DIVERGENCES[self.divergence](student, teacher, self.temperature)


FORWARD_KL = Objective()
