"""The definition of the attention statistics, from whole T x T maps. Every other implementation is tested against it.

B batch, T tokens, H query heads, K key/value heads (H a multiple of K), Dk and Dv head dims. Query t sees the keys s
with 0 <= t - s < window. All sums over b and t are float64.

    a_ts = softmax_s(scale q_t k_s)        ctx_t = sum_s a_ts v_s
"""

from __future__ import annotations

import torch
from torch import Tensor

from tcal_compiler.kernels.gated_delta_rule.reference import expand_heads

OCTAVES = 20  # bin 0 is distance 0, bin i > 0 starts at 2^(i-1); the last bin has no end
EPS = 1e-5  # of rms(o), as in the gated RMS norm


def _weights(q: Tensor, k: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    """a [B, H, T, T] in float64, and the distances [T, T]."""
    heads, tokens = q.shape[1], q.shape[2]
    k = expand_heads(k.transpose(1, 2), heads).transpose(1, 2)
    at = torch.arange(tokens, device=q.device)
    far = at[:, None] - at
    hidden = (far < 0) | (far >= (window or tokens))
    scores = scale * torch.einsum("bhtd,bhsd->bhts", q.double(), k.double())
    return scores.masked_fill(hidden, float("-inf")).softmax(-1), far.clamp_min(0)


def _context(a: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhts,bshd->bthd", a, expand_heads(v.transpose(1, 2), a.shape[1]).double())


def attention_statistics_reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ctx, sum of look-back distances, sum of entropies, row mass by distance octave.

        distance = sum a_ts max(t - s, 1/2)      entropy = -sum a_ts ln a_ts      mass_i = sum of a_ts, t - s in bin i

    q [B, H, T, Dk], k [B, K, T, Dk], v [B, K, T, Dv]. Returns ctx [B, T, H, Dv] in v's dtype; distance [H] in tokens,
    entropy [H] in nats, mass [H, OCTAVES].
    """
    a, far = _weights(q, k, scale, window)
    octave = sum((far >= 2**i).long() for i in range(OCTAVES - 1))
    mass = torch.stack([(a * (octave == i)).sum((0, 2, 3)) for i in range(OCTAVES)], 1)
    distance = (a * far.clamp_min(0.5)).sum((0, 2, 3))
    return _context(a, v).to(v.dtype), distance, -torch.xlogy(a, a).sum((0, 2, 3)), mass


def attention_output_sums_reference(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, *, scale: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sums of the context on another output o [B, T, H, Dv], with n = o / rms(o), rms over Dv.

    Returns <ctx, o> [H], <o, o> [H], per channel <ctx, n> and <n, n> [H, Dv], and the sum of rms(o) [H].
    """
    a, _ = _weights(q, k, scale, window)
    return sums_of_outputs(_context(a, v), o)


def sums_of_outputs(context: Tensor, o: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sums of `attention_output_sums_reference` for a context [B, T, H, Dv]."""
    c, o = context.double(), o.double()
    rms = (o.square().mean(-1, keepdim=True) + EPS).sqrt()
    n = o / rms
    scalars, channels = (0, 1, 3), (0, 1)
    co, oo = (c * o).sum(scalars), o.square().sum(scalars)
    return co, oo, (c * n).sum(channels), n.square().sum(channels), rms.squeeze(-1).sum(channels)
