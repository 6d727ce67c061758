"""Registration of tcal::gated_delta_rule: schema, fake, backward and vmap rule.

The backward is an op of its own, opaque like the forward: recomputing inline in the autograd formula breaks
AOTAutograd's view tracking.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tcal_compiler.kernels.registration import register
from tcal_compiler.kernels.shapes import Shapes

from . import dispatch

FORWARD, BACKWARD = "tcal::gated_delta_rule", "tcal::gated_delta_rule_backward"
SHAPES = Shapes(
    "gated_delta_rule",
    "q [B,T,H,Dk], k [B,T,K,Dk], v [B,T,K,Dv], g [B,T,H], beta [B,T,H], initial_state [B,H,Dk,Dv]",
    positive=("T",),
    groups=("H", "K"),
)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    SHAPES.check(q, k, v, g, beta, initial_state)
    with torch.autocast(q.device.type, enabled=False):
        out, state = dispatch.forward(q, k, v, g, beta, initial_state, scale=scale)
    return out.contiguous(), state.contiguous()


register(FORWARD, _forward)


@torch.library.register_fake(FORWARD)
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor, scale: float) -> Any:
    # new_empty, not empty_like: the kernel's results are contiguous whatever the strides of v
    return v.new_empty(*q.shape[:3], v.shape[3]), initial_state.new_empty(initial_state.shape)


def _backward(
    d_out: Tensor,
    d_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        grads = dispatch.backward(d_out, d_state, q, k, v, g, beta, initial_state, scale=scale)
    dq, dk, dv, dg, dbeta, dstate = grads
    return dq, dk, dv, dg, dbeta, dstate


register(BACKWARD, _backward)


@torch.library.register_fake(BACKWARD)
def _(
    d_out: Tensor,
    d_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    scale: float,
) -> Any:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, g, beta, initial_state))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _grad(ctx: Any, d_out: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch.ops.tcal.gated_delta_rule_backward(d_out, d_state, *ctx.saved_tensors, ctx.scale), None)


torch.library.register_autograd(FORWARD, _grad, setup_context=_setup)


def _fold(size: int, dim: int | None, x: Tensor) -> Tensor:
    """The mapped dimension (layers of a stack, say) becomes part of the batch."""
    x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


@torch.library.register_vmap(FORWARD)
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    *tensors, scale = args
    folded = (_fold(info.batch_size, d, x) for d, x in zip(in_dims, tensors, strict=False))
    out, state = torch.ops.tcal.gated_delta_rule(*folded, scale)
    return (out.unflatten(0, (info.batch_size, -1)), state.unflatten(0, (info.batch_size, -1))), (0, 0)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated delta rule of `gated_delta_rule_reference`, differentiable, usable under export, compile and vmap.

    initial_state defaults to zeros (float32, or float64 if q is float64); scale to Dk ** -0.5. Raises ValueError
    when the shapes do not fit.
    """
    if initial_state is None:
        dtype = torch.promote_types(q.dtype, torch.float32)
        initial_state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=dtype)
    return torch.ops.tcal.gated_delta_rule(
        q, k, v, g, beta, initial_state, q.shape[-1] ** -0.5 if scale is None else float(scale)
    )
