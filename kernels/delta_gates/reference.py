"""The definition of the two gates of the delta rule, and its gradients written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tcal_compiler.kernels.gates import decay_gate


def delta_gates_reference(a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Log decay g = -exp(a_log) softplus(a + dt_bias) and write strength beta = sigmoid(b). Source: arXiv:2412.06464.

    a, b [..., T, H]; a_log, dt_bias [H], or anything that broadcasts. Returns two of [..., T, H], at least float32.
    """
    g = decay_gate(a, a_log, dt_bias)
    return g, b.to(g.dtype).sigmoid()


def delta_gates_backward(
    d_g: Tensor, d_beta: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a, b [S, N, H] and a_log, dt_bias [S, H], each in its own dtype.

    With z = a + dt_bias, r = exp(a_log): d_a = -r sigmoid(z) d_g, d_b = d_beta beta (1 - beta), d_dt_bias = sum_N d_a,
    d_a_log = sum_N d_g g.
    """
    acc = torch.promote_types(a.dtype, torch.float32)
    d_g, d_beta, rate = d_g.to(acc), d_beta.to(acc), a_log.to(acc).exp()[:, None]
    z, beta = a.to(acc) + dt_bias.to(acc)[:, None], b.to(acc).sigmoid()
    d_z = -rate * z.sigmoid() * d_g
    d_log = (-rate * F.softplus(z) * d_g).sum(1)
    d_b = d_beta * beta * (1 - beta)
    return d_z.to(a.dtype), d_b.to(b.dtype), d_log.to(a_log.dtype), d_z.sum(1).to(dt_bias.dtype)
