"""The gates' operator: its rules, and the Triton kernels against float64. Its formula: test_gates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from interpreter import interpreted, interpreter_or_skip
from support import assert_within_budget
from torch import Tensor

from tcal_compiler.kernels import self_check
from tcal_compiler.kernels.delta_gates import delta_gates
from tcal_compiler.kernels.delta_gates.op import NAMES, forward_pytorch
from tcal_compiler.kernels.delta_gates.reference import delta_gates_backward
from tcal_compiler.kernels.gates import decay_gate

op = torch.ops.tcal.delta_gates
Size = tuple[int, int, int]  # S, N, H
SPREAD = {"usual": 1.0, "small rates": -8.0, "large": 300.0}


def draw(
    size: Size, dtype: torch.dtype, spread: str = "usual", device: str = "cpu"
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of both results (float32 at least); a, b, a_log, dt_bias, the parameters as the results."""
    gen = torch.Generator().manual_seed(0)
    stack, _, heads = size
    sizes = [size] * 4 + [(stack, heads)] * 2
    d_g, d_beta, a, b, a_log, dt_bias = (torch.randn(s, generator=gen, dtype=torch.float64) for s in sizes)
    if spread == "small rates":
        dt_bias += SPREAD[spread]
    else:
        a, b = SPREAD[spread] * a, SPREAD[spread] * b
    wide = torch.promote_types(dtype, torch.float32)
    made = [x.to(device, wide) for x in (d_g, d_beta, a_log, dt_bias)]
    return made[:2], [a.to(device, dtype), b.to(device, dtype), *made[2:]]


def with_autograd(seeds: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Results and gradients of the definition."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = forward_pytorch(*leaves)
    return (*(x.detach() for x in results), *torch.autograd.grad(results, leaves, seeds))


def exactly(seeds: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return with_autograd([x.double() for x in seeds], [x.double() for x in inputs])


def check_kernels(size: Size, dtype: torch.dtype, spread: str, device: str) -> None:
    from tcal_compiler.kernels.delta_gates.triton_kernel import delta_gates_backward_triton, delta_gates_triton

    seeds, inputs = draw(size, dtype, spread, device)
    first, second = ((*delta_gates_triton(*inputs), *delta_gates_backward_triton(*seeds, *inputs)) for _ in range(2))
    exact, naive = exactly(seeds, inputs), with_autograd(seeds, inputs)
    for name, x, again, true, plain in zip(NAMES, first, second, exact, naive, strict=True):
        assert torch.equal(x, again), f"{name}: two runs differ"
        assert x.dtype == plain.dtype and x.is_contiguous()
        assert_within_budget(name, actual=x, exact=true, naive=plain, factor=3)


@interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 300, 9), (3, 70, 40), (1, 5, 200)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("spread", SPREAD)
def test_in_the_interpreter(size, dtype, spread):
    with interpreter_or_skip():
        check_kernels(size, dtype, spread, "cpu")


def on_a_card(x: np.ndarray) -> np.ndarray:
    """exp as Triton compiles it for NVIDIA, 2^(x log2(e)): the exponent is rounded to x's type first."""
    return np.exp2((x * x.dtype.type(np.log2(np.e))).astype(np.float64)).astype(x.dtype)


@interpreted
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 300, 9)], ids=str)
def test_small_rates_as_a_card_computes_exponentials(size, monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, "create_exp", lambda self, x: self.unary_op(x, on_a_card))
    with interpreter_or_skip():
        check_kernels(size, torch.float32, "small rates", "cpu")


def check_ends(device: str) -> None:
    """What exponentials overflow for, and NaN, stay as in plain PyTorch."""
    from tcal_compiler.kernels.delta_gates.triton_kernel import delta_gates_triton

    x = torch.tensor([-math.inf, -3e38, -200.0, -104.0, 88.7, 199.0, 3e38, math.inf, math.nan], device=device)
    zero = torch.zeros_like(x)
    for a, a_log in ((x, zero), (zero - 10.0, x)):
        given = (a[None, None], x[None, None], a_log[None], zero[None])
        for found, plain in zip(delta_gates_triton(*given), forward_pytorch(*given), strict=True):
            torch.testing.assert_close(found, plain, equal_nan=True)


@interpreted
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_ends_in_the_interpreter():
    with interpreter_or_skip():
        check_ends("cpu")


