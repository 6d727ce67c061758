"""The attention statistics against whole maps in float64: streamed in PyTorch, and the Triton kernel."""

from __future__ import annotations

import warnings

import pytest
import torch
from interpreter import interpreted, interpreter_or_skip
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tcal_compiler.kernels import self_check
from tcal_compiler.kernels.attention_stats import (
    OCTAVES,
    attention_output_sums,
    attention_output_sums_reference,
    attention_statistics,
    attention_statistics_reference,
    op,
)
from tcal_compiler.kernels.attention_stats.streaming import (
    attention_output_sums_streaming,
    attention_statistics_streaming,
)
from tcal_compiler.kernels.scores import Scores

Case = tuple[int, int, int, int, int, int, int | None]  # B, H, K, T, Dk, Dv, window
SHAPES: list[Case] = [
    (2, 4, 2, 33, 8, 12, None),
    (1, 2, 2, 1, 8, 8, None),
    (1, 3, 1, 70, 16, 8, 1),
    (1, 2, 1, 70, 16, 8, 27),
]
TINY: list[tuple[Case, torch.dtype, int, int]] = [  # with BM and BN: enough tiles for whole octaves
    ((1, 2, 1, 3, 8, 8, None), torch.float32, 16, 16),
    ((1, 2, 1, 100, 24, 40, None), torch.float32, 16, 16),
    ((2, 1, 1, 60, 16, 8, 37), torch.float16, 32, 16),
    ((1, 1, 1, 50, 8, 8, 1), torch.float32, 32, 16),
    ((1, 2, 2, 40, 16, 16, None), torch.bfloat16, 16, 16),
]
WIDER: list[Case] = [
    (2, 4, 2, 700, 64, 64, None),
    (1, 4, 1, 4097, 128, 128, None),
    (1, 2, 1, 2000, 64, 64, 300),
    (1, 2, 1, 1300, 256, 256, None),
    (1, 2, 2, 513, 96, 40, 513),
    (3, 9, 3, 65, 64, 64, 1),
    (1, 2, 1, 1, 16, 16, None),
]
GIVEN = {"scale": 0.4}


