"""Which implementation a call gets: Triton on CUDA once it has proved itself there, else chunked PyTorch.

The proof is a comparison with float64, outputs and all gradients, on a small case of the caller's head dims and dtype;
it runs once per process, device, dtype and head dims. Compilers for new cards have been wrong before (Triton 3.4 to
3.7.0 on Hopper), and a wrong gradient raises no error by itself.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache

import torch
from torch import Tensor

from .chunked import gated_delta_rule_chunked
from .chunked_backward import gated_delta_rule_chunked_backward

LARGEST_HEAD_DIM = 256
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # rms error over rms, of any result
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
    if not q.is_cuda or q.dtype not in ALLOWED or max(q.shape[-1], v.shape[-1]) > LARGEST_HEAD_DIM or not q.numel():
        return False
    return _proved(q.device.index, q.dtype, q.shape[-1], v.shape[-1])


@cache
def _proved(device: int, dtype: torch.dtype, key_dim: int, value_dim: int) -> bool:
    """Whether Triton is installed and right for these; says once why not."""
    if importlib.util.find_spec("triton") is None:
        warnings.warn("gated_delta_rule runs in plain PyTorch on this GPU: Triton is not installed", stacklevel=2)
        return False
    try:
        with torch.cuda.device(device):
            errors = self_check(torch.device("cuda", device), dtype, key_dim, value_dim)
    except Exception as e:  # whatever a compiler can raise: the other path is right in any case
        warnings.warn(f"gated_delta_rule runs in plain PyTorch on this GPU: Triton failed with {e!r}", stacklevel=2)
        return False
    wrong = {name: error for name, error in errors.items() if not error <= ALLOWED[dtype]}
    if wrong:
        found = ", ".join(f"{name} {error:.1e}" for name, error in wrong.items())
        warnings.warn(
            f"gated_delta_rule runs in plain PyTorch on this GPU: Triton's results for {dtype}, head dims {key_dim} "
            f"and {value_dim}, differ from float64 by more than {ALLOWED[dtype]:.0e}: {found}",
            stacklevel=2,
        )
    return not wrong


def self_check(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> dict[str, float]:
    """rms error over rms of Triton's results against float64: two query heads on one key head, 131 and 3 tokens."""
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
    few = (*(x[:, :3] for x in inputs[:5]), inputs[5])

    def exactly(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.double() for x in tensors)

    actual = [
        *gated_delta_rule_triton(*inputs, scale=scale),
        *gated_delta_rule_triton_backward(*seeds, *inputs, scale=scale),
        *gated_delta_rule_triton(*few, scale=scale),
    ]
    exact = [
        *gated_delta_rule_chunked(*exactly(inputs), scale=scale),
        *gated_delta_rule_chunked_backward(*exactly(seeds), *exactly(inputs), scale=scale),
        *gated_delta_rule_chunked(*exactly(few), scale=scale),
    ]
    names = (*NAMES, "o of 3 tokens", "state of 3 tokens")

    def rms(x: Tensor) -> float:
        return x.double().square().mean().sqrt().item()

    return {n: rms(x - y) / rms(y) for n, x, y in zip(names, actual, exact, strict=True)}
