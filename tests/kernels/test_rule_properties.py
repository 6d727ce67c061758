"""Properties of tcal::gated_delta_rule over random shapes, dtypes, cuts and gates (Hypothesis)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_cases import SCALE, exactly, make_args, op, reference, with_gradients
from support import assert_within_budget
from torch import Tensor

from tcal_compiler.kernels.gated_delta_rule.chunked import gated_delta_rule_chunked

quick = settings(max_examples=15, deadline=None, derandomize=True)
TOKENS, KV_HEADS, GROUPS = st.integers(1, 150), st.integers(1, 3), st.integers(1, 3)
DIMS = st.sampled_from([1, 3, 7, 16, 17, 33, 48, 80, 96])


@st.composite
def shapes(draw: st.DrawFn, tokens: st.SearchStrategy[int] = TOKENS) -> tuple[int, ...]:
    """B, T, H, K, Dk, Dv: odd and even, grouped or not, one token or several chunks."""
    kv_heads = draw(KV_HEADS)
    return draw(st.integers(1, 3)), draw(tokens), kv_heads * draw(GROUPS), kv_heads, draw(DIMS), draw(DIMS)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def tokens_of(args: list[Tensor], part: slice) -> list[Tensor]:
    return [x[:, part] for x in args[:5]]


@quick
@given(shape=shapes(), dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_every_shape_and_dtype_errs_no_more_than_plain_pytorch(shape, dtype):
    args = make_args(shape, dtype)
    exact, naive = reference(exactly(args)), reference(args)
    for name, x, y, z in zip(("o", "state"), op(args), exact, naive, strict=True):
        assert_within_budget(name, actual=x, exact=y, naive=z, factor=4.0)


@quick
@given(shape=shapes(st.integers(2, 150)), data=st.data())
def test_no_token_sees_a_later_one(shape, data):
    args, cut = make_args(shape), data.draw(st.integers(1, shape[1] - 1))
    out, _ = op(args)
    leaves = [x.clone() for x in args]
    for x in leaves[:5]:
        x[:, cut:] = torch.randn_like(x[:, cut:]).abs().neg()
    assert torch.equal(op(leaves)[0][:, :cut], out[:, :cut])
    for x in leaves[:5]:
        x.requires_grad_()
    op(leaves)[0][:, :cut].sum().backward()
    assert all(x.grad is not None and not x.grad[:, cut:].any() for x in leaves[:5])


@quick
@given(shape=shapes(st.integers(3, 150)), data=st.data())
def test_any_two_cuts_with_carried_state_are_one_pass(shape, data):
    args = make_args(shape)
    first, second = sorted(data.draw(st.lists(st.integers(1, shape[1] - 1), min_size=2, max_size=2, unique=True)))
    whole, last = op(args)
    parts, state = [], args[5]
    for part in (slice(0, first), slice(first, second), slice(second, None)):
        out, state = op([*tokens_of(args, part), state])
        parts.append(out)
    close(torch.cat(parts, 1), whole)
    close(state, last)


@quick
@given(shape=shapes(), chunk=st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128]))
def test_chunk_size_is_invisible(shape, chunk):
    args = make_args(shape)
    for x, y in zip(gated_delta_rule_chunked(*args, scale=SCALE, chunk=chunk), reference(args), strict=True):
        close(x, y)


@quick
@given(shape=shapes(), left=st.integers(0, 70), right=st.integers(0, 70))
def test_padding_with_closed_gates_is_invisible(shape, left, right):
    """Tokens with g = 0 and beta = 0 on either side leave outputs and state as they are, whatever their q, k and v."""
    args = make_args(shape)
    pad = make_args((shape[0], left + right + 1, *shape[2:]), seed=1)
    pad[3].zero_()
    pad[4].zero_()
    padded = [torch.cat([p[:, :left], x, p[:, left : left + right]], 1) for x, p in zip(args[:5], pad[:5], strict=True)]
    (out, last), (expected, state) = op([*padded, args[5]]), op(args)
    close(out[:, left : left + shape[1]], expected)
    close(last, state)


@quick
@given(shape=shapes(), seed=st.integers(0, 99))
def test_the_order_of_rows_and_heads_is_invisible(shape, seed):
    args = make_args(shape)
    batch, _, heads, kv_heads, _, _ = shape
    gen = torch.Generator().manual_seed(seed)
    rows, groups = torch.randperm(batch, generator=gen), torch.randperm(kv_heads, generator=gen)
    queries = (groups[:, None] * (heads // kv_heads) + torch.arange(heads // kv_heads)).flatten()
    q, k, v, g, beta, state = (x[rows] for x in args)
    mixed = [
        q[:, :, queries],
        k[:, :, groups],
        v[:, :, groups],
        g[:, :, queries],
        beta[:, :, queries],
        state[:, queries],
    ]
    (out, last), (expected, final) = op(mixed), op(args)
    close(out, expected[rows][:, :, queries])
    close(last, final[rows][:, queries])


@quick
@given(
    shape=shapes(),
    g=st.sampled_from([0.0, -1e-8, -50.0, -1e4, float("-inf")]),
    beta=st.sampled_from([0.0, 1e-8, 1.0]),
    zero_keys=st.booleans(),
)
def test_extreme_gates_and_zero_keys_are_finite_and_right(shape, g, beta, zero_keys):
    args = make_args(shape, torch.float32)
    args[3][:, ::2], args[4][:, ::3] = g, beta
    if zero_keys:
        args[1][:, 1::2] = 0
    exact, naive = reference(exactly(args)), reference(args)
    for name, x, y, z in zip(("o", "state"), op(args), exact, naive, strict=True):
        if y.abs().max() > 1e-12:  # decayed to less, a sum of large log decays is not exact to the last bit
            assert_within_budget(name, actual=x, exact=y, naive=z, factor=8.0)
        assert (x - y).abs().max() < 1e-4
    assert all(x.isfinite().all() for x in with_gradients(op, args).values())


@quick
@given(shape=shapes(), which=st.sets(st.integers(0, 5), min_size=1), step=st.booleans())
def test_views_are_invisible_and_runs_repeat(shape, which, step):
    args = make_args(shape, torch.float32)
    views = list(args)
    for i in which:
        x = args[i]
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
        wide[..., ::2] = x
        views[i] = wide[..., ::2] if step else x.movedim(1, -1).contiguous().movedim(-1, 1)
    first, again, viewed = with_gradients(op, args), with_gradients(op, args), with_gradients(op, views)
    for name in first:
        assert torch.equal(first[name], again[name]) and torch.equal(first[name], viewed[name]), name


@pytest.mark.parametrize("key_dim, value_dim", [(16, 256), (100, 192), (128, 128), (200, 96), (250, 250), (256, 16)])
def test_head_dims_up_to_256(key_dim, value_dim):
    """Outputs and gradients, in two pieces with carried state and in one, at dims of two and of others."""
    args = make_args((1, 70, 2, 1, key_dim, value_dim), torch.float32)
    exact, naive = with_gradients(reference, exactly(args)), with_gradients(reference, args)
    for name, x in with_gradients(op, args).items():
        assert_within_budget(name, actual=x, exact=exact[name], naive=naive[name], factor=4.0)
    first, state = op([*tokens_of(args, slice(0, 33)), args[5]])
    second, last = op([*tokens_of(args, slice(33, None)), state])
    for name, x in (("o", torch.cat([first, second], 1)), ("state", last)):
        assert_within_budget(name, actual=x, exact=exact[name], naive=naive[name], factor=4.0)


@pytest.mark.parametrize("tokens", [1024, 8192, pytest.param(16384, marks=pytest.mark.slow)])
@pytest.mark.parametrize("g, beta", [(0.0, 1.0), (-1e-3, 0.9)])
def test_long_sequences_stay_accurate(tokens, g, beta):
    args = make_args((1, tokens, 1, 1, 16, 16), torch.float32)
    args[3].fill_(g)
    args[4].fill_(beta)
    exact, naive = op(exactly(args)), reference(args)
    for name, x, y, z in zip(("o", "state"), op(args), exact, naive, strict=True):
        assert_within_budget(name, actual=x, exact=y, naive=z, factor=4.0)


def test_gates_at_their_limits_over_a_long_sequence_in_bfloat16():
    args = make_args((1, 4096, 2, 1, 16, 16), torch.bfloat16)
    args[3] = -20 * torch.rand(args[3].shape, generator=torch.Generator().manual_seed(3))
    args[4] = 1 - 1e-3 * torch.rand(args[4].shape, generator=torch.Generator().manual_seed(4))
    naive, (exact, actual) = with_gradients(reference, args), (with_gradients(op, a) for a in (exactly(args), args))
    for name, x in actual.items():
        assert_within_budget(name, actual=x, exact=exact[name], naive=naive[name], factor=2.0)
