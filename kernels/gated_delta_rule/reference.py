"""The definition of the gated delta rule, token by token. Slow; every other implementation is tested against it.

B batch, T tokens, H query heads, K key/value heads (H a multiple of K), Dk and Dv head dims.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packed import forward_each


def expand_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, T, K, D] -> [B, T, H, D]: query head h reads key/value head h // (H / K), whole heads repeated."""
    return x if x.shape[2] == num_heads else x.repeat_interleave(num_heads // x.shape[2], dim=2)


def gated_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    *,
    scale: float,
    bounds: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated delta rule, arXiv:2412.06464, decay first.

        S~  = exp(g_t) S_{t-1}
        S_t = S~ + k_t (beta_t (v_t - S~^T k_t))^T
        o_t = scale S_t^T q_t

    q [B, T, H, Dk], k [B, T, K, Dk], v [B, T, K, Dv]; g (natural log, <= 0) and beta [B, T, H];
    initial_state [B, H, Dk, Dv]. Callers normalise q and k. Accumulates in float32, or float64 if q is float64.
    Returns o [B, T, H, Dv] in v's dtype and the final state [B, H, Dk, Dv] in initial_state's dtype.

    bounds of N packed sequences: B is 1, states are [N, H, Dk, Dv], and every sequence is as if alone (`packed`).
    """
    if bounds is not None:
        return forward_each(gated_delta_rule_reference, bounds, q, k, v, g, beta, initial_state, scale=scale)
    acc = torch.promote_types(q.dtype, torch.float32)
    heads = q.shape[2]
    qf, kf, vf = q.to(acc) * scale, expand_heads(k, heads).to(acc), expand_heads(v, heads).to(acc)
    gf, bf, state = g.to(acc), beta.to(acc), initial_state.to(acc)
    outputs = []
    for t in range(q.shape[1]):
        state = state * gf[:, t].exp()[..., None, None]
        error = (vf[:, t] - torch.einsum("bhkv,bhk->bhv", state, kf[:, t])) * bf[:, t][..., None]
        state = state + kf[:, t][..., :, None] * error[..., None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, qf[:, t]))
    return torch.stack(outputs, 1).to(v.dtype), state.to(initial_state.dtype)
