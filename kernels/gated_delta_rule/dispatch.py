"""Which implementation a call gets: Triton on CUDA once it has proved itself there, else chunked PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tcal_compiler.kernels.registration import on_device
from tcal_compiler.kernels.self_check import Proof, errors_of, exactly, takes_tf32, takes_triton

from .chunked import gated_delta_rule_chunked
from .chunked_backward import gated_delta_rule_chunked_backward
from .packed import backward_each, forward_each

NAMES = ("o", "state", "dq", "dk", "dv", "dg", "dbeta", "d_initial_state")


def forward(*inputs: Tensor, scale: float, bounds: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """Contract of `gated_delta_rule_chunked`; bounds of packed sequences as in `gated_delta_rule_reference`."""
    if _takes_triton(inputs[0], inputs[2], packed=bounds is not None):
        from .triton_forward import gated_delta_rule_triton

        with on_device("gated_delta_rule", *inputs):
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

        with on_device("gated_delta_rule", d_out, d_state, *inputs):
            return gated_delta_rule_triton_backward(d_out, d_state, *inputs, scale=scale, bounds=bounds)
    if bounds is not None:
        return backward_each(gated_delta_rule_chunked_backward, bounds, d_out, d_state, *inputs, scale=scale)
    return gated_delta_rule_chunked_backward(d_out, d_state, *inputs, scale=scale)


def _takes_triton(q: Tensor, v: Tensor, *, packed: bool = False) -> bool:
    op, check = ("packed gated_delta_rule", packed_self_check) if packed else ("gated_delta_rule", self_check)
    return takes_triton(op, check, q, q.shape[-1], v.shape[-1], tf32=takes_tf32(q))


@dataclass(frozen=True)
class Case:
    """Sizes of one comparison with float64."""

    tokens: int
    heads: int
    bounds: tuple[int, ...] | None  # of packed sequences

    def __str__(self) -> str:
        return f"{self.tokens} tokens"


def self_check(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> dict[str, float]:
    """rms error over rms of Triton's results against float64, of every kernel that a call with these dims may take."""
    from tcal_compiler.kernels.gated_delta_step import op as step

    short = step.proof(device, dtype, key_dim, value_dim, normalize=False, normed=False)
    return errors_of(device, _proof(device, dtype, key_dim, value_dim, packed=False), short)


def packed_self_check(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> dict[str, float]:
    """As `self_check`, the tokens in packed sequences."""
    return errors_of(device, _proof(device, dtype, key_dim, value_dim, packed=True))


def cases(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int, *, packed: bool) -> list[Case]:
    """Two query heads on one key head; and a sequence that is cut into segments, where one can be."""
    from .triton_tiles import CHUNK, as_kernels_take, setting_for, sizes_of
    from .triton_walk import cut_for_states, cut_to_read, least_cut

    dims = (key_dim, key_dim, value_dim)
    q, _, v = as_kernels_take(tuple(torch.empty(1, 1, 1, dim, dtype=dtype, device=device) for dim in dims))
    s = setting_for(sizes_of(q, v))
    found = [Case(131, 2, (0, 5, 5, 130, 131) if packed else None)]
    long = least_cut(s) + 1
    if any(cut(long, 1, value_dim, s, device).segments > 1 for cut in (cut_to_read, cut_for_states)):
        found.append(Case(CHUNK * long, 1, (0, CHUNK * long) if packed else None))
    return found


def _proof(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int, *, packed: bool) -> Proof:
    from .triton_backward import gated_delta_rule_triton_backward
    from .triton_forward import gated_delta_rule_triton

    scale = key_dim**-0.5
    tried = cases(device, dtype, key_dim, value_dim, packed=packed)
    made = [_made(device, dtype, key_dim, value_dim, case) for case in tried]

    def run() -> list[Tensor]:
        results: list[Tensor] = []
        for case, (inputs, seeds) in zip(tried, made, strict=True):
            results += gated_delta_rule_triton(*inputs, scale=scale, bounds=case.bounds)
            results += gated_delta_rule_triton_backward(*seeds, *inputs, scale=scale, bounds=case.bounds)
        return results

    def exact() -> list[Tensor]:
        results: list[Tensor] = []
        for case, tensors in zip(tried, made, strict=True):
            inputs, seeds = map(exactly, tensors)  # float64, which goes to PyTorch
            results += forward(*inputs, scale=scale, bounds=case.bounds)
            results += backward(*seeds, *inputs, scale=scale, bounds=case.bounds)
        return results

    return Proof([f"{name} of {case}" for case in tried for name in NAMES], run, exact)


def _made(
    device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int, case: Case
) -> tuple[list[Tensor], list[Tensor]]:
    """q, k (unit), v, g, beta, state; gradients of outputs and final state."""
    gen = torch.Generator().manual_seed(0)

    def randn(*size: int, as_dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=gen).to(device, as_dtype)

    def unit(*size: int) -> Tensor:
        return torch.nn.functional.normalize(randn(*size), dim=-1).to(dtype)

    each, heads = (1, case.tokens), case.heads
    q, k, v = unit(*each, heads, key_dim), unit(*each, 1, key_dim), randn(*each, 1, value_dim, as_dtype=dtype)
    g, beta = -torch.nn.functional.softplus(randn(*each, heads) - 2), randn(*each, heads).sigmoid()
    state = (1 if case.bounds is None else len(case.bounds) - 1, heads, key_dim, value_dim)
    inputs = [q, k, v, g, beta, randn(*state)]
    return inputs, [randn(*each, heads, value_dim, as_dtype=dtype), randn(*state)]
