"""Sizes at which a 32-bit index or a grid dimension would overflow: 524,352 tokens, 67,200 states, 2^31 numbers.

The comparisons run on the CPU at small sizes too, where a wrong slice or factor in them would show.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rule_cases import NAMES, SCALE, op
from support import assert_within_budget
from torch import Tensor

from tcal_compiler.kernels.gated_delta_rule.chunked import gated_delta_rule_chunked
from tcal_compiler.kernels.gated_delta_rule.chunked_backward import gated_delta_rule_chunked_backward
from tcal_compiler.kernels.gated_delta_step import gated_delta_step

LONG = 524_352  # with 32 heads of 128, more than 2^31 numbers
Rule = Callable[[list[Tensor]], tuple[Tensor, Tensor]]


def random_args(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
    """Like `rule_cases.make_args`, but made on the device, and with a slow decay."""
    batch, tokens, heads, kv_heads, key_dim, value_dim = shape
    gen = torch.Generator(device).manual_seed(seed)

    def randn(*size: int, as_dtype: torch.dtype) -> Tensor:
        return torch.randn(*size, generator=gen, device=device, dtype=as_dtype)

    size = key_dim**-0.5  # unit norm, nearly
    q = randn(batch, tokens, heads, key_dim, as_dtype=dtype).mul_(size)
    k = randn(batch, tokens, kv_heads, key_dim, as_dtype=dtype).mul_(size)
    v = randn(batch, tokens, kv_heads, value_dim, as_dtype=dtype)
    g = randn(batch, tokens, heads, as_dtype=torch.float32).abs_().mul_(-0.02)
    beta = randn(batch, tokens, heads, as_dtype=torch.float32).sigmoid_().mul_(0.5)
    return [q, k, v, g, beta, randn(batch, heads, key_dim, value_dim, as_dtype=torch.float32)]


def chunks(args: list[Tensor]) -> tuple[Tensor, Tensor]:
    """PyTorch's chunks on the tensors' own device; test_rule_properties holds them against the recurrence."""
    return gated_delta_rule_chunked(*args, scale=SCALE)


def compare(names: list[str], actual: list[Tensor], exact: list[Tensor], plain: list[Tensor]) -> None:
    """Errors against float64 are those of plain float32, up to 4; half precision is rounded float64, up to 2.5."""
    for name, x, y, z in zip(names, actual, exact, plain, strict=True):
        half = x.dtype in (torch.bfloat16, torch.float16)
        naive, factor = (y.to(x.dtype), 2.5) if half else (z, 4.0)
        assert_within_budget(name, actual=x, exact=y, naive=naive, factor=factor)


def check_part(what: str, args: list[Tensor], out: Tensor, state: Tensor) -> None:
    """Results for args, the last tokens on their own too. The state is float32 whatever the rest is."""
    (exact, last), (plain, plain_last) = (chunks([x.to(d) for x in args]) for d in (torch.float64, torch.float32))
    names = [f"{n} of {what}" for n in ("o", "the end of o", "state")]
    tail = slice(-64, None)
    if out.dtype != torch.float32:  # of inputs in half precision the state is no better than they are
        state = state.to(out.dtype)
    compare(names, [out, out[:, tail], state], [exact, exact[:, tail], last], [plain, plain[:, tail], plain_last])


def check_heads(rule: Rule, shape: tuple[int, ...], dtype: torch.dtype, device: str, heads: list[int]) -> None:
    """All tokens of some heads: those at the end of every token's row have the highest addresses."""
    args = random_args(shape, dtype, device)
    out, state = rule(args)
    group = shape[2] // shape[3]
    for h in heads:
        kv = h // group
        q, g, beta = (args[i][:, :, h : h + 1] for i in (0, 3, 4))
        k, v = (args[i][:, :, kv : kv + 1] for i in (1, 2))
        part = [q, k, v, g, beta, args[5][:, h : h + 1]]
        check_part(f"head {h}", part, out[:, :, h : h + 1], state[:, h : h + 1])


