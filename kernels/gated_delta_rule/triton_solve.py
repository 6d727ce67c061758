"""What every chunk of the gated delta rule gives by itself, all chunks at once, on Triton.

The names are those of `chunked`: T = (I + B)^-1 * L, P = scale (q k^T * L). With B = diag(beta) A,

    T diag(beta) = diag(beta) T~        T~ = (I + A diag(beta))^-1 * L

of which the walk that reads the outputs takes T~: then v, whose numbers need no rounding, meets it as it is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tcal_compiler.kernels.launch import Launch
from tcal_compiler.kernels.tiles import dot, load_gate, load_rows, store_gate, store_rows

from .triton_layout import COUNTS, Layout, chunk_at
from .triton_tiles import CHUNK, Setting, Sizes, decay_sums, exp32, pair_decay


@triton.jit
def _diagonal(x):
    """The blocks [4, 16, 16] on the diagonal of [64, 64]."""
    i = tl.arange(0, 4)
    same = (i[:, None] == i[None, :])[:, None, :, None]
    return tl.sum(tl.where(same, tl.reshape(x, (4, 16, 4, 16)), 0.0), 2)


@triton.jit
def _on_diagonal(blocks):
    i = tl.arange(0, 4)
    same = (i[:, None] == i[None, :])[:, None, :, None]
    return tl.reshape(tl.where(same, tl.reshape(blocks, (4, 16, 1, 16)), 0.0), (64, 64))


@triton.jit
def _doubled(x, low, B: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Of x, (I + low)^-1 on diagonal blocks of B, that on blocks of 2 B: X - X L X, L what of low lies between them."""
    i = tl.arange(0, x.shape[-1])
    row, column = i[:, None], i[None, :]
    between = (row // (2 * B) == column // (2 * B)) & (row // B > column // B)
    return x - dot(dot(x, tl.where(between, low, 0.0), DOT, PRECISION), x, DOT, PRECISION)


@triton.jit
def _inverse(low, blocks, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """(I + low)^-1 of the strictly lower part of low [64, 64], with its diagonal blocks: from blocks of 2 on."""
    i = tl.arange(0, 16)
    row, column = i[:, None], i[None, :]
    first = (row // 2 == column // 2) & (row > column)
    x = tl.where(row == column, 1.0, 0.0) - tl.where(first, blocks, 0.0)
    for level in tl.static_range(1, 4):
        x = _doubled(x, blocks, 2**level, DOT, PRECISION)
    return _doubled(_doubled(_on_diagonal(x), low, 16, DOT, PRECISION), low, 32, DOT, PRECISION)


@triton.jit(do_not_specialize=COUNTS)
def _solve(
    q, k, g, beta, matrices, gates, scaled, chunks, scale, T, N, H, K, DK,
    C: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
    PACKED: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    h, t0, end = chunk_at(pid, chunks, T, N, H, C, PACKED)
    kp = k + h // (H // K) * DK
    to = matrices + pid * 2 * C * C
    rate = load_gate(beta + h, t0, H, end, C)
    given = load_gate(g + h, t0, H, end, C)  # before what needs it, to wait for all loads at once
    low = tl.zeros((C, C), tl.float32)
    pairs = tl.zeros((C, C), tl.float32)
    for k0 in range(0, DK, BK):
        keys = load_rows(kp, t0, K * DK, end, k0, DK, C, BK)
        queries = load_rows(q + h * DK, t0, H * DK, end, k0, DK, C, BK)
        pairs += dot(queries, tl.trans(keys), DOT, PRECISION)
        low += dot(keys, tl.trans(keys), DOT, PRECISION)
    c, last = decay_sums(given, GATE)
    decay = pair_decay(c, C)
    pairs *= decay * scale
    fade = exp32(last - c)
    if READ:
        pairs *= rate[None, :]
        low *= rate[None, :]
        fade *= rate
    else:
        low *= rate[:, None]
        for k0 in range(0, DK, BK):
            queries = load_rows(q + h * DK, t0, H * DK, end, k0, DK, C, BK).to(tl.float32) * (exp32(c) * scale)[:, None]
            store_rows(scaled + pid * C * DK, queries, 0, DK, C, k0, DK, C, BK)
    store_rows(to + C * C, pairs, 0, C, C, 0, C, C, C)
    blocks = _diagonal(low)
    j = tl.arange(0, 16)
    kept = 1.0 - tl.sum(tl.where(j[:, None] == j[None, :], blocks, 0.0), 2)  # of what each token's key reads
    grown = tl.sum(tl.sum(tl.log(tl.maximum(tl.abs(kept), 1.0)), 1), 0)
    bound = last.to(tl.float32) + grown
    gates += pid * 4 * C
    i = tl.arange(0, C)
    store_gate(gates, exp32(c), 0, 1, C, C)
    store_gate(gates + C, fade, 0, 1, C, C)
    store_gate(gates + 2 * C, rate, 0, 1, C, C)
    store_gate(gates + 3 * C, tl.where(i == 0, exp32(last), bound), 0, 1, C, C)
    x = _inverse(low, blocks, DOT, PRECISION)
    store_rows(to, x * decay, 0, C, C, 0, C, C, C)


class Solved(NamedTuple):
    """What every chunk of C tokens gives by itself; rows and N as in `triton_layout`, c the running sum of g.

    The bound: what is left of the state before a chunk in the one behind it has a norm of at most e^bound of it. It is
    c_C, and more where |1 - beta k^2| > 1 for some token.
    """

    matrices: Tensor  # to read outputs T~ and P diag(beta), for a backward T and P: [rows, N, 2, C, C]
    gates: Tensor  # e^c, e^(c_C - c) (to read, times beta), beta, and a row of e^c_C and bounds: [rows, N, 4, C]
    scaled: Tensor  # for a backward, scale e^c q [rows, N, C, Dk]; else `gates`, which nothing takes for it


class Solve:
    """The launch for one size. read: for the walk that reads outputs, else for a backward."""

    def __init__(self, x: Sizes, layout: Layout, s: Setting, scale: float, *, read: bool) -> None:
        chunks = (layout.rows, layout.chunks)
        self._layout, self._kept, self._read = layout, s.kept, read
        self._matrices, self._gates = (*chunks, 2, CHUNK, CHUNK), (*chunks, 4, CHUNK)
        self._scaled = (*chunks, CHUNK, x.key_dim)
        sizes = (layout.tokens, layout.chunks, x.heads, x.kv_heads, x.key_dim)
        self._launch = Launch(
            _solve, layout.rows * layout.chunks, scale, *sizes,
            C=CHUNK, BK=s.solve_keys, DOT=s.dot, GATE=s.gate, PRECISION=s.precision, PACKED=layout.packed, READ=read,
            num_warps=s.solve_warps, maxnreg=s.solve_registers, num_stages=1,
        )  # fmt: skip

    def __call__(self, q: Tensor, k: Tensor, g: Tensor, beta: Tensor) -> Solved:
        """Of tensors as `as_kernels_take` returns them."""
        matrices = k.new_empty(self._matrices, dtype=self._kept)
        gates = k.new_empty(self._gates, dtype=torch.float32)
        scaled = gates if self._read else k.new_empty(self._scaled, dtype=self._kept)
        self._launch(q, k, g, beta, matrices, gates, scaled, self._layout.given(q))
        return Solved(matrices, gates, scaled)
