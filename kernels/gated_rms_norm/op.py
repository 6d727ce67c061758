"""Registration of tcal::gated_rms_norm: schema, fake, backward, vmap rule and path.

The op takes a stack S of layers, so that under vmap all layers of an alignment step are one launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tcal_compiler.kernels.registration import on_device, register, without_autocast
from tcal_compiler.kernels.self_check import exactly, relative_errors, takes_triton
from tcal_compiler.kernels.shapes import Shapes

from .reference import gated_rms_norm_backward, gated_rms_norm_reference

FORWARD, BACKWARD = "tcal::gated_rms_norm", "tcal::gated_rms_norm_backward"
SHAPES = Shapes("gated_rms_norm", "o [S,N,H,D], gate [S,N,H,D], weight [S,H,D]", positive=("D",))


def self_check(device: torch.device, dtype: torch.dtype, dim: int) -> dict[str, float]:
    """Errors of Triton's results against float64: two layers of three heads, 70 rows."""
    from .triton_kernel import gated_rms_norm_backward_triton, gated_rms_norm_triton

    gen = torch.Generator().manual_seed(0)
    sizes = [(2, 70, 3, dim)] * 3 + [(2, 3, dim)]
    seed, o, gate, weight = (torch.randn(size, generator=gen).to(device, dtype) for size in sizes)
    y = gated_rms_norm_triton(o, gate, weight, 1e-5)
    actual = (y, *gated_rms_norm_backward_triton(seed, o, gate, weight, 1e-5))
    seed, o, gate, weight = exactly((seed, o, gate, weight))
    exact_y = gated_rms_norm_reference(o, gate, weight[:, None])
    exact = (exact_y, *gated_rms_norm_backward(seed, o, gate, weight, 1e-5))
    return relative_errors(("y", "d_o", "d_gate", "d_weight"), actual, exact)


def _takes_triton(o: Tensor) -> bool:
    return takes_triton("gated_rms_norm", self_check, o, o.shape[-1])


def _forward(o: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    SHAPES.check_numbers(o, gate, weight)
    with without_autocast(o.device):
        if _takes_triton(o):
            from .triton_kernel import gated_rms_norm_triton

            with on_device("gated_rms_norm", o, gate, weight):
                return gated_rms_norm_triton(o, gate, weight, eps)
        return gated_rms_norm_reference(o, gate, weight[:, None], eps).contiguous()


register(FORWARD, _forward)


@torch.library.register_fake(FORWARD)
def _(o: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    return o.new_empty(o.shape, dtype=torch.promote_types(o.dtype, torch.float32))


def _backward(d_y: Tensor, o: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast(o.device):
        if _takes_triton(o):
            from .triton_kernel import gated_rms_norm_backward_triton

            with on_device("gated_rms_norm", d_y, o, gate, weight):
                return gated_rms_norm_backward_triton(d_y, o, gate, weight, eps)
        d_o, d_gate, d_weight = gated_rms_norm_backward(d_y, o, gate, weight, eps)
    return d_o.contiguous(), d_gate.contiguous(), d_weight.contiguous()


register(BACKWARD, _backward)


@torch.library.register_fake(BACKWARD)
def _(d_y: Tensor, o: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Any:
    return tuple(x.new_empty(x.shape) for x in (o, gate, weight))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _grad(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch.ops.tcal.gated_rms_norm_backward(d_y, *ctx.saved_tensors, ctx.eps), None)


torch.library.register_autograd(FORWARD, _grad, setup_context=_setup)


@torch.library.register_vmap(FORWARD)
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    *tensors, eps = args
    size = info.batch_size
    stacked = [
        x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0) for dim, x in zip(in_dims, tensors, strict=False)
    ]
    y = torch.ops.tcal.gated_rms_norm(*(x.flatten(0, 1) for x in stacked), eps)
    return y.unflatten(0, (size, -1)), 0


def gated_rms_norm(o: Tensor, gate: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Norm of `gated_rms_norm_reference` for o, gate [..., H, D] and weight [H, D], differentiable, usable under vmap.

    Under export and torch.compile its parts stay visible instead: exporters know them, and compilers fuse them.
    Raises ValueError when the shapes do not fit.
    """
    if torch.compiler.is_compiling():
        return gated_rms_norm_reference(o, gate, weight, eps)
    rows = (x.reshape(1, -1, *x.shape[-2:]) for x in (o, gate))
    return torch.ops.tcal.gated_rms_norm(*rows, weight[None], eps).view(o.shape)
