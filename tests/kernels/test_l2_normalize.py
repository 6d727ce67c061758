"""The L2 norm operator: its rules, and the Triton kernels against float64. Its formula: test_gates."""

from __future__ import annotations

import pytest
import torch
from interpreter import interpreted, interpreter_or_skip
from support import assert_within_budget
from torch import Tensor

from tcal_compiler.kernels import self_check
from tcal_compiler.kernels.gates import l2_normalize, l2_normalize_reference
from tcal_compiler.kernels.gates.reference import L2_EPS, l2_normalize_backward

op = torch.ops.tcal.l2_normalize
Size = tuple[int, int, int, int]  # B, T, H, D
LAYOUTS = {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "contiguous": torch.Tensor.contiguous,
    "channels apart": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "a part": lambda x: torch.cat([x, x, x], -1).unflatten(-1, (3, -1))[..., 1, :],
}


def draw(size: Size, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """The gradient of the result (float32 at least), and x, whose first row is zero."""
    gen = torch.Generator().manual_seed(0)
    seed, x = (torch.randn(size, generator=gen, dtype=torch.float64) for _ in range(2))
    x[0, 0, 0] = 0
    return seed.to(device, torch.promote_types(dtype, torch.float32)), x.to(device, dtype)


def with_autograd(seed: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Result and gradient of the definition."""
    leaf = x.detach().requires_grad_()
    y = l2_normalize_reference(leaf)
    return y.detach(), *torch.autograd.grad(y, leaf, seed)


def check_kernels(size: Size, dtype: torch.dtype, layout: str, device: str) -> None:
    from tcal_compiler.kernels.gates.triton_kernel import l2_normalize_backward_triton, l2_normalize_triton

    seed, x = draw(size, dtype, device)
    x = LAYOUTS[layout](x)
    y, d_x = l2_normalize_triton(x, L2_EPS), l2_normalize_backward_triton(seed, x, L2_EPS)
    assert y.is_contiguous() and d_x.stride() == torch.empty_like(x).stride()
    exact, naive = with_autograd(seed.double(), x.double()), with_autograd(seed, x)
    for name, actual, true, plain in zip(("y", "d_x"), (y, d_x), exact, naive, strict=True):
        assert actual.dtype == plain.dtype
        assert_within_budget(name, actual=actual, exact=true, naive=plain, factor=3)


@interpreted
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 70, 3, 24), (1, 5, 2, 200)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_the_interpreter(size, dtype, layout):
    with interpreter_or_skip():
        check_kernels(size, dtype, layout, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(1, 1, 1, 16), (176, 512, 9, 64), (2, 4097, 16, 128), (1, 33, 3, 200)], ids=str)
@pytest.mark.parametrize("dtype", list(self_check.ALLOWED), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_the_gpu(size, dtype, layout):
    check_kernels(size, dtype, layout, "cuda")


@pytest.mark.gpu
def test_op_on_the_gpu_under_vmap():
    """What an alignment step calls: a stack of layers whose heads lie before their tokens."""
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 9, 40, 64, generator=gen).cuda().requires_grad_()
    y = torch.vmap(lambda x: l2_normalize(x.transpose(1, 2)))(x)
    y.square().cumsum(-1).sum().backward()
    exact = x.detach().double().requires_grad_()
    expected = l2_normalize_reference(exact.transpose(2, 3))
    expected.square().cumsum(-1).sum().backward()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(dtype, layout):
    x = LAYOUTS[layout](draw((2, 5, 3, 8), dtype)[1])
    torch.library.opcheck(op.default, (x.requires_grad_(), L2_EPS))


def test_gradients():
    x = draw((2, 3, 2, 5), torch.float64)[1].transpose(1, 2)
    assert torch.autograd.gradcheck(lambda x: op(x, 0.1), (x.requires_grad_(),))
    seed, x = draw((2, 3, 2, 5), torch.float64)
    torch.testing.assert_close(l2_normalize_backward(seed, x, L2_EPS), with_autograd(seed, x)[1])


@pytest.mark.parametrize("dim", [0, 1, 4])
def test_layers_of_a_stack_are_one_call(dim):
    x = torch.stack([draw((2, 3, 2, 5), torch.float64)[1] + i for i in range(3)])
    y = torch.vmap(lambda x: op(x, L2_EPS), in_dims=dim)(x.movedim(0, dim))
    torch.testing.assert_close(y, l2_normalize_reference(x), rtol=0, atol=1e-15)


class OnCuda(Tensor):
    is_cuda = True


def test_takes_the_op_on_cuda_alone_and_never_under_export(monkeypatch):
    called = []
    monkeypatch.setattr(torch.ops.tcal, "l2_normalize", lambda x, eps: called.append(x.shape))
    x = torch.zeros(2, 3, 2, 5)
    here = x.as_subclass(OnCuda)
    for each in (x, here[0]):
        assert l2_normalize(each).shape == each.shape
    assert not called and l2_normalize(here) is None and called == [x.shape]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert l2_normalize(here) is not None


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"l2_normalize: want x \[B,T,H,D\].*got"):
        op(torch.zeros(2, 3), L2_EPS)
