"""What every chunk of the gated delta rule gives by itself, all chunks at once, on Triton.

The names are those of `chunked`: T = (I + B)^-1 * L, U = T (beta v), W = T (beta e^c k), P = scale (q k^T * L).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tcal_compiler.kernels.launch import launch
from tcal_compiler.kernels.tiles import dot, load_columns, load_gate, load_rows, store_gate, store_rows

from .triton_layout import COUNTS, Layout, chunk_at
from .triton_tiles import CHUNK, Setting, decay_sums, exp32, pair_decay


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    return dot(a, b, tl.float32, PRECISION)


@triton.jit
def _quarters(x, B: tl.constexpr):
    """The diagonal blocks of [2 B, 2 B] and the one below the diagonal, [B, B] each."""
    x = tl.permute(tl.reshape(x, (2, B, 2, B)), (1, 3, 0, 2))
    left, right = tl.split(x)
    first, corner = tl.split(left)
    _, second = tl.split(right)
    return first, corner, second


@triton.jit
def _whole(first, corner, second, B: tl.constexpr):
    """[2 B, 2 B] of its lower blocks."""
    x = tl.join(tl.join(first, corner), tl.join(tl.zeros_like(first), second))
    return tl.reshape(tl.permute(x, (2, 0, 3, 1)), (2 * B, 2 * B))


@triton.jit
def _inverse16(low, PRECISION: tl.constexpr):
    """(I + low)^-1 of strictly lower [16, 16]: from blocks of b to those of 2 b, X - X L X, L what lies between."""
    r = tl.arange(0, 16)
    row, column = r[:, None], r[None, :]
    x = tl.where(row == column, 1.0, 0.0) - tl.where(row // 2 == column // 2, low, 0.0)
    for level in tl.static_range(1, 4):
        between = ((row >> level + 1) == (column >> level + 1)) & ((row >> level) != (column >> level))
        x -= _product(_product(x, tl.where(between, low, 0.0), PRECISION), x, PRECISION)
    return x


@triton.jit
def _inverse32(low, PRECISION: tl.constexpr):
    a, corner, b = _quarters(low, 16)
    a, b = _inverse16(a, PRECISION), _inverse16(b, PRECISION)
    return _whole(a, -_product(b, _product(corner, a, PRECISION), PRECISION), b, 16)


@triton.jit
def _inverse(low, PRECISION: tl.constexpr):
    """(I + low)^-1 of strictly lower [64, 64]: [A 0; C B]^-1 = [A' 0; -B' C A' B'] with A' = A^-1, B' = B^-1."""
    a, corner, b = _quarters(low, 32)
    a, b = _inverse32(a, PRECISION), _inverse32(b, PRECISION)
    return _whole(a, -_product(b, _product(corner, a, PRECISION), PRECISION), b, 32)


@triton.jit(do_not_specialize=COUNTS)
def _solve(
    q, k, v, g, beta, inverse, scores, w, u, into, fade, keep, chunks, scale, T, N, H, K, DK, DV,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
    GATE: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, INVERSE: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    h, t0, end = chunk_at(pid, chunks, T, N, H, C, PACKED)
    i = tl.arange(0, C)
    kp = k + h // (H // K) * DK
    rate = load_gate(beta + h, t0, H, end, C)
    c, last = decay_sums(g + h, t0, H, end, C, GATE)
    store_gate(into + pid * C, exp32(c), 0, 1, C, C)
    store_gate(fade + pid * C, exp32(last - c), 0, 1, C, C)
    tl.store(keep + pid, exp32(last))
    if SCORES:
        pairs = tl.zeros((C, C), tl.float32)
        for k0 in range(0, DK, BK):
            keys_t = load_columns(kp, t0, K * DK, end, k0, DK, C, BK)
            queries = load_rows(q + h * DK, t0, H * DK, end, k0, DK, C, BK)
            pairs += dot(queries, keys_t, DOT, PRECISION)
        store_rows(scores + pid * C * C, pairs * pair_decay(c, C) * scale, 0, C, C, 0, C, C, C)
    low = tl.zeros((C, C), tl.float32)
    for k0 in range(0, DK, BK):
        keys_t = load_columns(kp, t0, K * DK, end, k0, DK, C, BK)
        low += dot(load_rows(kp, t0, K * DK, end, k0, DK, C, BK), keys_t, DOT, PRECISION)
    low = tl.where(i[:, None] > i[None, :], low * rate[:, None], 0.0)
    x = _inverse(low, PRECISION) * pair_decay(c, C)
    if INVERSE:
        store_rows(inverse + pid * C * C, x, 0, C, C, 0, C, C, C)
    vp = v + h // (H // K) * DV
    for v0 in range(0, DV, BV):
        values = load_rows(vp, t0, K * DV, end, v0, DV, C, BV).to(tl.float32) * rate[:, None]
        store_rows(u + pid * C * DV, dot(x, values, tl.float32, PRECISION), 0, DV, C, v0, DV, C, BV)
    weight = rate * exp32(c)
    for k0 in range(0, DK, BV):
        some = load_rows(kp, t0, K * DK, end, k0, DK, C, BV).to(tl.float32) * weight[:, None]
        store_rows(w + pid * C * DK, dot(x, some, tl.float32, PRECISION), 0, DK, C, k0, DK, C, BV)


@dataclass(frozen=True)
class Solved:
    """What every chunk of C tokens gives by itself; rows and N as in `triton_layout`, c the running sum of g."""

    inverse: Tensor  # T [rows, N, C, C], or empty
    scores: Tensor  # P = scale (q k^T * L) [rows, N, C, C], or empty
    w: Tensor  # T (beta e^c k) [rows, N, C, Dk]
    u: Tensor  # T (beta v) [rows, N, C, Dv]
    into: Tensor  # e^c [rows, N, C]
    fade: Tensor  # e^(c_C - c) [rows, N, C]
    keep: Tensor  # e^c_C [rows, N]


def solve_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    layout: Layout,
    s: Setting,
    *,
    scale: float = 1.0,
    inverse: bool,
) -> Solved:
    """Tensors as `as_kernels_take` returns them. The inverse is for a backward, else the scores for a forward."""
    key_dim, value_dim = k.shape[3], v.shape[3]

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(layout.rows, layout.chunks, *size, dtype=dtype, device=k.device)

    solved = Solved(
        inverse=empty(CHUNK, CHUNK) if inverse else empty(0),
        scores=empty(0) if inverse else empty(CHUNK, CHUNK, dtype=s.kept),
        w=empty(CHUNK, key_dim, dtype=s.kept),
        u=empty(CHUNK, value_dim, dtype=s.kept),
        into=empty(CHUNK),
        fade=empty(CHUNK),
        keep=empty(),
    )
    sizes = (layout.tokens, layout.chunks, layout.heads, *k.shape[2:], value_dim)
    launch(
        _solve, layout.rows * layout.chunks, q, k, v, g, beta, *vars(solved).values(), layout.given(q), scale, *sizes,
        C=CHUNK, BK=s.solve_keys, BV=min(32, s.value_block), DOT=s.dot, GATE=s.gate, PRECISION=s.precision,
        PACKED=layout.packed, INVERSE=inverse, SCORES=not inverse, num_warps=s.solve_warps,
    )  # fmt: skip
    return solved
