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


def _unit_lower_inverse(a: Tensor) -> Tensor:
    """(I + a)^-1 for strictly lower a [..., C, C], C a power of two, by products of matrices only.

    Blocks of 8 by the finite series (I - a)(I + a^2)(I + a^4): a^8 = 0, and its terms stay small at this size. Then
    blocks double: the inverse of [[P, 0], [L, Q]] is [[P^-1, 0], [-Q^-1 L P^-1, Q^-1]].
    """
    size, lead = a.shape[-1], a.shape[:-2]
    a = a.reshape(-1, size, size)
    block = min(8, size)
    parts = size // block
    diag = a.view(-1, parts, block, parts, block).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    square = diag @ diag
    inverse = torch.eye(block, dtype=a.dtype, device=a.device) - diag
    inverse = inverse + inverse @ square
    inverse = inverse + inverse @ (square @ square)
    while block < size:
        parts //= 2
        low = a.view(-1, parts, 2, block, parts, 2, block)[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        first, second = inverse[:, 0::2], inverse[:, 1::2]
        corner = -(second @ low @ first)
        top = torch.cat([first, torch.zeros_like(corner)], -1)
        inverse = torch.cat([top, torch.cat([corner, second], -1)], -2)
        block *= 2
    return inverse.reshape(*lead, size, size)


def _within_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
    """All that needs no state, for all chunks at once; arguments are [B, H, N, C, ...]."""
    size = q.shape[3]
    cum = g.cumsum(-1)
    lower = torch.ones(size, size, device=q.device, dtype=torch.bool).tril()
    decay = (cum.unsqueeze(-1) - cum.unsqueeze(-2)).masked_fill(~lower, float("-inf")).exp()
    k_beta = k * beta.unsqueeze(-1)
    kt = k.transpose(-1, -2)
    a = (k_beta @ kt * decay).tril(-1)
    grow = cum.exp().unsqueeze(-1)
    rhs = torch.cat([v * beta.unsqueeze(-1), k_beta * grow], -1)
    u, w = (_unit_lower_inverse(a) @ rhs).split([v.shape[-1], k.shape[-1]], -1)
    last = cum[..., -1]
    k_out = (k * (last.unsqueeze(-1) - cum).exp().unsqueeze(-1)).transpose(-1, -2)
    return u, w, q @ kt * decay, q * grow, k_out, last.exp()


def gated_delta_rule_chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor, *, scale: float, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Same contract as `gated_delta_rule_reference`; `chunk` (tokens, a power of two) is invisible beyond rounding."""
    acc = torch.promote_types(q.dtype, torch.float32)
    tokens, heads = q.shape[1], q.shape[2]
    qf, kf, vf = q.to(acc) * scale, expand_heads(k, heads).to(acc), expand_heads(v, heads).to(acc)
    gf, bf, state = g.to(acc), beta.to(acc), initial_state.to(acc)
    if tokens == 1:
        out, state = _one_token(qf, kf, vf, gf, bf, state)
        return out.to(v.dtype), state.to(initial_state.dtype)
    chunk = min(chunk, 1 << (tokens - 1).bit_length())  # a power of two
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
