"""Registration of tcal::delta_gates: schema, fake, backward, vmap rule and path.

The op takes a stack S of layers, so that under vmap all layers of an alignment step are one launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tcal_compiler.kernels.registration import on_device, register, without_autocast
from tcal_compiler.kernels.self_check import Proof, errors_of, exactly, takes_triton
from tcal_compiler.kernels.shapes import Shapes

from .reference import delta_gates_backward, delta_gates_reference

FORWARD, BACKWARD = "tcal::delta_gates", "tcal::delta_gates_backward"
SHAPES = Shapes("delta_gates", "a [S,N,H], b [S,N,H], a_log [S,H], dt_bias [S,H]", positive=("H",))
NAMES = ("g", "beta", "d_a", "d_b", "d_a_log", "d_dt_bias")


def forward_pytorch(a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Contract of `delta_gates_reference` for a stack."""
    return delta_gates_reference(a, b, a_log[:, None], dt_bias[:, None])


def self_check(device: torch.device, dtype: torch.dtype, heads: int) -> dict[str, float]:
    """Errors of Triton's results against float64: two layers of 300 rows, parameters in float32."""
    from .triton_kernel import delta_gates_backward_triton, delta_gates_triton

    gen = torch.Generator().manual_seed(0)
    sizes = [(2, 300, heads)] * 4 + [(2, heads)] * 2
    made = [torch.randn(size, generator=gen).to(device) for size in sizes]
    seeds, inputs = made[:2], [*(4 * x.to(dtype) for x in made[2:4]), *made[4:]]

    def run() -> tuple[Tensor, ...]:
        return *delta_gates_triton(*inputs), *delta_gates_backward_triton(*seeds, *inputs)

    def exact() -> tuple[Tensor, ...]:
        true = exactly(inputs)
        return *forward_pytorch(*true), *delta_gates_backward(*exactly(seeds), *true)

    return errors_of(device, Proof(NAMES, run, exact))


def _takes_triton(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and takes_triton("delta_gates", self_check, a, a.shape[-1])


def _forward(a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    SHAPES.check_numbers(a, b, a_log, dt_bias)
    with without_autocast(a.device):
        if _takes_triton(a, b):
            from .triton_kernel import delta_gates_triton

            with on_device("delta_gates", a, b, a_log, dt_bias):
                return delta_gates_triton(a, b, a_log, dt_bias)
        g, beta = forward_pytorch(a, b, a_log, dt_bias)
    return g.contiguous(), beta.contiguous()


register(FORWARD, _forward)


@torch.library.register_fake(FORWARD)
def _(a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(a.dtype, torch.float32)
    return a.new_empty(a.shape, dtype=dtype), a.new_empty(a.shape, dtype=dtype)


def _backward(
    d_g: Tensor, d_beta: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with without_autocast(a.device):
        if _takes_triton(a, b):
            from .triton_kernel import delta_gates_backward_triton

            with on_device("delta_gates", d_g, d_beta, a, b, a_log, dt_bias):
                return delta_gates_backward_triton(d_g, d_beta, a, b, a_log, dt_bias)
        d_a, d_b, d_log, d_bias = delta_gates_backward(d_g, d_beta, a, b, a_log, dt_bias)
    return d_a.contiguous(), d_b.contiguous(), d_log.contiguous(), d_bias.contiguous()


register(BACKWARD, _backward)


@torch.library.register_fake(BACKWARD)
def _(d_g: Tensor, d_beta: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor) -> Any:
    return tuple(x.new_empty(x.shape) for x in (a, b, a_log, dt_bias))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _grad(ctx: Any, d_g: Tensor, d_beta: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.ops.tcal.delta_gates_backward(d_g, d_beta, *ctx.saved_tensors))


torch.library.register_autograd(FORWARD, _grad, setup_context=_setup)


@torch.library.register_vmap(FORWARD)
def _(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    size = info.batch_size
    stacked = (
        x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0) for dim, x in zip(in_dims, tensors, strict=True)
    )
    g, beta = torch.ops.tcal.delta_gates(*(x.flatten(0, 1) for x in stacked))
    return (g.unflatten(0, (size, -1)), beta.unflatten(0, (size, -1))), (0, 0)


def delta_gates(a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """`delta_gates_reference` for a, b [..., H] and a_log, dt_bias [H], differentiable, usable under vmap.

    On CUDA it is one launch, and raises ValueError when the shapes do not fit.
    Elsewhere, and under export and torch.compile, its parts stay visible: exporters know them, and compilers fuse them.
    """
    if not a.is_cuda or torch.compiler.is_compiling():
        return delta_gates_reference(a, b, a_log, dt_bias)
    rows = (x.reshape(1, -1, x.shape[-1]) for x in (a, b))
    g, beta = torch.ops.tcal.delta_gates(*rows, a_log[None], dt_bias[None])
    return g.view(a.shape), beta.view(a.shape)
