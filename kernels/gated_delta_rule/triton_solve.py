"""What every chunk of the gated delta rule gives by itself, all chunks at once, on Triton.

The names are those of `chunked`: T = (I + B)^-1 * L, P = scale (q k^T * L).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tcal_compiler.kernels.launch import launch
from tcal_compiler.kernels.tiles import dot, load_gate, load_rows, store_gate, store_rows

from .triton_layout import COUNTS, Layout, chunk_at
from .triton_tiles import CHUNK, Setting, decay_sums, exp32, pair_decay


@triton.jit
def _diagonal(x, B: tl.constexpr):
    """The blocks [64 / B, B, B] on the diagonal of [64, 64]."""
    N: tl.constexpr = 64 // B
    i = tl.arange(0, N)
    same = (i[:, None] == i[None, :])[:, None, :, None]
    return tl.sum(tl.where(same, tl.reshape(x, (N, B, N, B)), 0.0), 2)


@triton.jit
def _paired(x, B: tl.constexpr):
    """[2 N, B, B] as [N, 2 B, 2 B], two blocks on the diagonal of each."""
    N: tl.constexpr = 32 // B
    i = tl.arange(0, 2)
    same = (i[:, None] == i[None, :])[None, :, None, :, None]
    return tl.reshape(tl.where(same, tl.reshape(x, (N, 2, B, 1, B)), 0.0), (N, 2 * B, 2 * B))


@triton.jit
def _doubled(x, low, B: tl.constexpr, PRECISION: tl.constexpr):
    """(I + low)^-1 on blocks of 2 B of x, its inverse on blocks of B: X - X L X, L what of low lies between."""
    i = tl.arange(0, x.shape[-1])
    row, column = i[:, None], i[None, :]
    between = (row // (2 * B) == column // (2 * B)) & (row // B > column // B)
    some = tl.where(between, low, 0.0)
    return x - dot(dot(x, some, tl.float32, PRECISION), x, tl.float32, PRECISION)


@triton.jit
def _inverse(low, PRECISION: tl.constexpr):
    """(I + low)^-1 of strictly lower [64, 64]: from blocks of 2 on, which double."""
    blocks = _diagonal(low, 16)
    i = tl.arange(0, 16)
    row, column = i[:, None], i[None, :]
    x = tl.where(row == column, 1.0, 0.0) - tl.where(row // 2 == column // 2, blocks, 0.0)
    for level in tl.static_range(1, 4):
        x = _doubled(x, blocks, 2**level, PRECISION)
    x = _doubled(_paired(x, 16), _diagonal(low, 32), 16, PRECISION)
    return _doubled(tl.reshape(_paired(x, 32), (64, 64)), low, 32, PRECISION)


@triton.jit(do_not_specialize=COUNTS)
def _solve(
    q, k, g, beta, inverse, scores, into, fade, keep, reach, chunks, scale, T, N, H, K, DK,
    C: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    h, t0, end = chunk_at(pid, chunks, T, N, H, C, PACKED)
    i = tl.arange(0, C)
    kp = k + h // (H // K) * DK
    rate = load_gate(beta + h, t0, H, end, C)
    c, last = decay_sums(g + h, t0, H, end, C, GATE)
    decay = pair_decay(c, C)
    low = tl.zeros((C, C), tl.float32)
    pairs = tl.zeros((C, C), tl.float32)
    for k0 in range(0, DK, BK):
        keys = load_rows(kp, t0, K * DK, end, k0, DK, C, BK)
        low += dot(keys, tl.trans(keys), DOT, PRECISION)
        if SCORES:
            queries = load_rows(q + h * DK, t0, H * DK, end, k0, DK, C, BK)
            pairs += dot(queries, tl.trans(keys), DOT, PRECISION)
    if SCORES:
        store_rows(scores + pid * C * C, pairs * decay * scale, 0, C, C, 0, C, C, C)
    store_gate(into + pid * C, exp32(c), 0, 1, C, C)
    store_gate(fade + pid * C, exp32(last - c), 0, 1, C, C)
    tl.store(keep + pid, exp32(last))
    row, column = i[:, None], i[None, :]
    low *= rate[:, None]
    kept = 1.0 - tl.sum(tl.where(row == column, low, 0.0), 1)  # of what each token's key reads
    tl.store(reach + pid, last.to(tl.float32) + tl.sum(tl.log(tl.maximum(tl.abs(kept), 1.0)), 0))
    x = _inverse(tl.where(row > column, low, 0.0), PRECISION)
    store_rows(inverse + pid * C * C, x * decay, 0, C, C, 0, C, C, C)


@dataclass(frozen=True)
class Solved:
    """What every chunk of C tokens gives by itself; rows and N as in `triton_layout`, c the running sum of g."""

    inverse: Tensor  # T [rows, N, C, C]
    scores: Tensor  # P = scale (q k^T * L) [rows, N, C, C], or empty
    into: Tensor  # e^c [rows, N, C]
    fade: Tensor  # e^(c_C - c) [rows, N, C]
    keep: Tensor  # e^c_C [rows, N]
    reach: (
        Tensor  # [rows, N]: no state's norm is more behind a chunk than e^reach of that before, by what it started from
    )


def solve_chunks(
    q: Tensor, k: Tensor, g: Tensor, beta: Tensor, layout: Layout, s: Setting, *, scale: float = 1.0, scores: bool
) -> Solved:
    """Tensors as `as_kernels_take` returns them; scores: whether P is wanted."""

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(layout.rows, layout.chunks, *size, dtype=dtype, device=k.device)

    solved = Solved(
        inverse=empty(CHUNK, CHUNK, dtype=s.kept),
        scores=empty(CHUNK, CHUNK, dtype=s.kept) if scores else empty(0),
        into=empty(CHUNK),
        fade=empty(CHUNK),
        keep=empty(),
        reach=empty(),
    )
    sizes = (layout.tokens, layout.chunks, layout.heads, *k.shape[2:])
    launch(
        _solve, layout.rows * layout.chunks, q, k, g, beta, *vars(solved).values(), layout.given(q), scale, *sizes,
        C=CHUNK, BK=s.solve_keys, DOT=s.dot, GATE=s.gate, PRECISION=s.precision, PACKED=layout.packed, SCORES=scores,
        num_warps=s.solve_warps, num_stages=1,
    )  # fmt: skip
    return solved
