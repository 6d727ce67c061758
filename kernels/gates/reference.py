"""Definitions of the gates. B batch, T tokens, H heads, D head dim; leading dimensions broadcast.

All accumulate in float32, or in float64 when the input is float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

L2_EPS = 1e-6


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def decay_gate(a: Tensor, a_log: Tensor, dt_bias: Tensor) -> Tensor:
    """Log decay g = -exp(a_log) softplus(a + dt_bias), natural log per token, <= 0. Source: arXiv:2412.06464.

    a [..., T, H]; a_log, dt_bias [H]. Returns [..., T, H], at least float32.
    """
    acc = _accumulator(a)
    return -a_log.to(acc).exp() * F.softplus(a.to(acc) + dt_bias.to(acc))


def l2_normalize_reference(x: Tensor, eps: float = L2_EPS) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last dimension: a zero vector stays zero. At least float32."""
    x = x.to(_accumulator(x))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def l2_normalize_backward(d_y: Tensor, x: Tensor, eps: float) -> Tensor:
    """With y = x r: r (d_y - y sum(y d_y)), in the dtype of x."""
    wide = x.to(_accumulator(x))
    r = torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)
    y = wide * r
    return (r * (d_y - y * (y * d_y).sum(-1, keepdim=True))).to(x.dtype)
