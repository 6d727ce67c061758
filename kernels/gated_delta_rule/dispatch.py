"""Which implementation a call gets: Triton on CUDA once it has proved itself there, else chunked PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from tcal_compiler.kernels.self_check import exactly, relative_errors, takes_triton

from .chunked import gated_delta_rule_chunked
from .chunked_backward import gated_delta_rule_chunked_backward

NAMES = ("o", "state", "dq", "dk", "dv", "dg", "dbeta", "d_initial_state")


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Contract of `gated_delta_rule_chunked`."""
    if _takes_triton(q, v):
        from .triton_forward import gated_delta_rule_triton

        with torch.cuda.device(q.device):
            return gated_delta_rule_triton(q, k, v, g, beta, initial_state, scale=scale)
    return gated_delta_rule_chunked(q, k, v, g, beta, initial_state, scale=scale)


def backward(d_out: Tensor, d_state: Tensor, *inputs: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Contract of `gated_delta_rule_chunked_backward`."""
    if _takes_triton(inputs[0], inputs[2]):
        from .triton_backward import gated_delta_rule_triton_backward

        with torch.cuda.device(d_out.device):
            return gated_delta_rule_triton_backward(d_out, d_state, *inputs, scale=scale)
    return gated_delta_rule_chunked_backward(d_out, d_state, *inputs, scale=scale)


def _takes_triton(q: Tensor, v: Tensor) -> bool:
    return takes_triton("gated_delta_rule", self_check, q, q.shape[-1], v.shape[-1])


def self_check(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> dict[str, float]:
    """rms error over rms of Triton's results against float64: 131 tokens, two query heads on one key head; steps."""
    from tcal_compiler.kernels.gated_delta_step import op as step

    from .triton_backward import gated_delta_rule_triton_backward
    from .triton_forward import gated_delta_rule_triton

    gen = torch.Generator().manual_seed(0)
    scale = key_dim**-0.5

    def randn(*size: int, as_dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=gen).to(device, as_dtype)

    def unit(*size: int) -> Tensor:
        return torch.nn.functional.normalize(randn(*size), dim=-1).to(dtype)

    q, k, v = unit(1, 131, 2, key_dim), unit(1, 131, 1, key_dim), randn(1, 131, 1, value_dim, as_dtype=dtype)
    g, beta = -torch.nn.functional.softplus(randn(1, 131, 2) - 2), randn(1, 131, 2).sigmoid()
    inputs = (q, k, v, g, beta, randn(1, 2, key_dim, value_dim))
    seeds = (randn(1, 131, 2, value_dim, as_dtype=dtype), randn(1, 2, key_dim, value_dim))

    actual = [
        *gated_delta_rule_triton(*inputs, scale=scale),
        *gated_delta_rule_triton_backward(*seeds, *inputs, scale=scale),
    ]
    exact = [
        *gated_delta_rule_chunked(*exactly(inputs), scale=scale),
        *gated_delta_rule_chunked_backward(*exactly(seeds), *exactly(inputs), scale=scale),
    ]
    steps = step.self_check(device, dtype, key_dim, value_dim, normalize=False, normed=False)
    return relative_errors(NAMES, actual, exact) | steps
