"""The gated delta rule by chunks (WY form): T / C dependent steps of matrix products instead of T.

Within a chunk of C tokens, with c_t the running sum of g and L_ts = exp(c_t - c_s) for s <= t,

    A = strictly lower(beta k k^T * L)          (I + A) U = beta v        (I + A) W = beta k exp(c)
    V' = U - W S        O = (q exp(c)) S + lower(q k^T * L) V'        S <- exp(c_C) S + (k exp(c_C - c))^T V'

Only differences c_t - c_s <= 0 are exponentiated, so nothing overflows. Source of the form: arXiv:2406.06484.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import expand_heads

CHUNK = 64


def _one_token(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence itself for T = 1; heads are expanded and q is scaled."""
    state = state * g[:, 0].exp()[..., None, None]
    error = (v[:, 0] - (k[:, 0].unsqueeze(-2) @ state).squeeze(-2)) * beta[:, 0].unsqueeze(-1)
    state = state + k[:, 0].unsqueeze(-1) * error.unsqueeze(-2)
    return (q[:, 0].unsqueeze(-2) @ state).squeeze(-2).unsqueeze(1), state


def _split(x: Tensor, chunk: int) -> Tensor:
    """[B, T, H, ...] -> [B, H, N, C, ...]."""
    batch, tokens, heads = x.shape[:3]
    return x.transpose(1, 2).reshape(batch, heads, tokens // chunk, chunk, *x.shape[3:])


def _within_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
    """All that needs no state, for all chunks at once; arguments are [B, H, N, C, ...]."""
    size = q.shape[3]
    cum = g.cumsum(-1)
    lower = torch.ones(size, size, device=q.device, dtype=torch.bool).tril()
    decay = (cum.unsqueeze(-1) - cum.unsqueeze(-2)).masked_fill(~lower, float("-inf")).exp()
    k_beta = k * beta.unsqueeze(-1)
    kt = k.transpose(-1, -2)
    a = (k_beta @ kt * decay).tril(-1)
    eye = torch.eye(size, device=q.device, dtype=q.dtype)
    grow = cum.exp().unsqueeze(-1)
    rhs = torch.cat([v * beta.unsqueeze(-1), k_beta * grow], -1)
    uw = torch.linalg.solve_triangular(a + eye, rhs, upper=False, unitriangular=True)
    u, w = uw.split([v.shape[-1], k.shape[-1]], -1)
    last = cum[..., -1]
    k_out = (k * (last.unsqueeze(-1) - cum).exp().unsqueeze(-1)).transpose(-1, -2)
    return u, w, q @ kt * decay, q * grow, k_out, last.exp()


def gated_delta_rule_chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor, *, scale: float, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Same contract as `gated_delta_rule_reference`; `chunk` (tokens) does not change the result beyond rounding."""
    acc = torch.promote_types(q.dtype, torch.float32)
    tokens, heads = q.shape[1], q.shape[2]
    qf, kf, vf = q.to(acc) * scale, expand_heads(k, heads).to(acc), expand_heads(v, heads).to(acc)
    gf, bf, state = g.to(acc), beta.to(acc), initial_state.to(acc)
    if tokens == 1:
        out, state = _one_token(qf, kf, vf, gf, bf, state)
        return out.to(v.dtype), state.to(initial_state.dtype)
    chunk = min(chunk, tokens)
    pad = -tokens % chunk  # padded tokens have beta = 0 and g = 0: they leave the state alone
    if pad:
        qf, kf, vf = (F.pad(z, (0, 0, 0, 0, 0, pad)) for z in (qf, kf, vf))
        gf, bf = (F.pad(z, (0, 0, 0, pad)) for z in (gf, bf))
    u, w, scores, q_in, k_out, shrink = _within_chunks(*(_split(z, chunk) for z in (qf, kf, vf, gf, bf)))
    outputs = []
    for n in range((tokens + pad) // chunk):
        fresh = u[:, :, n] - w[:, :, n] @ state
        outputs.append(q_in[:, :, n] @ state + scores[:, :, n] @ fresh)
        state = state * shrink[:, :, n, None, None] + k_out[:, :, n] @ fresh
    out = torch.stack(outputs, 2).flatten(2, 3).transpose(1, 2)[:, :tokens]
    return out.to(v.dtype), state.to(initial_state.dtype)
