"""Attention over the last tokens in blocks against a masked softmax in float64."""

from __future__ import annotations

import pytest
import torch

from tcal_compiler.kernels.local_attention import as_exported, local_attention, local_attention_reference

SIZES = [  # tokens, window, whether the first token is seen too, query and key heads
    (1, 4, False, 2, 1),
    (1, 4, True, 2, 1),
    (5, 1, False, 3, 3),
    (5, 1, True, 3, 3),
    (5, 4, True, 4, 2),
    (37, 8, False, 6, 3),
    (37, 8, True, 6, 3),
    (16, 16, True, 2, 2),
    (9, 64, True, 2, 1),
    (65, 64, False, 3, 1),
    (65, 64, True, 3, 1),
]


def inputs(tokens: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(tokens)
    sizes = ((heads, 8), (kv_heads, 8), (kv_heads, 6))
    return [torch.randn(2, h, tokens, d, generator=gen, dtype=torch.float64).to(dtype) for h, d in sizes]


def masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int, first: bool = False
) -> torch.Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = scale * q @ k.mT
    t = torch.arange(q.shape[2])
    for query in t:
        scores[:, :, query, (t > query) | ((t <= query - window) & (t >= first))] = -torch.inf
    return scores.softmax(-1) @ v


@pytest.mark.parametrize(("tokens", "window", "first", "heads", "kv_heads"), SIZES)
def test_it_is_softmax_over_the_last_tokens_and_the_first(
    tokens: int, window: int, first: bool, heads: int, kv_heads: int
):
    q, k, v = inputs(tokens, heads, kv_heads)
    exact, given = masked(q, k, v, 0.7, window, first), {"scale": 0.7, "window": window, "first": first}
    torch.testing.assert_close(local_attention(q, k, v, **given), exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(local_attention_reference(q, k, v, **given), exact, rtol=1e-12, atol=1e-12)
    low = local_attention(*inputs(tokens, heads, kv_heads, torch.bfloat16), **given)
    assert low.dtype == torch.bfloat16 and bool(((low - exact).abs() < 0.1).all())


def test_a_window_far_longer_than_the_text_costs_no_more():
    q, k, v = inputs(9, 4, 2)
    found = local_attention(q, k, v, scale=0.5, window=1 << 20)
    torch.testing.assert_close(found, masked(q, k, v, 0.5, 9), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", ["bfloat16", "float16", "float32 under autocast"])
def test_it_errs_no_more_than_its_result_is_rounded(case: str):
    """Scores of some ten nats: rounded to bfloat16 they would be off by more than the result is, forward and back."""
    dtype = torch.float16 if case == "float16" else torch.bfloat16
    q, k, v = inputs(128, 4, 2)
    q, k = (x.to(torch.float32 if "autocast" in case else dtype) for x in (4 * q, k))
    weights = inputs(128, 4, 2)[0][..., :6].to(dtype)

    def values(*given: torch.Tensor) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in given]
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in case):
            out = local_attention(*leaves, scale=0.35, window=16)
        return [out, *torch.autograd.grad((out * weights).sum(), leaves)]

    low = values(q, k, v.to(dtype))
    for found, exact in zip(low, values(q.double(), k.double(), v.to(dtype).double()), strict=True):
        error, rounding = ((x.double() - exact).square().mean().sqrt() for x in (found, exact.to(dtype)))
        assert error <= 1.2 * rounding


def test_gradients():
    q, k, v = (x.requires_grad_() for x in inputs(7, 4, 2))
    assert torch.autograd.gradcheck(lambda *x: local_attention(*x, scale=0.5, window=3, first=True), (q, k, v))


def test_layers_of_a_stack_are_one_call():
    stacked = [torch.stack([x, 2 * x]) for x in inputs(11, 4, 2)]
    found = torch.vmap(lambda *x: local_attention(*x, scale=0.5, window=4))(*stacked)
    for i in range(2):
        torch.testing.assert_close(found[i], local_attention(*(x[i] for x in stacked), scale=0.5, window=4))


def test_as_exported_is_the_reference_to_the_bit():
    q, k, v = inputs(37, 4, 2, torch.float32)
    blocks, whole = (
        local_attention(q, k, v, scale=0.5, window=8),
        local_attention_reference(q, k, v, scale=0.5, window=8),
    )
    with as_exported():
        assert torch.equal(local_attention(q, k, v, scale=0.5, window=8), whole)
    assert torch.equal(local_attention(q, k, v, scale=0.5, window=8), blocks)
