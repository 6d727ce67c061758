"""The gated RMS norm operator: its rules, and the Triton kernels against float64. Its formula: test_gates."""

from __future__ import annotations

import pytest
import torch
from interpreter import interpreted, interpreter_or_skip
from support import assert_within_budget
from torch import Tensor

from tcal_compiler.kernels import self_check
from tcal_compiler.kernels.gated_rms_norm import gated_rms_norm, gated_rms_norm_reference

Size = tuple[int, int, int, int]  # S, N, H, D
DTYPES = list(self_check.ALLOWED)


def draw(size: Size, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
    """The gradient of the result (float32 at least), o, gate, weight."""
    stack, _, heads, dim = size
    gen = torch.Generator().manual_seed(0)
    sizes = [size] * 3 + [(stack, heads, dim)]
    seed, *inputs = (torch.randn(s, generator=gen, dtype=torch.float64).to(device, dtype) for s in sizes)
    return seed.to(torch.promote_types(dtype, torch.float32)), *inputs


def with_autograd(seed: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Result and gradients of the definition."""
    o, gate, weight = leaves = [x.detach().requires_grad_() for x in inputs]
    y = gated_rms_norm_reference(o, gate, weight[:, None])
    return y.detach(), *torch.autograd.grad(y, leaves, seed)


def check_kernels(size: Size, dtype: torch.dtype, device: str) -> None:
    from tcal_compiler.kernels.gated_rms_norm import triton_kernel

    seed, *inputs = draw(size, dtype, device)

    def run() -> tuple[Tensor, ...]:
        y = triton_kernel.gated_rms_norm_triton(*inputs, 1e-5)
        return y, *triton_kernel.gated_rms_norm_backward_triton(seed, *inputs, 1e-5)

    first, second = run(), run()
    exact = with_autograd(*(x.double() for x in (seed, *inputs)))
    naive = with_autograd(seed, *inputs)
    for name, x, again, y, z in zip(("y", "d_o", "d_gate", "d_weight"), first, second, exact, naive, strict=True):
        assert torch.equal(x, again), f"{name}: two runs differ"
        assert_within_budget(name, actual=x, exact=y, naive=z, factor=3)


@interpreted
@pytest.mark.parametrize("size", [(1, 1, 1, 8), (2, 300, 2, 24), (1, 5, 3, 200)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_in_the_interpreter(size, dtype):
    with interpreter_or_skip():
        check_kernels(size, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(1, 1, 1, 16), (22, 1000, 9, 64), (2, 4097, 16, 128), (1, 33, 3, 200)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_the_gpu(size, dtype):
    check_kernels(size, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    inputs = [x.requires_grad_() for x in draw((2, 5, 3, 8), dtype)[1:]]
    torch.library.opcheck(torch.ops.tcal.gated_rms_norm.default, (*inputs, 1e-5))


def test_layers_of_a_stack_are_one_call_and_keep_their_own_weights():
    seed, o, gate, weight = draw((3, 10, 2, 8), torch.float64)
    exact = with_autograd(seed, o, gate, weight)
    leaves = [x.clone().requires_grad_() for x in (o, gate, weight)]
    y = torch.vmap(gated_rms_norm)(*leaves)
    for a, b in zip((y, *torch.autograd.grad(y, leaves, seed)), exact, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_shapes_that_do_not_fit():
    _, o, gate, weight = draw((1, 5, 3, 8), torch.float32)
    with pytest.raises(ValueError, match=r"gated_rms_norm: want o \[S,N,H,D\].*got"):
        gated_rms_norm(o[0], gate[0], weight[0, :, :4])
