"""Registration of tcal::gated_delta_rule: schema, fake, backward and vmap rule.

The backward is an op of its own, opaque like the forward: recomputing inline in the autograd formula breaks
AOTAutograd's view tracking.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tcal_compiler.kernels.registration import register, without_autocast
from tcal_compiler.kernels.shapes import Shapes

from . import dispatch
from .packed import NOT_WHOLE, read_bounds

FORWARD, BACKWARD = "tcal::gated_delta_rule", "tcal::gated_delta_rule_backward"
_TOKENS = "q [B,T,H,Dk], k [B,T,K,Dk], v [B,T,K,Dv], g [B,T,H], beta [B,T,H]"
SHAPES, PACKED = (
    Shapes("gated_delta_rule", f"{_TOKENS}, {rest}", positive=("T",), groups=("H", "K"))
    for rest in ("initial_state [B,H,Dk,Dv]", "initial_state [N,H,Dk,Dv], cu_seqlens [N+1]")
)


def _check(*tensors: Tensor | None) -> tuple[int, ...] | None:
    """The bounds of packed sequences, None where they are not. Raises ValueError."""
    *others, cu_seqlens = tensors
    if cu_seqlens is None:
        SHAPES.check_numbers(*others)
        return None
    sizes = PACKED.check_numbers(*tensors)
    return read_bounds(cu_seqlens, sizes["B"], sizes["T"], sizes["N"])


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    bounds = _check(q, k, v, g, beta, initial_state, cu_seqlens)
    with without_autocast(q.device):
        out, state = dispatch.forward(q, k, v, g, beta, initial_state, scale=scale, bounds=bounds)
    return out.contiguous(), state.contiguous()


register(FORWARD, _forward)


@torch.library.register_fake(FORWARD)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> Any:
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
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    bounds = None if cu_seqlens is None else _check(q, k, v, g, beta, initial_state, cu_seqlens)
    with without_autocast(q.device):
        grads = dispatch.backward(d_out, d_state, q, k, v, g, beta, initial_state, scale=scale, bounds=bounds)
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
    cu_seqlens: Tensor | None = None,
) -> Any:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, g, beta, initial_state))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.scale, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, cu_seqlens)


def _grad(ctx: Any, d_out: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, cu_seqlens = ctx.saved_tensors
    grads = torch.ops.tcal.gated_delta_rule_backward(d_out, d_state, *tensors, ctx.scale, cu_seqlens)
    return (*grads, None, None)


torch.library.register_autograd(FORWARD, _grad, setup_context=_setup)


def _fold(size: int, dim: int | None, x: Tensor) -> Tensor:
    """The mapped dimension (layers of a stack, say) becomes part of the batch."""
    x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


@torch.library.register_vmap(FORWARD)
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    size, (*tensors, scale) = info.batch_size, args[:7]
    cu_seqlens = args[7] if len(args) > 7 else None
    folded = [_fold(size, d, x) for d, x in zip(in_dims, tensors, strict=False)]
    if cu_seqlens is None:
        out, state = torch.ops.tcal.gated_delta_rule(*folded, scale)
        return (out.unflatten(0, (size, -1)), state.unflatten(0, (size, -1))), (0, 0)
    # packed: the mapped dimension becomes part of the tokens, and its sequences follow one another
    tokens = folded[0].shape[1]
    own = _fold(size, in_dims[7], cu_seqlens).view(size, -1)
    whole = (own[:, :1] == 0) & (own[:, -1:] == tokens)
    ends = own[:, 1:] + tokens * torch.arange(size, device=own.device, dtype=own.dtype)[:, None]
    ends = torch.where(whole, ends, NOT_WHOLE)
    joined = torch.cat([ends.new_zeros(1), ends.flatten()])
    row = [x.flatten(0, 1).unsqueeze(0) for x in folded[:5]]
    out, state = torch.ops.tcal.gated_delta_rule(*row, folded[5], scale, joined)
    return (out.view(size, 1, tokens, *out.shape[2:]), state.unflatten(0, (size, -1))), (0, 0)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated delta rule of `gated_delta_rule_reference`, differentiable, usable under export, compile and vmap.

    initial_state defaults to zeros (float32, or float64 if q is float64); scale to Dk ** -0.5.

    cu_seqlens [N + 1], int32 or int64, rising from 0 to T: B is 1, and N sequences lie one after another in the T
    tokens, sequence i from cu_seqlens[i] to before cu_seqlens[i + 1], each with a state of its own: initial and final
    state are [N, H, Dk, Dv]. One of no tokens keeps its state. The numbers are read on the host: on the GPU every
    forward and backward waits for them, on the CPU none does.

    Raises ValueError when shapes, or the dtype or device of initial_state and cu_seqlens, do not fit, or cu_seqlens
    falls or does not reach from 0 to T.
    """
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            raise ValueError(f"want cu_seqlens [N + 1], got {tuple(cu_seqlens.shape)}")
        if cu_seqlens.device.type not in ("cpu", q.device.type):
            raise ValueError(f"want cu_seqlens on the CPU or with q on {q.device}, got {cu_seqlens.device}")
    if initial_state is not None and not initial_state.is_floating_point():
        raise ValueError(f"want initial_state of floating-point numbers, got {initial_state.dtype}")
    if initial_state is None:
        dtype = torch.promote_types(q.dtype, torch.float32)
        rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        initial_state = q.new_zeros(rows, q.shape[2], q.shape[3], v.shape[3], dtype=dtype)
    return torch.ops.tcal.gated_delta_rule(
        q, k, v, g, beta, initial_state, q.shape[-1] ** -0.5 if scale is None else float(scale), cu_seqlens
    )
