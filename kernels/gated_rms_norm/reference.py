"""The definition of the gated RMS norm, and its gradients written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_rms_norm_reference(o: Tensor, gate: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """o / rms(o) * weight * silu(gate), rms over the last dimension. Source: arXiv:2412.06464.

    o, gate [..., H, D]; weight [H, D], or anything that broadcasts. Returns [..., H, D], at least float32.
    """
    acc = torch.promote_types(o.dtype, torch.float32)
    o = o.to(acc)
    normed = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + eps)
    return normed * weight.to(acc) * F.silu(gate.to(acc))


def gated_rms_norm_backward(
    d_y: Tensor, o: Tensor, gate: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of o, gate [S, N, H, D] and weight [S, H, D], each in its own dtype.

    With r = 1 / rms(o), n = o r, s = silu(gate), u = d_y weight s: d_o = r (u - n mean(u n)), d_weight = sum_N d_y n s,
    d_gate = d_y weight n s', s' = sigmoid(gate) (1 + gate (1 - sigmoid(gate))).
    """
    acc = torch.promote_types(o.dtype, torch.float32)
    d_y, of, gf, wf = d_y.to(acc), o.to(acc), gate.to(acc), weight.to(acc)[:, None]
    r = torch.rsqrt(of.square().mean(-1, keepdim=True) + eps)
    n, sigmoid = of * r, gf.sigmoid()
    by_norm = d_y * n
    u = d_y * wf * (gf * sigmoid)
    d_o = r * (u - n * (u * n).mean(-1, keepdim=True))
    d_gate = by_norm * wf * sigmoid * (1 + gf * (1 - sigmoid))
    d_weight = (by_norm * gf * sigmoid).sum(1)
    return d_o.to(o.dtype), d_gate.to(gate.dtype), d_weight.to(weight.dtype)
