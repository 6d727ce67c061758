"""Initial values of the mixers from statistics of the teacher's attention; no gradient step.

Inits: naive (a fresh Gated DeltaNet around the teacher's projections), zero-gate (the same with the output gate shut),
taylor (arXiv:2606.16429 with its implementation's faults mended), closed-form (ours: least squares throughout).
Every formula is documented where it is computed; the sums come from statistics.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .config import InitPart
from .mixer import GdnMixer
from .statistics import LocalSums, NormalSums, OutputSums, SiteStats, half_life_rate

OPEN = 1.2784645427610738  # silu(OPEN) = 1


PARAMETERS: dict[InitPart, tuple[str, ...]] = {
    "decay": ("a_proj.weight", "A_log", "dt_bias"),
    "write-gate": ("b_proj.weight", "b_proj.bias"),
    "value-scale": ("norm",),
    "output-gate": ("g_proj.weight", "g_proj.bias"),
    "local-window": ("local_scale",),
    "ridge": (),  # of the output projection, which is no part of the mixer
}


def inverse_softplus(y: Tensor) -> Tensor:
    """x with log(1 + exp(x)) = y, for y > 0."""
    return y + torch.log(-torch.expm1(-y))


def inverse_silu(c: Tensor, low: float = -0.25, high: float = 50.0) -> Tensor:
    """b >= -1.2784 with b sigmoid(b) = clip(c, low, high), by Newton's method on the rising branch."""
    c = c.clamp(low, high)
    b = c.clone()
    for _ in range(60):
        s = b.sigmoid()
        b = (b - (b * s - c) / (s * (1 + b * (1 - s))).clamp_min(0.05)).clamp(-1.2, 60)
    return b


def naive_(mixer: GdnMixer, generator: torch.Generator) -> None:
    """A fresh layer's usual random start: A in [0, 16], time steps in [1e-3, 1e-1], gates N(0, 0.02), norm 1."""
    heads = mixer.num_heads
    with torch.no_grad():
        mixer.A_log.copy_(torch.empty(heads).uniform_(1e-4, 16, generator=generator).log())
        low, high = math.log(1e-3), math.log(1e-1)
        mixer.dt_bias.copy_(inverse_softplus(torch.empty(heads).uniform_(low, high, generator=generator).exp()))
        for lin in (mixer.a_proj, mixer.b_proj, mixer.g_proj):
            lin.weight.copy_(torch.empty(lin.weight.shape).normal_(0, 0.02, generator=generator))
            if lin.bias is not None:
                lin.bias.zero_()
        mixer.norm.fill_(1.0)
        if mixer.local:
            mixer.local_scale.zero_()


def zero_gate_(mixer: GdnMixer, generator: torch.Generator) -> None:
    """naive with W_g = 0 and b_g = 0: the site adds nothing to the residual stream at first."""
    naive_(mixer, generator)
    with torch.no_grad():
        mixer.g_proj.weight.zero_()


@torch.no_grad()
def set_memory_(mixer: GdnMixer, stats: SiteStats) -> None:
    """Decay and write gate, with W_a = W_b = 0 so that the calibrated values are reached exactly.

    A_log = 0 and dt_bias = softplus^-1(ln 2 / distance): half-life = look-back distance.
    beta = 0.3 + 0.4 (1 - (E - min E) / (max E - min E)): a head that looks sharply writes strongly; set through b_b.
    """
    mixer.a_proj.weight.zero_()
    mixer.b_proj.weight.zero_()
    mixer.A_log.zero_()
    mixer.dt_bias.copy_(inverse_softplus(half_life_rate(stats.distance)))
    entropy = stats.entropy
    concentration = 1 - (entropy - entropy.min()) / (entropy.max() - entropy.min()).clamp_min(1e-3)
    mixer.b_proj.bias.copy_((0.3 + 0.4 * concentration).logit())


@contextmanager
def left_alone(mixer: GdnMixer, parts: Sequence[InitPart]) -> Iterator[None]:
    """What is done to these parts of the mixer inside is undone."""
    names = [n for part in parts for n in PARAMETERS[part] if hasattr(mixer, n.split(".")[0])]
    before = {n: mixer.get_parameter(n).detach().clone() for n in names}
    yield
    with torch.no_grad():
        for n, value in before.items():
            mixer.get_parameter(n).copy_(value)


@torch.no_grad()
def taylor_output_(mixer: GdnMixer, sums: OutputSums) -> None:
    """Value scale of the published recipe where the norm cannot undo it, and a gate that lets it through.

    sigma = clip(<ctx, o> / <o, o>, 0.1, 10) per head; norm = sigma mean rms(o), W_g = 0, silu(b_g) = 1.
    """
    sigma = (sums.co / sums.oo.clamp_min(1e-30)).clamp(0.1, 10)
    mixer.norm.copy_((sigma * sums.rms / sums.tokens)[:, None].expand_as(mixer.norm))
    mixer.g_proj.weight.zero_()
    mixer.g_proj.bias.fill_(OPEN)


@torch.no_grad()
def closed_form_output_(mixer: GdnMixer, sums: OutputSums) -> None:
    """Output gate by least squares, per head and channel: c = <ctx, n> / <n, n>, n = o / rms(o); silu(b_g) = c.

    The head's value scale goes to the norm weight (behind the norm, which would undo it before), the rest to the gate:
    norm = s, silu(b_g) = c / s with s = mean |c| of the head, so that gates start near 1.
    """
    c = sums.cn / sums.nn.clamp_min(1e-30)
    scale = c.abs().mean(-1, keepdim=True).clamp_min(1e-6)
    mixer.norm.copy_(scale.expand_as(c))
    mixer.g_proj.weight.zero_()
    mixer.g_proj.bias.copy_(inverse_silu(c / scale).flatten())


@torch.no_grad()
def local_scale_(mixer: GdnMixer, sums: OutputSums, local: LocalSums) -> OutputSums:
    """Scale s [H] of the attention over the last tokens w, with the best factors of n = o / rms(o) beside it put in.

    Least squares of the context on n, a factor per channel, and w, one per head; sums over tokens, then channels d:
    s = sum_d (<ctx, w> - <ctx, n> <n, w> / <n, n>) / sum_d (<w, w> - <n, w>^2 / <n, n>).
    Returns the sums of what s w leaves of the context, for `closed_form_output_`.
    """
    part = local.nw / sums.nn.clamp_min(1e-30)
    rest = torch.maximum(local.ww - (part * local.nw).sum(-1), 1e-3 * local.ww).clamp_min(1e-30)
    scale = (local.cw - (part * sums.cn).sum(-1)) / rest
    mixer.local_scale.copy_(scale)
    return replace(sums, cn=sums.cn - mixer.local_scale.to(sums.cn)[:, None] * local.nw)


@dataclass(frozen=True)
class RidgeFit:
    """Change of an output projection [R, Z] and the mean squared errors before and after on the fitted data."""

    delta: Tensor
    ridge: float


def ridge_update(sums: NormalSums, strength: float = 1e-3) -> RidgeFit:
    """Least squares of the residual r = y - W z on z with prior W: dW = argmin |r - dW z|^2 + lambda |dW|^2.

    lambda = strength * mean diagonal of z^T z. Solved in float64 by Cholesky.
    """
    ridge = strength * sums.zz.diagonal().mean().clamp_min(1e-30)
    eye = torch.eye(len(sums.zz), dtype=sums.zz.dtype, device=sums.zz.device)
    factor = torch.linalg.cholesky(sums.zz + ridge * eye)
    return RidgeFit(torch.cholesky_solve(sums.zr, factor).T.contiguous(), float(ridge))
