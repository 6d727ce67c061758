"""Triton kernels of the gates: a program takes BM rows of a layer, all heads; each tensor is read or written once.

a, b [S, N, H] contiguous, a_log, dt_bias [S, H] in float32; sums are float32, and every one has one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tcal_compiler.kernels.launch import Launch, cdiv, per_size
from tcal_compiler.kernels.tiles import load_rows, store_rows

COUNTS = ("N", "H")


@triton.jit
def _exp(x):
    """2^n exp(x - n log(2)). On a GPU tl.exp rounds x log2(e) first, which alone errs by |x| / 2 roundings.

    log(2) is 355 / 512, whose products with n are exact, and a rest.
    """
    n = tl.floor(x * 1.4426950408889634)
    rest = x - n * 0.693359375 + n * 2.1219444005469057e-4
    return tl.exp2(n) * tl.exp(tl.where(tl.abs(x) < 200.0, rest, 0.0))  # beyond it 2^n is 0 or inf


@triton.jit
def _softplus(z):
    """max(z, 0) + log(1 + e), e = exp(-|z|); log(1 + e) = 2 artanh(s) with s = e / (2 + e) <= 1/3.

    Seven terms of the series leave less than 2e-8 of it out. A small result keeps its digits, and nothing branches.
    """
    e = _exp(-tl.abs(z))
    s = e / (2.0 + e)
    x = s * s
    series = 1 + x * (1 / 3 + x * (1 / 5 + x * (1 / 7 + x * (1 / 9 + x * (1 / 11 + x * (1 / 13))))))
    return tl.maximum(z, 0.0) + 2.0 * s * series


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + _exp(-x))


@triton.jit
def _given(a, b, a_log, dt_bias, N, H, BM: tl.constexpr, BH: tl.constexpr):
    """Offset of the program's layer in [S, N, H], its first row, z = a + dt_bias, b [BM, BH], exp(a_log) [1, BH]."""
    blocks = tl.cdiv(N, BM)
    pid = tl.program_id(0).to(tl.int64)
    layer, r0 = pid // blocks, pid % blocks * BM
    at, h = layer * N * H, tl.arange(0, BH)
    bias = tl.load(dt_bias + layer * H + h, mask=h < H, other=0.0)
    rate = _exp(tl.load(a_log + layer * H + h, mask=h < H, other=0.0))
    z = load_rows(a + at, r0, H, N, 0, H, BM, BH).to(tl.float32) + bias[None, :]
    return at, r0, z, load_rows(b + at, r0, H, N, 0, H, BM, BH).to(tl.float32), rate[None, :]


@triton.jit(do_not_specialize=COUNTS)
def _forward(a, b, a_log, dt_bias, g, beta, N, H, BM: tl.constexpr, BH: tl.constexpr):
    at, r0, z, y, rate = _given(a, b, a_log, dt_bias, N, H, BM, BH)
    store_rows(g + at, -rate * _softplus(z), r0, H, N, 0, H, BM, BH)
    store_rows(beta + at, _sigmoid(y), r0, H, N, 0, H, BM, BH)


@triton.jit(do_not_specialize=COUNTS)
def _backward(
    d_g, d_beta, a, b, a_log, dt_bias, d_a, d_b, by_log, by_bias, N, H, BM: tl.constexpr, BH: tl.constexpr
):  # fmt: skip
    at, r0, z, y, rate = _given(a, b, a_log, dt_bias, N, H, BM, BH)
    scaled = -rate * load_rows(d_g + at, r0, H, N, 0, H, BM, BH).to(tl.float32)
    d_z, sigmoid = scaled * _sigmoid(z), _sigmoid(y)
    d_y = load_rows(d_beta + at, r0, H, N, 0, H, BM, BH).to(tl.float32) * sigmoid * (1.0 - sigmoid)
    store_rows(d_a + at, d_z, r0, H, N, 0, H, BM, BH)
    store_rows(d_b + at, d_y, r0, H, N, 0, H, BM, BH)
    h = tl.arange(0, BH)
    to = tl.program_id(0).to(tl.int64) * H + h
    tl.store(by_log + to, tl.sum(scaled * _softplus(z), 0), mask=h < H)
    tl.store(by_bias + to, tl.sum(d_z, 0), mask=h < H)


@per_size
def _launch(shape: torch.Size, *, back: bool) -> tuple[Launch, int]:
    """And the blocks of rows of a layer."""
    stack, rows, heads = shape
    block = max(16, triton.next_power_of_2(heads))
    at_once = max(4, 1024 // block)
    blocks = cdiv(rows, at_once)
    kernel = _backward if back else _forward
    return Launch(kernel, stack * blocks, rows, heads, BM=at_once, BH=block, num_warps=4), blocks


def delta_gates_triton(a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Contract of `delta_gates_reference` for a, b [S, N, H] and a_log, dt_bias [S, H], not float64."""
    a, b, *parameters = _as_taken(a, b, a_log, dt_bias)
    g, beta = (torch.empty(a.shape, dtype=torch.float32, device=a.device) for _ in range(2))
    launch, _ = _launch(a.shape, back=False)
    launch(a, b, *parameters, g, beta)
    return g, beta


def delta_gates_backward_triton(
    d_g: Tensor, d_beta: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contract of `delta_gates_backward`, not float64. Repeatable: the parameters' sums have one order."""
    given = _as_taken(a, b, a_log, dt_bias)
    d_a, d_b = (torch.empty_like(x) for x in given[:2])
    launch, blocks = _launch(a.shape, back=True)
    parts = (a.shape[0], blocks, a.shape[2])
    by_log, by_bias = (torch.empty(parts, dtype=torch.float32, device=a.device) for _ in range(2))
    launch(d_g.contiguous(), d_beta.contiguous(), *given, d_a, d_b, by_log, by_bias)
    return d_a, d_b, by_log.sum(1).to(a_log.dtype), by_bias.sum(1).to(dt_bias.dtype)


def _as_taken(a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return a.contiguous(), b.contiguous(), a_log.float().contiguous(), dt_bias.float().contiguous()
