"""Which implementation a call gets: Triton on CUDA once it has proved itself there, else chunked PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from tcal_compiler.kernels.self_check import exactly, relative_errors, takes_triton

from .chunked import gated_delta_rule_chunked
from .chunked_backward import gated_delta_rule_chunked_backward
from .packed import backward_each, forward_each

NAMES = ("o", "state", "dq", "dk", "dv", "dg", "dbeta", "d_initial_state")


def forward(*inputs: Tensor, scale: float, bounds: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """Contract of `gated_delta_rule_chunked`; bounds of packed sequences as in `gated_delta_rule_reference`."""
    if _takes_triton(inputs[0], inputs[2], packed=bounds is not None):
        from .triton_forward import gated_delta_rule_triton

        with torch.cuda.device(inputs[0].device):
            return gated_delta_rule_triton(*inputs, scale=scale, bounds=bounds)
    if bounds is not None:
        return forward_each(gated_delta_rule_chunked, bounds, *inputs, scale=scale)
    return gated_delta_rule_chunked(*inputs, scale=scale)


def backward(
    d_out: Tensor, d_state: Tensor, *inputs: Tensor, scale: float, bounds: tuple[int, ...] | None = None
) -> tuple[Tensor, ...]:
    """Contract of `gated_delta_rule_chunked_backward`; bounds as in `forward`."""
    if _takes_triton(inputs[0], inputs[2], packed=bounds is not None):
        from .triton_backward import gated_delta_rule_triton_backward

        with torch.cuda.device(d_out.device):
            return gated_delta_rule_triton_backward(d_out, d_state, *inputs, scale=scale, bounds=bounds)
    if bounds is not None:
        return backward_each(gated_delta_rule_chunked_backward, bounds, d_out, d_state, *inputs, scale=scale)
    return gated_delta_rule_chunked_backward(d_out, d_state, *inputs, scale=scale)


def _takes_triton(q: Tensor, v: Tensor, *, packed: bool = False) -> bool:
    op, check = ("packed gated_delta_rule", packed_self_check) if packed else ("gated_delta_rule", self_check)
    return takes_triton(op, check, q, q.shape[-1], v.shape[-1])


def self_check(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> dict[str, float]:
    """rms error over rms of Triton's results against float64: 131 tokens, two query heads on one key head; steps.

    Where launch settings come from the table (`tuning`), also as many tokens as are cut into segments, since those take
    the widest programs and kernels of their own.
    """
    from tcal_compiler.kernels.gated_delta_step import op as step

    found = step.self_check(device, dtype, key_dim, value_dim, normalize=False, normed=False)
    for tokens in _lengths(device, dtype, key_dim, value_dim):
        errors = _errors(device, dtype, key_dim, value_dim, tokens, None)
        found |= {f"{name} of {tokens} tokens": error for name, error in errors.items()}
    return found


def packed_self_check(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> dict[str, float]:
    """As `self_check`, the tokens in packed sequences."""
    found: dict[str, float] = {}
    for tokens in _lengths(device, dtype, key_dim, value_dim):
        errors = _errors(device, dtype, key_dim, value_dim, tokens, (0, 5, 5, tokens - 1, tokens))
        found |= {f"{name} of {tokens} tokens": error for name, error in errors.items()}
    return found


def _lengths(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> list[int]:
    """Tokens that a proof takes."""
    from .triton_tiles import CHUNK, as_kernels_take, measured_for, setting_for
    from .triton_walk import least_cut

    dims = (key_dim, key_dim, value_dim)
    q, _, v = as_kernels_take(tuple(torch.empty(1, 1, 1, dim, dtype=dtype, device=device) for dim in dims))
    return [131, CHUNK * (least_cut(setting_for(q, v)) + 1)] if measured_for(q, v) else [131]


def _errors(
    device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int, tokens: int, bounds: tuple[int, ...] | None
) -> dict[str, float]:
    from .triton_backward import gated_delta_rule_triton_backward
    from .triton_forward import gated_delta_rule_triton

    gen = torch.Generator().manual_seed(0)
    scale = key_dim**-0.5

    def randn(*size: int, as_dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=gen).to(device, as_dtype)

    def unit(*size: int) -> Tensor:
        return torch.nn.functional.normalize(randn(*size), dim=-1).to(dtype)

    q, k, v = unit(1, tokens, 2, key_dim), unit(1, tokens, 1, key_dim), randn(1, tokens, 1, value_dim, as_dtype=dtype)
    g, beta = -torch.nn.functional.softplus(randn(1, tokens, 2) - 2), randn(1, tokens, 2).sigmoid()
    states = (1 if bounds is None else len(bounds) - 1, 2, key_dim, value_dim)
    inputs = (q, k, v, g, beta, randn(*states))
    seeds = (randn(1, tokens, 2, value_dim, as_dtype=dtype), randn(*states))

    actual = [
        *gated_delta_rule_triton(*inputs, scale=scale, bounds=bounds),
        *gated_delta_rule_triton_backward(*seeds, *inputs, scale=scale, bounds=bounds),
    ]
    wide, wide_seeds = exactly(inputs), exactly(seeds)  # float64, which goes to PyTorch
    exact = [
        *forward(*wide, scale=scale, bounds=bounds),
        *backward(*wide_seeds, *wide, scale=scale, bounds=bounds),
    ]
    return relative_errors(NAMES, actual, exact)
