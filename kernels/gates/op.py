"""Registration of tcal::l2_normalize: schema, fake, backward, vmap rule and path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tcal_compiler.kernels.registration import on_device, register, without_autocast
from tcal_compiler.kernels.self_check import Proof, errors_of, exactly, takes_triton
from tcal_compiler.kernels.shapes import Shapes

from .reference import L2_EPS, l2_normalize_backward, l2_normalize_reference

FORWARD, BACKWARD = "tcal::l2_normalize", "tcal::l2_normalize_backward"
SHAPES = Shapes("l2_normalize", "x [B,T,H,D]", positive=("D",))
MOST_ROWS = 1 << 30  # fewer than this go to Triton, which counts them in int32


def self_check(device: torch.device, dtype: torch.dtype, dim: int) -> dict[str, float]:
    """Errors of Triton's results against float64: 210 rows whose heads lie before their tokens."""
    from .triton_kernel import l2_normalize_backward_triton, l2_normalize_triton

    gen = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 35, dim, generator=gen).to(device, dtype).transpose(1, 2)
    d_y = torch.randn(2, 35, 3, dim, generator=gen).to(device)

    def run() -> tuple[Tensor, Tensor]:
        return l2_normalize_triton(x, L2_EPS), l2_normalize_backward_triton(d_y, x, L2_EPS)

    def exact() -> tuple[Tensor, Tensor]:
        seed, given = exactly((d_y, x))
        return l2_normalize_reference(given), l2_normalize_backward(seed, given, L2_EPS)

    return errors_of(device, Proof(("y", "d_x"), run, exact))


def _takes_triton(x: Tensor) -> bool:
    return x.numel() // x.shape[-1] < MOST_ROWS and takes_triton("l2_normalize", self_check, x, x.shape[-1])


def _forward(x: Tensor, eps: float) -> Tensor:
    SHAPES.check_numbers(x)
    with without_autocast(x.device):
        if _takes_triton(x):
            from .triton_kernel import l2_normalize_triton

            with on_device("l2_normalize", x):
                return l2_normalize_triton(x, eps)
        return l2_normalize_reference(x, eps).contiguous()


register(FORWARD, _forward)


@torch.library.register_fake(FORWARD)
def _(x: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))


def _backward(d_y: Tensor, x: Tensor, eps: float) -> Tensor:
    with without_autocast(x.device):
        if _takes_triton(x):
            from .triton_kernel import l2_normalize_backward_triton

            with on_device("l2_normalize", d_y, x):
                return l2_normalize_backward_triton(d_y, x, eps)
        return torch.empty_like(x).copy_(l2_normalize_backward(d_y, x, eps))


register(BACKWARD, _backward)


@torch.library.register_fake(BACKWARD)
def _(d_y: Tensor, x: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, ctx.eps = inputs
    ctx.save_for_backward(x)


def _grad(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.tcal.l2_normalize_backward(d_y, *ctx.saved_tensors, ctx.eps), None


torch.library.register_autograd(FORWARD, _grad, setup_context=_setup)


@torch.library.register_vmap(FORWARD)
def _(info: Any, in_dims: tuple[int | None, ...], x: Tensor, eps: float) -> tuple[Tensor, int]:
    stacked = x.movedim(in_dims[0] or 0, 0)  # layers of a stack become part of the batch
    return torch.ops.tcal.l2_normalize(stacked.flatten(0, 1), eps).unflatten(0, stacked.shape[:2]), 0


def l2_normalize(x: Tensor, eps: float = L2_EPS) -> Tensor:
    """`l2_normalize_reference`, differentiable, usable under vmap. On CUDA x [B, T, H, D] is one launch, contiguous.

    Elsewhere, of other dimensions, and under export and torch.compile its parts stay visible: exporters know them, and
    compilers fuse them.
    """
    if not x.is_cuda or x.dim() != 4 or torch.compiler.is_compiling():
        return l2_normalize_reference(x, eps)
    return torch.ops.tcal.l2_normalize(x, eps)
