"""tcal::gated_delta_rule on the CPU against the reference in float64, and its properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_cases import SCALE, exactly, make_args, op, reference, with_gradients
from support import assert_within_budget

from tcal_compiler.kernels.gated_delta_rule import chunked, gated_delta_rule
from tcal_compiler.kernels.gated_delta_rule.chunked import gated_delta_rule_chunked, unit_lower_inverse
from tcal_compiler.kernels.gated_delta_rule.chunked_backward import gated_delta_rule_chunked_backward

SHAPES = [  # B, T, H, K, Dk, Dv
    (1, 1, 1, 1, 4, 4),
    (2, 2, 2, 1, 8, 8),
    (3, 7, 4, 2, 5, 9),
    (2, 63, 6, 3, 16, 8),
    (1, 64, 4, 4, 24, 40),
    (2, 65, 4, 1, 32, 32),
    (1, 130, 4, 2, 64, 64),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.3, 6.0])
def test_float64_is_the_reference(shape, decay):
    args = make_args(shape, decay=decay)
    expected = with_gradients(reference, args)
    for name, actual in with_gradients(op, args).items():
        torch.testing.assert_close(actual, expected[name], rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("decay", [0.01, 0.3, 6.0])
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[5], SHAPES[6]], ids=str)
def test_errors_are_those_of_plain_pytorch(shape, decay, dtype):
    args = make_args(shape, dtype, decay=decay)
    exact, naive = with_gradients(reference, exactly(args)), with_gradients(reference, args)
    for name, actual in with_gradients(op, args).items():
        assert actual.dtype == naive[name].dtype
        # float32 results differ by the order of sums alone, which is worth more than a factor of two at some shapes
        factor = 3.0 if actual.dtype == torch.float32 else 2.0
        assert_within_budget(name, actual=actual, exact=exact[name], naive=naive[name], factor=factor)


def test_every_length():
    args = make_args((1, 130, 2, 1, 8, 8))
    expected, _ = reference(args)
    for tokens in range(1, 131):
        out, state = op([x[:, :tokens] for x in args[:5]] + args[5:])
        torch.testing.assert_close(out, expected[:, :tokens], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, reference(args)[1], rtol=1e-11, atol=1e-11)


def test_query_head_reads_the_key_head_of_its_group():
    """Key/value head j holds the value j everywhere; query heads 0, 1 must see 0 and heads 2, 3 must see 1."""
    k = torch.zeros(1, 5, 2, 4, dtype=torch.float64)
    k[..., 0] = 1
    q = k[:, :, :1].expand(1, 5, 4, 4)
    v = torch.arange(2.0, dtype=torch.float64).view(1, 1, 2, 1).expand(1, 5, 2, 3)
    gates = torch.zeros(1, 5, 4, dtype=torch.float64)
    out, _ = gated_delta_rule(q, k, v, g=gates, beta=gates + 1, scale=1.0)
    assert out[0, :, :, 0].tolist() == [[0.0, 0.0, 1.0, 1.0]] * 5


@settings(max_examples=20, deadline=None, derandomize=True)
@given(cut=st.integers(1, 139), decay=st.sampled_from([0.01, 1.0]))
def test_any_cut_with_carried_state_is_one_pass(cut, decay):
    args = make_args((2, 140, 4, 2, 16, 8), decay=decay)
    whole, last = op(args)
    first, state = op([x[:, :cut] for x in args[:5]] + args[5:])
    second, end = op([x[:, cut:] for x in args[:5]] + [state])
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(end, last, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("chunk", [1, 2, 8, 16, 32, 128])
def test_chunk_size_is_invisible(chunk):
    args = make_args((2, 75, 4, 2, 16, 8))
    seeds = [torch.randn_like(x) for x in op(args)]
    for actual, expected in (
        (gated_delta_rule_chunked(*args, scale=SCALE, chunk=chunk), gated_delta_rule_chunked(*args, scale=SCALE)),
        (
            gated_delta_rule_chunked_backward(*seeds, *args, scale=SCALE, chunk=chunk),
            gated_delta_rule_chunked_backward(*seeds, *args, scale=SCALE),
        ),
    ):
        for x, y in zip(actual, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


def test_slices_are_invisible(monkeypatch):
    args = make_args((3, 200, 6, 3, 8, 8))
    expected = with_gradients(op, args)
    for size in (1, 3, 12):
        monkeypatch.setitem(chunked.FORWARD_MATRICES, "cpu", size)
        monkeypatch.setitem(chunked.BACKWARD_BYTES, "cpu", size * 300_000)
        for name, actual in with_gradients(op, args).items():
            torch.testing.assert_close(actual, expected[name], rtol=1e-12, atol=1e-12)


def test_no_token_sees_a_later_one():
    args = make_args((1, 100, 2, 1, 8, 8))
    out, _ = op(args)
    for x in args[:5]:
        x[:, 70:] = 0.5 * x[:, 70:].flip(1)
    later, _ = op(args)
    assert torch.equal(out[:, :70], later[:, :70]) and not torch.allclose(out[:, 70:], later[:, 70:])


def test_beta_zero_only_decays():
    q, k, v, g, beta, state = make_args((2, 90, 2, 1, 8, 8), decay=0.1)
    out, last = gated_delta_rule(q, k, v, g=g, beta=torch.zeros_like(beta), initial_state=state, scale=1.0)
    kept = g.cumsum(1).exp()
    torch.testing.assert_close(last, state * kept[:, -1, :, None, None])
    torch.testing.assert_close(out, torch.einsum("bthk,bhkv->bthv", q * kept[..., None], state))


def test_orthonormal_keys_recall_every_value():
    keys = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0].view(1, 64, 1, 64)
    values = torch.randn(1, 64, 1, 16, dtype=torch.float64)
    gates = torch.zeros(1, 64, 1, dtype=torch.float64)
    _, state = gated_delta_rule(keys, keys, values, g=gates, beta=gates + 1, scale=1.0)
    torch.testing.assert_close(torch.einsum("btkd,bkdv->btkv", keys, state), values)


def test_identical_keys_stay_accurate():
    """k_t all equal: the strictly lower matrix is full of ones, and a series over the whole chunk would overflow."""
    args = make_args((1, 256, 1, 1, 16, 16), torch.float32, decay=0.0)
    args[1] = args[1][:, :1].expand_as(args[1])
    args[4] = torch.full_like(args[4], 0.999)
    exact, naive = reference(exactly(args)), reference(args)
    for name, x, y, z in zip(("o", "state"), op(args), exact, naive, strict=True):
        assert_within_budget(name, actual=x, exact=y, naive=z, factor=4)


@pytest.mark.parametrize("g", [-50.0, -1e4, float("-inf")])
def test_strong_decay_is_finite_and_right(g):
    args = make_args((1, 300, 2, 1, 16, 16), torch.float32, decay=0.2)
    args[3][:, 20::3] = g
    args[4].fill_(1.0)
    exact, naive = reference(exactly(args)), reference(args)
    for name, x, y, z in zip(("o", "state"), op(args), exact, naive, strict=True):
        assert_within_budget(name, actual=x, exact=y, naive=z, factor=3)
    assert all(x.isfinite().all() for x in with_gradients(op, args).values())


@pytest.mark.parametrize("size", [1, 2, 8, 16, 64])
def test_inverse(size):
    a = torch.randn(3, size, size, dtype=torch.float64).tril(-1) / 4
    eye = torch.eye(size, dtype=torch.float64).expand(3, size, size)
    torch.testing.assert_close(unit_lower_inverse(a + torch.ones_like(a).triu()) @ (eye + a), eye)


def test_views_and_repeatability():
    args = make_args((2, 70, 4, 2, 16, 8), torch.float32)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in args[:5]]
    views.append(args[5].transpose(2, 3).contiguous().transpose(2, 3))
    assert not any(x.is_contiguous() for x in views)
    first, second, third = (with_gradients(op, x) for x in (args, views, args))
    for name in first:
        assert torch.equal(first[name], second[name]) and torch.equal(first[name], third[name])


def test_autocast_changes_nothing():
    args = make_args((1, 70, 2, 1, 16, 16), torch.float32)
    plain = with_gradients(op, args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = with_gradients(op, args)
    assert all(torch.equal(x, under[name]) for name, x in plain.items())


def test_inputs_are_left_alone():
    for tokens in (1, 70):
        args = make_args((1, tokens, 2, 2, 8, 8))
        before = [x.clone() for x in args]
        with_gradients(op, args)
        assert all(torch.equal(x, y) for x, y in zip(args, before, strict=True))


@pytest.mark.parametrize("shape", [(1, 1, 2, 1, 3, 2), (1, 5, 2, 1, 3, 2), (2, 9, 4, 2, 2, 3)], ids=str)
def test_gradcheck(shape):
    args = [x.requires_grad_() for x in make_args(shape)]
    assert torch.autograd.gradcheck(lambda *a: op(list(a)), args, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    args = [x.requires_grad_() for x in make_args((2, 5, 4, 2, 8, 4), dtype)]
    torch.library.opcheck(torch.ops.tcal.gated_delta_rule.default, (*args, SCALE))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(backend):
    args = make_args((2, 9, 4, 2, 8, 4), torch.float32)
    expected = with_gradients(op, args)
    compiled = torch.compile(op, backend=backend, fullgraph=True)
    for name, actual in with_gradients(compiled, args).items():
        torch.testing.assert_close(actual, expected[name])


def test_vmap_is_the_loop():
    sites = [make_args((2, 70, 4, 2, 8, 8), torch.float32, seed=s) for s in range(3)]
    stacked = [torch.stack(x) for x in zip(*sites, strict=True)]
    together = with_gradients(lambda a: torch.vmap(lambda *x: op(list(x)))(*a), stacked)
    alone = [op(site) for site in sites]
    assert torch.equal(together["o"], torch.stack([o for o, _ in alone]))
    shared = torch.vmap(lambda q: op([q, *sites[0][1:]])[0])(stacked[0])  # only q is mapped
    assert torch.equal(shared[0], alone[0][0])
    leaves = [[x.clone().requires_grad_() for x in site] for site in sites]
    sum(op(site)[0].sum() for site in leaves).backward()  # type: ignore[union-attr]
    mapped = [x.clone().requires_grad_() for x in stacked]
    torch.vmap(lambda *x: op(list(x))[0])(*mapped).sum().backward()
    for i, x in enumerate(mapped):
        torch.testing.assert_close(x.grad, torch.stack([site[i].grad for site in leaves]))


def test_wrong_shapes_are_named():
    q, k, v, g, beta, _ = make_args((1, 4, 4, 2, 8, 8))
    with pytest.raises(ValueError, match=r"want q \[B,T,H,Dk\].*got"):
        gated_delta_rule(q, k[:, :, :1].expand(1, 4, 3, 8), v, g=g, beta=beta)
    with pytest.raises(ValueError, match="gated_delta_rule"):
        gated_delta_rule(q, k, v, g=g[:, :2], beta=beta)
