"""Triton kernels of the gated RMS norm: a program takes BM rows of one head. Each tensor is read or written once.

o, gate, y [S, N, H, D] contiguous, weight [S, H, D]; sums are float32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tcal_compiler.kernels.launch import Launch, cdiv, per_size
from tcal_compiler.kernels.tiles import load_rows, store_rows


@triton.jit
def _place(N, H, D, BM: tl.constexpr):
    """Offset of a program's head in [S, N, H, D], offset of its weights, its first row."""
    blocks = tl.cdiv(N, BM)
    pid = tl.program_id(0).to(tl.int64)
    row, r0 = pid // blocks, (pid % blocks).to(tl.int32) * BM
    return (row // H * N * H + row % H) * D, row * D, r0


@triton.jit
def _normed(o, gate, weight, at, head, r0, eps, N, H, D, BM: tl.constexpr, BD: tl.constexpr):
    x = load_rows(o + at, r0, H * D, N, 0, D, BM, BD).to(tl.float32)
    z = load_rows(gate + at, r0, H * D, N, 0, D, BM, BD).to(tl.float32)
    d = tl.arange(0, BD)
    w = tl.load(weight + head + d, mask=d < D, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps)
    return x * r[:, None], r, z, 1.0 / (1.0 + tl.exp(-z)), w


@triton.jit
def _forward(o, gate, weight, y, eps, N, H, D, BM: tl.constexpr, BD: tl.constexpr):
    at, head, r0 = _place(N, H, D, BM)
    n, _, z, sigmoid, w = _normed(o, gate, weight, at, head, r0, eps, N, H, D, BM, BD)
    store_rows(y + at, n * w[None, :] * z * sigmoid, r0, H * D, N, 0, D, BM, BD)


@triton.jit
def _backward(d_y, o, gate, weight, d_o, d_gate, parts, eps, N, H, D, BM: tl.constexpr, BD: tl.constexpr):
    at, head, r0 = _place(N, H, D, BM)
    n, r, z, sigmoid, w = _normed(o, gate, weight, at, head, r0, eps, N, H, D, BM, BD)
    g = load_rows(d_y + at, r0, H * D, N, 0, D, BM, BD).to(tl.float32)
    u = g * w[None, :] * z * sigmoid
    mean = tl.sum(u * n, 1) / D
    store_rows(d_o + at, r[:, None] * (u - n * mean[:, None]), r0, H * D, N, 0, D, BM, BD)
    slope = sigmoid * (1.0 + z * (1.0 - sigmoid))
    store_rows(d_gate + at, g * n * w[None, :] * slope, r0, H * D, N, 0, D, BM, BD)
    d = tl.arange(0, BD)
    tl.store(parts + tl.program_id(0).to(tl.int64) * D + d, tl.sum(g * n * z * sigmoid, 0), mask=d < D)


@per_size
def _launch(shape: torch.Size, eps: float, *, back: bool) -> tuple[Launch, tuple[int, int]]:
    """And its programs: heads, row blocks."""
    stack, rows, heads, dim = shape
    bd = max(16, triton.next_power_of_2(dim))
    bm = max(4, 4096 // bd)
    programs = (stack * heads, cdiv(rows, bm))
    kernel, blocks = _backward if back else _forward, dict(BM=bm, BD=bd, num_warps=4)
    return Launch(kernel, math.prod(programs), eps, rows, heads, dim, **blocks), programs


def gated_rms_norm_triton(o: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Contract of `gated_rms_norm_reference`, for o, gate [S, N, H, D] and weight [S, H, D], not float64."""
    o, gate, weight = o.contiguous(), gate.contiguous(), weight.contiguous()
    y = torch.empty(o.shape, dtype=torch.float32, device=o.device)
    launch, _ = _launch(o.shape, eps, back=False)
    launch(o, gate, weight, y)
    return y


def gated_rms_norm_backward_triton(
    d_y: Tensor, o: Tensor, gate: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Contract of `gated_rms_norm_backward`, not float64. Repeatable: the weight's sums have one order."""
    d_y, o, gate, weight = d_y.contiguous(), o.contiguous(), gate.contiguous(), weight.contiguous()
    launch, programs = _launch(o.shape, eps, back=True)
    d_o, d_gate = torch.empty_like(o), torch.empty_like(gate)
    parts = torch.empty(*programs, o.shape[3], dtype=torch.float32, device=o.device)
    launch(d_y, o, gate, weight, d_o, d_gate, parts)
    return d_o, d_gate, parts.sum(1).view(weight.shape).to(weight.dtype)
