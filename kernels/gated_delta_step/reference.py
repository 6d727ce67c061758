"""The definition of the decode step: the whole core of a Gated DeltaNet layer, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

L2_EPS = 1e-6  # that of gates.l2_normalize


def gated_delta_step_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    scale: float,
    normalize: bool = False,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Gated delta rule with its norms, arXiv:2412.06464, decay first.

        q_t, k_t divided by sqrt(sum of squares + L2_EPS), where normalize is set
        S~  = exp(g_t) S_{t-1}
        S_t = S~ + k_t (beta_t (v_t - S~^T k_t))^T
        o_t = scale S_t^T q_t
        y_t = o_t / sqrt(mean o_t^2 + eps) * weight * gate_t sigmoid(gate_t), where gate and weight are given, else o_t

    q [B, T, H, Dk], k [B, T, K, Dk], v [B, T, K, Dv]; g (natural log, <= 0) and beta [B, T, H]; state [B, H, Dk, Dv];
    gate [B, T, H, Dv], weight [H, Dv]. Query head h reads key/value head h // (H / K). Accumulates in float32, or
    float64 if q is float64. Returns y [B, T, H, Dv] in v's dtype and S_T [B, H, Dk, Dv] in state's dtype.
    """
    acc = torch.promote_types(q.dtype, torch.float32)
    heads = torch.arange(q.shape[2], device=q.device) // (q.shape[2] // k.shape[2])
    s, rows = state.to(acc), []
    for t in range(q.shape[1]):
        query, key, value = q[:, t].to(acc), k[:, t, heads].to(acc), v[:, t, heads].to(acc)
        if normalize:
            query, key = (x / (x.square().sum(-1, keepdim=True) + L2_EPS).sqrt() for x in (query, key))
        s = s * g[:, t, :, None, None].to(acc).exp()
        error = value - (s * key[..., None]).sum(-2)
        s = s + key[..., None] * (beta[:, t, :, None].to(acc) * error)[..., None, :]
        y = scale * (s * query[..., None]).sum(-2)
        if gate is not None and weight is not None:
            z = gate[:, t].to(acc)
            y = y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * weight.to(acc) * z * z.sigmoid()
        rows.append(y)
    return torch.stack(rows, 1).to(v.dtype), s.to(state.dtype)
