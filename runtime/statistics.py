"""Statistics of the teacher's attention: mergeable float64 sums over tokens, without a T x T map.

B sequences, T tokens, H query heads, D value dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tcal_compiler.kernels import attention_stats
from tcal_compiler.kernels.scores import Scores
from tcal_compiler.passes.types import AttentionSite


@dataclass(frozen=True)
class SiteStats:
    """Sums over tokens of one site; merge two by adding.

    sums: distance [H] sum_t sum_s a_ts max(t - s, 1/2) tokens; entropy [H] nats; mass [H, OCTAVES] by
    distance 0, 1, 2-3, 4-7, ...
    """

    tokens: int
    sums: dict[str, Tensor]

    def merge(self, other: SiteStats) -> SiteStats:
        return SiteStats(self.tokens + other.tokens, {k: v + other.sums[k] for k, v in self.sums.items()})

    @property
    def distance(self) -> Tensor:
        """Mean look-back distance [H] in tokens, at least 1/2."""
        return (self.sums["distance"] / self.tokens).clamp_min(0.5)

    @property
    def entropy(self) -> Tensor:
        """Mean entropy of the attention rows [H] in nats."""
        return self.sums["entropy"] / self.tokens

    @property
    def mass(self) -> Tensor:
        """Mean row mass per distance octave [H, OCTAVES]; sums to 1."""
        return self.sums["mass"] / self.tokens


def _scores(q: Tensor, site: AttentionSite) -> Scores:
    slopes, sinks = (torch.tensor(x, dtype=q.dtype, device=q.device) if x else None for x in (site.slopes, site.sinks))
    return Scores(site.scale, site.window or 0, site.softcap, slopes, sinks, site.first)


@torch.no_grad()
def attention_statistics(q: Tensor, k: Tensor, v: Tensor, *, site: AttentionSite) -> tuple[SiteStats, Tensor]:
    """Statistics of one batch and the teacher's context.

    q [B, H, T, Dk], k [B, K, T, Dk], v [B, K, T, Dv]. Returns the sums (float64) and ctx [B, T, H, Dv] = softmax(..) v.
    """
    found = attention_stats.attention_statistics(q, k, v, scores=_scores(q, site))
    context, distance, entropy, mass = found
    return SiteStats(q.shape[0] * q.shape[2], {"distance": distance, "entropy": entropy, "mass": mass}), context


@dataclass(frozen=True)
class OutputSums:
    """Sums for the closed-form output: of the context on the rule's output, per head and per channel; merge by adding.

    co, oo [H]: <ctx, o>, <o, o>. cn, nn [H, D]: the same per channel with n = o / rms(o). rms [H]: sum of rms(o).
    """

    tokens: int
    co: Tensor
    oo: Tensor
    cn: Tensor
    nn: Tensor
    rms: Tensor

    def merge(self, other: OutputSums) -> OutputSums:
        pairs = ((getattr(self, f), getattr(other, f)) for f in ("co", "oo", "cn", "nn", "rms"))
        return OutputSums(self.tokens + other.tokens, *(a + b for a, b in pairs))


@torch.no_grad()
def output_sums(q: Tensor, k: Tensor, v: Tensor, o: Tensor, *, site: AttentionSite) -> OutputSums:
    """Sums over B and T of the teacher's context on o [B, T, H, D]; q, k, v as for `attention_statistics`."""
    sums = attention_stats.attention_output_sums(q, k, v, o, scores=_scores(q, site))
    return OutputSums(q.shape[0] * q.shape[2], *sums)


@dataclass(frozen=True)
class LocalSums:
    """Sums of the output w of attention over the last tokens; merge by adding.

    cw, ww [H]: <ctx, w>, <w, w>. nw [H, D]: <n, w> per channel, n = o / rms(o) as in OutputSums.
    """

    cw: Tensor
    ww: Tensor
    nw: Tensor

    def merge(self, other: LocalSums) -> LocalSums:
        return LocalSums(*(getattr(self, f) + getattr(other, f) for f in ("cw", "ww", "nw")))


@torch.no_grad()
def local_sums(context: Tensor, o: Tensor, w: Tensor) -> LocalSums:
    """Sums over B and T, in float64: of the teacher's context on w, and of w on o; each [B, T, H, D]."""
    n = o * (o.square().mean(-1, keepdim=True) + attention_stats.EPS).rsqrt()
    cw, ww, nw = ((a * b).sum((0, 1), dtype=torch.float64) for a, b in ((context, w), (w, w), (n, w)))
    return LocalSums(cw.sum(-1), ww.sum(-1), nw)


@dataclass(frozen=True)
class NormalSums:
    """Normal equations of a linear map z -> r, float64: zz [Z, Z], zr [Z, R]; merge by adding."""

    zz: Tensor
    zr: Tensor

    def merge(self, other: NormalSums) -> NormalSums:
        return NormalSums(self.zz + other.zz, self.zr + other.zr)


@torch.no_grad()
def normal_sums(z: Tensor, r: Tensor) -> NormalSums:
    """z [..., Z], r [..., R]; products in float32 over at most some thousand rows, sums in float64."""
    zf, rf = z.flatten(0, -2), r.flatten(0, -2)
    return NormalSums((zf.T @ zf).double(), (zf.T @ rf).double())


def half_life_rate(distance: Tensor, low: float = 1e-3, high: float = 5.0) -> Tensor:
    """Decay rate ln 2 / distance per token, clipped: the state's half-life is the teacher's look-back distance."""
    return (math.log(2) / distance).clamp(low, high)
