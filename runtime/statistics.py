"""Statistics of the teacher's attention, streamed: mergeable float64 sums, never a T x T map that is kept.

B sequences, T tokens, H query heads, D value dim. Query rows are taken a block at a time, so memory is O(block T).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tcal_compiler.kernels.cached_attention.reference import attention_weights, score_mask
from tcal_compiler.kernels.gated_delta_rule.reference import expand_heads
from tcal_compiler.passes.types import AttentionSite

OCTAVES = 20  # row mass at distance 0, 1, 2-3, 4-7, ...: bin i > 0 starts at 2^(i-1)
BLOCK = 128


@dataclass(frozen=True)
class SiteStats:
    """Sums over tokens of one site; merge two by adding.

    sums: distance [H] sum_t sum_s a_ts max(t - s, 1/2) tokens; entropy [H] nats; mass [H, OCTAVES] by distance.
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


def attention_rows(q: Tensor, k: Tensor, *, site: AttentionSite, start: int, stop: int) -> Tensor:
    """Attention rows of query tokens start..stop: [B, H, stop - start, stop], as the site masks and shapes them.

    q [B, H, T, Dk] and k [B, H, T, Dk] with heads already expanded.
    """
    distance = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(stop, device=q.device)[None]
    slopes, sinks = (torch.tensor(x, dtype=q.dtype, device=q.device) if x else None for x in (site.slopes, site.sinks))
    mask = score_mask(distance, window=site.window or 0, slopes=slopes, dtype=q.dtype)
    rows, keys = q[:, :, start:stop], k[:, :, :stop]
    return attention_weights(rows, keys, mask, scale=site.scale, softcap=site.softcap, sinks=sinks)


@torch.no_grad()
def attention_statistics(
    q: Tensor, k: Tensor, v: Tensor, *, site: AttentionSite, block: int = BLOCK
) -> tuple[SiteStats, Tensor]:
    """Statistics of one batch and the teacher's context.

    q [B, H, T, Dk], k [B, K, T, Dk], v [B, K, T, Dv]. Returns the sums (float64) and ctx [B, T, H, Dv] = softmax(..) v.
    """
    heads, length = q.shape[1], q.shape[2]
    k = expand_heads(k.transpose(1, 2), heads).transpose(1, 2)
    v = expand_heads(v.transpose(1, 2), heads).transpose(1, 2)
    device = q.device
    sums = {
        "distance": torch.zeros(heads, dtype=torch.float64, device=device),
        "entropy": torch.zeros(heads, dtype=torch.float64, device=device),
        "mass": torch.zeros(heads, OCTAVES, dtype=torch.float64, device=device),
    }
    context = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        rows = attention_rows(q, k, site=site, start=start, stop=stop)
        context.append(rows @ v[:, :, :stop])
        if site.sinks:  # where a token looks, if it does not look at the sink
            rows = rows / rows.sum(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
        steps = (torch.arange(start, stop, device=device)[:, None] - torch.arange(stop, device=device)[None]).clamp_min(
            0
        )
        sums["distance"] += (rows * steps.clamp_min(0.5).to(rows.dtype)).sum((0, 2, 3), dtype=torch.float64)
        sums["entropy"] -= torch.xlogy(rows, rows).sum((0, 2, 3), dtype=torch.float64)
        octave = torch.where(steps > 0, steps.clamp_min(1).log2().floor().long() + 1, 0).clamp_max(OCTAVES - 1)
        by_pair = rows.sum(0, dtype=torch.float64).flatten(1)
        sums["mass"].index_add_(1, octave.flatten(), by_pair)
    return SiteStats(q.shape[0] * length, sums), torch.cat(context, 2).transpose(1, 2)


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
def output_sums(context: Tensor, o: Tensor, eps: float = 1e-5) -> OutputSums:
    """context, o [B, T, H, D] -> sums in float64 over B and T."""
    c, o = context.double(), o.double()
    rms = (o.square().mean(-1, keepdim=True) + eps).sqrt()
    n = o / rms
    over = (0, 1)
    return OutputSums(
        o.shape[0] * o.shape[1],
        (c * o).sum((0, 1, 3)),
        o.square().sum((0, 1, 3)),
        (c * n).sum(over),
        n.square().sum(over),
        rms.squeeze(-1).sum(over),
    )


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
