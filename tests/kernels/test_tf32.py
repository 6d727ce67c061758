"""Products of float32 kernels in TensorFloat32, where torch's own may be: rounded as cuBLAS rounds, not cut off."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from interpreter import interpreted, interpreter_or_skip
from rule_cases import SCALE, exactly, make_args, op, with_gradients
from support import assert_within_budget
from torch import Tensor
from torch.overrides import TorchFunctionMode

pytest.importorskip("triton")

import triton
from test_triton_rule import results
from triton import language as tl

from tcal_compiler.kernels import self_check
from tcal_compiler.kernels.gated_delta_rule import dispatch as rule
from tcal_compiler.kernels.gated_delta_rule import triton_backward, triton_forward, triton_walk
from tcal_compiler.kernels.gated_delta_rule.chunked import gated_delta_rule_chunked
from tcal_compiler.kernels.gated_delta_rule.chunked_backward import gated_delta_rule_chunked_backward
from tcal_compiler.kernels.tiles import nearest_tf32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEPT = -0x2000  # a mask of the bits that TensorFloat32 keeps


def rounded(x: Tensor) -> Tensor:
    return ((x.contiguous().view(torch.int32) + 0x1000) & KEPT).view(torch.float32)


class RoundedProducts(TorchFunctionMode):
    """Batched products of float32 on a CPU as cuBLAS takes them in TensorFloat32."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        first = {torch.bmm: 0, Tensor.matmul: 0, Tensor.__matmul__: 0, torch.baddbmm: 1, Tensor.baddbmm_: 1}.get(func)
        if first is not None:
            args = (*args[:first], *map(rounded, args[first:]))
        return func(*args, **(kwargs or {}))


@contextmanager
def tensor_cores() -> Iterator[set[str]]:
    """Triton's interpreter whose "tf32" products cut their factors off, as tensor cores do. Yields the precisions."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain, seen = InterpreterBuilder.create_dot, set()

    def cut(x: Any) -> Any:
        return TensorHandle((np.ascontiguousarray(x.data).view(np.int32) & KEPT).view(np.float32), x.dtype)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> Any:
        name = str(precision).split(".")[-1]
        seen.add(name)
        a, b = (cut(a), cut(b)) if name == "TF32" else (a, b)
        return plain(self, a, b, d, precision, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        yield seen


def plain_results(args: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of plain PyTorch, for the seeds of `with_gradients`."""
    outputs = gated_delta_rule_chunked(*args, scale=SCALE)
    gen = torch.Generator().manual_seed(99)
    seeds = [(torch.randint(-16, 17, x.shape, generator=gen) / 8).to(x) for x in outputs]
    return [x.cpu() for x in (*outputs, *gated_delta_rule_chunked_backward(*seeds, *args, scale=SCALE))]


def assert_as_good_as_plain(args: list[Tensor], actual: dict[str, Tensor], plain: list[Tensor]) -> None:
    exact = with_gradients(op, exactly(args))
    for (name, x), naive in zip(actual.items(), plain, strict=True):
        assert_within_budget(name, actual=x.cpu(), exact=exact[name], naive=naive, factor=2.0)


@triton.jit
def _round_all(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, nearest_tf32(tl.load(x + i)))


def test_rounds_to_nearest():
    step = 2.0**-10  # of TensorFloat32, between 1 and 2
    largest = torch.finfo(torch.float32).max
    pairs = [
        (1 + 0.49 * step, 1.0),
        (1 + 0.5 * step, 1 + step),  # a tie goes away from zero
        (-1 - 0.5 * step, -1 - step),
        (1 + 1.51 * step, 1 + 2 * step),
        (2 - 0.4 * step, 2.0),
        (0.0, 0.0),
        (2.0**-149, 0.0),
        (2.0**-136, 2.0**-136),
        (largest, math.inf),
        (math.inf, math.inf),
        (-math.inf, -math.inf),
        (math.nan, math.nan),
    ]
    x, expected = (torch.tensor(column, dtype=torch.float32) for column in zip(*pairs, strict=True))
    x = torch.cat([x, torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F000000], dtype=torch.int32).view(torch.float32)])
    y = torch.empty_like(x, device=DEVICE)
    _round_all[(1,)](x.to(DEVICE), y, N=len(x))
    torch.testing.assert_close(y.cpu()[: len(pairs)], expected, rtol=0, atol=0, equal_nan=True)
    assert y[-4:-1].isnan().all() and y[-1] == 2.0**127  # NaN of any bits, as a GPU makes them


@interpreted
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("segments", [1, 3])
def test_errors_are_those_of_plain_pytorch(segments, monkeypatch):
    """Without rounding they are three times as large. `join` alone takes three products for one."""
    args = make_args((1, 300 if segments > 1 else 100, 2, 1, 24, 40), torch.float32, decay=0.05)
    for module in (triton_forward, triton_backward):
        monkeypatch.setattr(module, "takes_tf32", lambda x: True)
    if segments > 1:
        cut = triton_walk.Cut(segments=segments, columns=16, stages=1)
        monkeypatch.setattr(triton_walk, "cut_for_states", lambda *_: cut)
        monkeypatch.setattr(triton_walk, "cut_to_read", triton_walk.cut_for_states)
    with interpreter_or_skip(), tensor_cores() as precisions:
        actual = results(args, device="cpu")
    assert precisions == ({"TF32"} if segments == 1 else {"TF32", "TF32x3"})
    with RoundedProducts():
        plain = plain_results(args)
    assert_as_good_as_plain(args, actual, plain)


SHAPES = [  # shape, decay
    ((2, 63, 4, 4, 16, 16), 0.05),
    ((3, 64, 6, 2, 64, 64), 0.05),
    ((2, 200, 4, 1, 128, 128), 0.05),
    ((1, 257, 2, 1, 256, 256), 0.05),
    ((70, 129, 9, 3, 64, 64), 0.05),
    ((70, 129, 9, 3, 64, 64), 6.0),
    ((1, 5000, 2, 1, 64, 64), 0.02),  # in segments
]


@contextmanager
def torch_takes_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "decay"), SHAPES, ids=str)
def test_errors_are_those_of_plain_pytorch_on_the_gpu(shape, decay):
    args = make_args(shape, torch.float32, decay=decay)
    usual = results(args, device="cuda")
    with torch_takes_tf32():
        actual = results(args, device="cuda")
        plain = plain_results([x.cuda() for x in args])
    assert not torch.equal(actual["o"], usual["o"])
    assert_as_good_as_plain(args, actual, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_is_proved_on_the_gpu(dim):
    with torch_takes_tf32(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for op_name, check in (
            ("gated_delta_rule", rule.self_check),
            ("packed gated_delta_rule", rule.packed_self_check),
        ):
            assert self_check.proved(op_name, check, 0, torch.float32, dim, dim, tf32=True)
