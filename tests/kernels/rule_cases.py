"""Inputs and gradients for the tests of the gated delta rule."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tcal_compiler.kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_reference

NAMES = ("q", "k", "v", "g", "beta", "initial_state")
SCALE = 0.3


def make_args(
    shape: tuple[int, int, int, int, int, int],
    dtype: torch.dtype = torch.float64,
    *,
    decay: float = 0.3,
    seed: int = 0,
    device: str = "cpu",
) -> list[Tensor]:
    """q, k (unit), v, g, beta, state for (B, T, H, K, Dk, Dv); gates and state at least float32."""
    batch, tokens, heads, kv_heads, key_dim, value_dim = shape
    gen = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=gen)

    q = F.normalize(randn(batch, tokens, heads, key_dim), dim=-1)
    k = F.normalize(randn(batch, tokens, kv_heads, key_dim), dim=-1)
    v = randn(batch, tokens, kv_heads, value_dim)
    g = -decay * F.softplus(randn(batch, tokens, heads))
    beta = randn(batch, tokens, heads).sigmoid()
    state = randn(batch, heads, key_dim, value_dim)
    acc = torch.promote_types(dtype, torch.float32)
    return [x.to(device, dtype) for x in (q, k, v)] + [x.to(device, acc) for x in (g, beta, state)]


def exactly(args: list[Tensor]) -> list[Tensor]:
    """The same numbers in float64 on the CPU."""
    return [x.detach().double().cpu() for x in args]


def op(args: list[Tensor]) -> tuple[Tensor, Tensor]:
    q, k, v, g, beta, state = args
    return gated_delta_rule(q, k, v, g=g, beta=beta, initial_state=state, scale=SCALE)


def reference(args: list[Tensor]) -> tuple[Tensor, Tensor]:
    return gated_delta_rule_reference(*args, scale=SCALE)


def with_gradients(rule: Callable[[list[Tensor]], tuple[Tensor, Tensor]], args: list[Tensor]) -> dict[str, Tensor]:
    """Outputs and all gradients, for fixed gradients of both outputs that every dtype can hold."""
    leaves = [x.clone().requires_grad_() for x in args]
    outputs = rule(leaves)
    gen = torch.Generator().manual_seed(99)
    seeds = [torch.randint(-16, 17, x.shape, generator=gen).to(x) / 8 for x in outputs]
    grads = torch.autograd.grad(outputs, leaves, seeds)
    named = {"o": outputs[0].detach(), "state": outputs[1].detach()}
    return named | {f"d_{name}": grad for name, grad in zip(NAMES, grads, strict=True)}