@pytest.mark.gpu
def test_ends_on_the_gpu():
    check_ends("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(1, 1, 1), (22, 4096, 9), (2, 16384, 16), (3, 70, 40), (1, 5, 200)], ids=str)
@pytest.mark.parametrize("dtype", list(self_check.ALLOWED), ids=str)
@pytest.mark.parametrize("spread", SPREAD)
def test_on_the_gpu(size, dtype, spread):
    check_kernels(size, dtype, spread, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_op_on_the_gpu_under_vmap(dtype):
    """What an alignment step calls, a stack of layers; autocast leaves the numbers alone."""
    seeds, inputs = draw((3, 80, 9), dtype, device="cuda")
    leaves = [x.unflatten(1, (2, 40)) if x.dim() == 3 else x for x in inputs]
    leaves = [x.detach().requires_grad_() for x in leaves]
    with torch.autocast("cuda", torch.bfloat16):
        results = torch.vmap(delta_gates)(*leaves)
    grads = torch.autograd.grad(results, leaves, [x.unflatten(1, (2, 40)) for x in seeds])
    exact, naive = exactly(seeds, inputs), with_autograd(seeds, inputs)
    for name, x, true, plain in zip(NAMES, (*results, *grads), exact, naive, strict=True):
        assert_within_budget(name, actual=x.detach().view_as(true), exact=true, naive=plain, factor=3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    inputs = draw((2, 5, 3), dtype)[1]
    torch.library.opcheck(op.default, tuple(x.requires_grad_() for x in inputs))
    apart = [x.mT.contiguous().mT for x in draw((2, 5, 3), dtype)[1]]
    torch.library.opcheck(op.default, tuple(x.requires_grad_() for x in apart))


@pytest.mark.parametrize("spread", ["usual", "small rates"])
def test_gradients(spread):
    seeds, inputs = draw((2, 3, 4), torch.float64, spread)
    assert torch.autograd.gradcheck(op, [x.requires_grad_() for x in inputs])
    found = delta_gates_backward(*seeds, *inputs)
    for name, x, y in zip(NAMES[2:], found, with_autograd(seeds, inputs)[2:], strict=True):
        torch.testing.assert_close(x, y, msg=name)


def test_layers_of_a_stack_are_one_call_and_keep_their_own_parameters():
    seeds, inputs = draw((3, 10, 4), torch.float64)
    leaves = [x.clone().requires_grad_() for x in (inputs[0].movedim(0, 1), *inputs[1:])]

    def one(*layer: Tensor) -> tuple[Tensor, Tensor]:
        return op(*(x[None] for x in layer))

    results = [x.squeeze(1) for x in torch.vmap(one, in_dims=(1, 0, 0, 0))(*leaves)]
    grads = list(torch.autograd.grad(results, leaves, seeds))
    grads[0] = grads[0].movedim(1, 0)
    for x, y in zip((*results, *grads), with_autograd(seeds, inputs), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
    shared = torch.vmap(op, in_dims=(0, 0, None, None))(*(x.expand(2, *x.shape) for x in inputs[:2]), *inputs[2:])
    torch.testing.assert_close(shared[0][1], forward_pytorch(*inputs)[0])


class OnCuda(Tensor):
    is_cuda = True


def test_takes_the_op_on_cuda_alone_and_never_under_export(monkeypatch):
    """Elsewhere the numbers are those of the parts, bit by bit."""
    called: list[torch.Size] = []

    def spy(a: Tensor, b: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        called.append(a.shape)
        return a, b

    monkeypatch.setattr(torch.ops.tcal, "delta_gates", spy)
    a, b, a_log, dt_bias = (x[0] for x in draw((1, 6, 5), torch.bfloat16)[1])
    g, beta = delta_gates(a, b, a_log, dt_bias)
    assert torch.equal(g, decay_gate(a, a_log, dt_bias)) and torch.equal(beta, b.float().sigmoid()) and not called
    here = a.unflatten(0, (2, 3)).as_subclass(OnCuda)
    delta_gates(here, b.view_as(here), a_log, dt_bias)
    assert called == [(1, 6, 5)]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    delta_gates(here, b.view_as(here), a_log, dt_bias)
    assert len(called) == 1


def test_shapes_that_do_not_fit():
    a, b, a_log, dt_bias = draw((1, 5, 3), torch.float32)[1]
    with pytest.raises(ValueError, match=r"delta_gates: want a \[S,N,H\].*got"):
        op(a, b, a_log, dt_bias[:, :2])