def check_rows(rule: Rule, shape: tuple[int, ...], dtype: torch.dtype, device: str, rows: list[int]) -> None:
    """Some sequences of many."""
    args = random_args(shape, dtype, device)
    out, state = rule(args)
    for b in rows:
        check_part(f"row {b}", [x[b : b + 1] for x in args], out[b : b + 1], state[b : b + 1])


def step(args: list[Tensor]) -> tuple[Tensor, Tensor]:
    q, k, v, g, beta, state = args
    return gated_delta_step(q, k, v, g=g, beta=beta, state=state, scale=SCALE)


def triton_rule(args: list[Tensor]) -> tuple[Tensor, Tensor]:
    from tcal_compiler.kernels.gated_delta_rule.triton_forward import gated_delta_rule_triton

    return gated_delta_rule_triton(*args, scale=SCALE)


def test_the_comparisons_in_small():
    check_heads(op, (1, 200, 4, 2, 16, 24), torch.float32, "cpu", [0, 3])
    check_rows(op, (5, 40, 4, 2, 16, 16), torch.float32, "cpu", [0, 4])
    check_rows(step, (5, 1, 4, 2, 16, 16), torch.float32, "cpu", [0, 4])

    def wrong(args: list[Tensor]) -> tuple[Tensor, Tensor]:
        out, state = op(args)
        out[:, -1] *= 1.01
        return out, state

    with pytest.raises(AssertionError, match="o of head 0"):
        check_heads(wrong, (1, 2000, 4, 2, 16, 16), torch.float32, "cpu", [0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_half_a_million_tokens(dtype):
    check_heads(triton_rule, (1, LONG, 2, 1, 64, 64), dtype, "cuda", [0, 1])


@pytest.mark.gpu
def test_half_a_million_tokens_in_two_pieces():
    args = random_args((1, LONG, 2, 1, 64, 64), torch.float32, "cuda")
    whole, last = triton_rule(args)
    half = LONG // 2 - 1
    first, state = triton_rule([*(x[:, :half] for x in args[:5]), args[5]])
    second, end = triton_rule([*(x[:, half:] for x in args[:5]), state])
    check_part("two pieces", args, torch.cat([first, second], 1), end)
    check_part("one piece", args, whole, last)


@pytest.mark.gpu
def test_gradients_of_half_a_million_tokens():
    from tcal_compiler.kernels.gated_delta_rule.triton_backward import gated_delta_rule_triton_backward

    args = random_args((1, LONG, 2, 1, 64, 64), torch.float32, "cuda")
    seeds = [torch.randn_like(x) for x in triton_rule(args)]
    grads = gated_delta_rule_triton_backward(*seeds, *args, scale=SCALE)
    exact, plain = (
        gated_delta_rule_chunked_backward(*(x.to(d) for x in (*seeds, *args)), scale=SCALE)
        for d in (torch.float64, torch.float32)
    )
    compare([f"d_{n}" for n in NAMES], list(grads), list(exact), list(plain))


@pytest.mark.gpu
def test_more_than_2_to_the_31_numbers_in_a_sequence():
    check_heads(triton_rule, (1, LONG, 32, 32, 128, 128), torch.bfloat16, "cuda", [0, 31])


@pytest.mark.gpu
def test_more_sequences_than_a_small_grid_dimension_has_places():
    check_rows(triton_rule, (2100, 70, 32, 8, 16, 16), torch.float32, "cuda", [0, 1050, 2047, 2048, 2099])


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 40])
def test_states_beyond_2_to_the_31_numbers(tokens):
    """4200 x 32 x 128 x 128 = 2.2e9 numbers, one step and a few chunks; 10,000 sequences decode a step."""
    rule = step if tokens == 1 else triton_rule
    check_rows(rule, (4200, tokens, 32, 8, 128, 128), torch.bfloat16, "cuda", [0, 2100, 4095, 4096, 4199])
    if tokens == 1:
        check_rows(step, (10_000, 1, 32, 8, 64, 64), torch.bfloat16, "cuda", [0, 5000, 9999])
