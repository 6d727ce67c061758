"""Triton kernels of the L2 norm: a program takes BM rows, and each tensor is read or written once; sums are float32.

x may have any strides between its rows; a row's numbers lie together. Rows are counted in int32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tcal_compiler.kernels.launch import Launch, cdiv, per_size

COUNTS = ("R", "T", "H")


@triton.jit
def _rows(R, T, H, b_stride, t_stride, h_stride, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    """Rows [BM, 1] of [B, T, H], columns [1, BD], which of them there are, and where these rows begin."""
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    bt = r // H
    at = (bt // T).to(tl.int64) * b_stride + (bt % T).to(tl.int64) * t_stride + (r % H).to(tl.int64) * h_stride
    d = tl.arange(0, BD)[None, :]
    return r.to(tl.int64)[:, None], d, (r[:, None] < R) & (d < D), at[:, None]


@triton.jit
def _normalized(x, at, d, there, eps):
    wide = tl.load(x + at + d, mask=there, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(wide * wide, 1) + eps)
    return wide * factor[:, None], factor


@triton.jit(do_not_specialize=COUNTS)
def _forward(x, y, eps, R, T, H, xb, xt, xh, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    r, d, there, at = _rows(R, T, H, xb, xt, xh, D, BM, BD)
    normed, _ = _normalized(x, at, d, there, eps)
    tl.store(y + r * D + d, normed, mask=there)


@triton.jit(do_not_specialize=COUNTS)
def _backward(
    d_y, x, d_x, eps, R, T, H, xb, xt, xh, gb, gt, gh, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    r, d, there, at = _rows(R, T, H, xb, xt, xh, D, BM, BD)
    _, _, _, to = _rows(R, T, H, gb, gt, gh, D, BM, BD)
    normed, factor = _normalized(x, at, d, there, eps)
    grad = tl.load(d_y + r * D + d, mask=there, other=0.0).to(tl.float32)
    along = tl.sum(normed * grad, 1)
    found = factor[:, None] * (grad - normed * along[:, None])
    tl.store(d_x + to + d, found.to(d_x.dtype.element_ty), mask=there)


@per_size
def _launch(shape: torch.Size, strides: tuple[int, ...], eps: float, *, back: bool) -> Launch:
    batch, tokens, heads, dim = shape
    block = max(16, triton.next_power_of_2(dim))
    rows, at_once = batch * tokens * heads, max(4, 4096 // block)
    numbers = (eps, rows, tokens, heads, *strides)
    blocks = dict(D=dim, BM=at_once, BD=block, num_warps=4)
    return Launch(_backward if back else _forward, cdiv(rows, at_once), *numbers, **blocks)


def l2_normalize_triton(x: Tensor, eps: float) -> Tensor:
    """Contract of `l2_normalize_reference` for x [B, T, H, D], not float64; the result is contiguous."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    _launch(x.shape, x.stride()[:3], eps, back=False)(x, y)
    return y


def l2_normalize_backward_triton(d_y: Tensor, x: Tensor, eps: float) -> Tensor:
    """Contract of `l2_normalize_backward`, not float64; the result lies as `torch.empty_like(x)` does."""
    d_x = torch.empty_like(x)
    rows = x if x.stride(-1) == 1 else x.contiguous()
    found = d_x if d_x.stride(-1) == 1 else torch.empty_like(rows)
    _launch(x.shape, rows.stride()[:3] + found.stride()[:3], eps, back=True)(d_y.contiguous(), rows, found)
    return d_x if found is d_x else d_x.copy_(found)