def draw(case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Tensor, ...]:
    """q, k, v, and o that has something of every context."""
    batch, heads, kv_heads, tokens, key_dim, value_dim, _ = case
    gen = torch.Generator().manual_seed(0)
    sizes = [(batch, heads, tokens, key_dim), (batch, kv_heads, tokens, key_dim), (batch, kv_heads, tokens, value_dim)]
    q, k, v = (torch.randn(size, generator=gen) for size in sizes)
    o = torch.randn(batch, tokens, heads, value_dim, generator=gen)
    o += v.repeat_interleave(heads // kv_heads, 1).transpose(1, 2)
    return tuple(x.to(device, dtype) for x in (q, k, v, o))


def scores_of(case: Case) -> Scores:
    return Scores(**GIVEN, window=case[-1] or 0)


def exactly(case: Case, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    q, k, v, o = (x.double() for x in inputs)
    given = GIVEN | {"window": case[-1]}
    return (*attention_statistics_reference(q, k, v, **given), *attention_output_sums_reference(q, k, v, o, **given))


def check(actual: tuple[Tensor, ...], exact: tuple[Tensor, ...], *, tol: float) -> None:
    for name, x, y in zip(op.NAMES, actual, exact, strict=True):
        assert x.shape == y.shape and (name == "context" or x.dtype == torch.float64)
        torch.testing.assert_close(
            x.double(), y, rtol=tol, atol=tol * y.abs().max().item(), msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("block", [5, 32])
def test_streaming_is_its_definition(case, block):
    inputs, given = draw(case), {"scores": scores_of(case), "block": block}
    stats = attention_statistics_streaming(*inputs[:3], **given)
    check((*stats, *attention_output_sums_streaming(*inputs, **given)), exactly(case, inputs), tol=1e-10)


def test_the_ops_on_the_cpu():
    for case in SHAPES:
        inputs, scores = draw(case, torch.float32), scores_of(case)
        actual = (*attention_statistics(*inputs[:3], scores=scores), *attention_output_sums(*inputs, scores=scores))
        check(actual, exactly(case, inputs), tol=1e-5)


def test_masses_of_a_row_that_looks_everywhere_alike():
    """q = 0: row t gives 1 / (t + 1) to each key."""
    tokens = 40
    zero = torch.zeros(1, 1, tokens, 4, dtype=torch.float64)
    context, distance, entropy, mass = attention_statistics(zero, zero, zero + 1, scores=Scores(1.0))
    rows = range(1, tokens + 1)
    assert mass[0, 0].item() == pytest.approx(sum(1 / n for n in rows))
    assert mass[0, 6].item() == pytest.approx(sum(max(n - 32, 0) / n for n in rows)) and mass[0, 7:].sum() == 0
    assert entropy.item() == pytest.approx(torch.arange(1, tokens + 1).double().log().sum().item())
    assert distance.item() == pytest.approx(sum((n * (n - 1) / 2 + 0.5) / n for n in rows))
    assert (context - 1).abs().max() < 1e-12 and mass.shape == (1, OCTAVES)


class Sizes(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().nbytes() == t.numel() * t.element_size():
                self.largest = max(self.largest, t.numel())
        return out


def test_no_full_map_is_ever_made():
    block, largest, heads = 16, {}, 4
    for length in (256, 512):
        q, k, v, _ = draw((1, heads, 2, length, 8, 8, None), torch.float32)
        with Sizes() as sizes:
            attention_statistics_streaming(q, k, v, scores=Scores(0.4), block=block)
        largest[length] = sizes.largest
        assert sizes.largest <= heads * block * length  # rows of one block; a map of one head has length^2
        assert sizes.largest < length * length
    assert largest[512] == 2 * largest[256]  # linear in the length


def test_opcheck():
    q, k, v, o = draw(SHAPES[0], torch.float32)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)  # as it comes from a projection
    torch.library.opcheck(torch.ops.tcal.attention_statistics.default, (q, k, v, 0.4, 0))
    torch.library.opcheck(torch.ops.tcal.attention_output_sums.default, (q, k, v, o, 0.4, 7))


def test_shapes_that_do_not_fit():
    q, k, v, o = draw(SHAPES[0])
    with pytest.raises(ValueError, match=r"attention_statistics: want q \[B,H,T,Dk\].*H a multiple of K; got"):
        attention_statistics(q[:, :3], k, v, scores=Scores(1.0))
    with pytest.raises(ValueError, match=r"o \[B,T,H,Dv\].*got"):
        attention_output_sums(q, k, v, o[:, 1:], scores=Scores(1.0))


def from_triton(case: Case, inputs: tuple[Tensor, ...], **setting: object) -> tuple[Tensor, ...]:
    from tcal_compiler.kernels.attention_stats import triton_kernel

    given = {"scores": scores_of(case)} | setting
    stats = triton_kernel.attention_statistics_triton(*inputs[:3], **given)
    return (*stats, *triton_kernel.attention_output_sums_triton(*inputs, **given))


@interpreted
@pytest.mark.parametrize(("case", "dtype", "rows", "keys"), TINY, ids=str)
def test_in_the_interpreter(case, dtype, rows, keys):
    from tcal_compiler.kernels.attention_stats.triton_kernel import Setting

    inputs = draw(case, dtype)
    q = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)
    with interpreter_or_skip():
        actual = from_triton(case, (q, *inputs[1:]), setting=Setting(rows, keys, 4, 1))
    check(actual, exactly(case, inputs), tol=1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("case", WIDER, ids=str)
@pytest.mark.parametrize("dtype", list(self_check.ALLOWED), ids=str)
def test_on_the_gpu(case, dtype):
    inputs = draw(case, dtype, "cuda")
    first, second = from_triton(case, inputs), from_triton(case, inputs)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True)), "two runs differ"
    check(first, exactly(case, inputs), tol={torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype])


@pytest.mark.gpu
def test_on_the_gpu_a_long_sequence_takes_memory_linear_in_it():
    inputs = draw((1, 2, 1, 32768, 64, 64, None), torch.bfloat16, "cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention_statistics(*inputs[:3], scores=Scores(**GIVEN))  # the proof's own memory comes first
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        context, distance, entropy, mass = attention_statistics(*inputs[:3], scores=Scores(**GIVEN))
    assert torch.cuda.max_memory_allocated() - before < 2 * context.numel() * context.element_size()
    q, k, v, _ = (x.float() for x in inputs)
    exact = attention_statistics_streaming(q, k, v, scores=Scores(**GIVEN))
    for x, y in zip((distance, entropy, mass), exact[1:], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3 * y.abs().max().item())
    assert (context.float() - exact[0]).norm() < 1e-2 * exact[0].norm()
