"""The walk of the gated delta rule's backward, from the last chunk to the first, on Triton.

With dS behind a chunk, dR = T^T (P^T dO + (e^(c_C - c) k) dS), and dS before it is

    e^c_C dS + (scale e^c q)^T dO - (beta e^c k)^T dR

which is linear in dS with the transposed maps of the forward walk, so that a long sequence is cut as there: segments
count from the last. A program holds the transpose of some columns of dS. Sums and dS are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tcal_compiler.kernels.tiles import dot, load_columns, load_rows, store_columns

from . import triton_walk
from .triton_layout import COUNTS, Layout, segment_at
from .triton_solve import Solved
from .triton_tiles import CHUNK, Setting, Sizes
from .triton_walk import end_is_read, end_start, load_gates, remembered, store_end


@triton.jit
def _chunk_back(
    state, kp, gp, matrices, gates, scaled, t0, v0, columns, T, H, K, DK, DV,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dR of a chunk, [BV, C], and dS before it, [BV, BK]. columns: those of dO that there are; the others are zero."""
    into, fade, rate, keep = load_gates(gates, C)
    keys = load_rows(kp, t0, K * DK, T, 0, DK, C, BK)
    grad = load_columns(gp, t0, H * DV, T, v0, columns, C, BV)
    new = dot(state, tl.trans(keys), DOT, PRECISION) * fade[None, :]
    new += dot(grad, load_rows(matrices + C * C, 0, C, C, 0, C, C, C), DOT, PRECISION)
    rows = dot(new, load_rows(matrices, 0, C, C, 0, C, C, C), DOT, PRECISION)
    state = state * keep + dot(grad, load_rows(scaled, 0, DK, C, 0, DK, C, BK), DOT, PRECISION)
    state -= dot(rows * (into * rate)[None, :], keys, DOT, PRECISION)
    return rows, state


@triton.jit(do_not_specialize=COUNTS)
def _ends_back(
    k, d_out, matrices, gates, scaled, start, ends, cuts, T, N, LENGTH, SEGMENTS, H, K, DK, DV,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(DV, BV) + tl.cdiv(DK, BV)
    pid = tl.program_id(0).to(tl.int64)
    index, part = pid // parts, (pid % parts).to(tl.int32)
    h, row, origin, tokens, at, count, segment, segments = segment_at(index, cuts, T, N, SEGMENTS, H, PACKED)
    state, unit, v0, columns = end_start(start, row, segment, part, DK, DV, BK, BV)
    kp, gp = k + (origin * K + h // (H // K)) * DK, d_out + (origin * H + h) * DV
    read = end_is_read(part, segment, segments, DV, BV)
    first = ((segments - 1 - segment) * LENGTH).to(tl.int32)
    last = tl.where(read, tl.minimum(first + LENGTH, count), first)
    last = first + remembered(gates, at + first, 1, last - first, C)
    for step in tl.range(0, last - first, num_stages=STAGES):
        n = last - 1 - step
        _, state = _chunk_back(
            state, kp, gp, matrices + (at + n) * 2 * C * C, gates + (at + n) * 4 * C, scaled + (at + n) * C * DK,
            n * C, v0, columns, tokens, H, K, DK, DV, C, BK, BV, DOT, PRECISION,
        )  # fmt: skip
    if read:
        store_end(ends, index, state, unit, v0, DK, DV, BK, BV)


@triton.jit(do_not_specialize=COUNTS)
def _walk_back(
    k, d_out, matrices, gates, scaled, starts, d_states, d_rows, d_start, cuts, T, N, LENGTH, SEGMENTS, H, K, DK, DV,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(DV, BV)
    pid = tl.program_id(0).to(tl.int64)
    index, v0 = pid // parts, (pid % parts).to(tl.int32) * BV
    h, row, origin, tokens, at_start, count, segment, segments = segment_at(index, cuts, T, N, SEGMENTS, H, PACKED)
    kp, gp = k + (origin * K + h // (H // K)) * DK, d_out + (origin * H + h) * DV
    state = load_columns(starts + index * DK * DV, 0, DV, DK, v0, DV, BK, BV).to(tl.float32)
    first = ((segments - 1 - segment) * LENGTH).to(tl.int32)
    last = tl.minimum(first + LENGTH, count)
    for step in tl.range(0, last - first, num_stages=STAGES):
        n = last - 1 - step
        at = at_start + n
        store_columns(d_states + at * DK * DV, state, 0, DV, DK, v0, DV, BK, BV)
        rows, state = _chunk_back(
            state, kp, gp, matrices + at * 2 * C * C, gates + at * 4 * C, scaled + at * C * DK,
            n * C, v0, DV, tokens, H, K, DK, DV, C, BK, BV, DOT, PRECISION,
        )  # fmt: skip
        store_columns(d_rows + at * C * DV, rows, 0, DV, C, v0, DV, C, BV)
    if segment == segments - 1:
        store_columns(d_start + row * DK * DV, state, 0, DV, DK, v0, DV, BK, BV)


class WalkBack:
    """The walk of the backward, for one size."""

    def __init__(self, x: Sizes, layout: Layout, s: Setting) -> None:
        cut = triton_walk.cut_to_read(layout.longest, layout.whole_rows, x.value_dim, s, layout.device)
        self._launches, self._kept = triton_walk.CutWalk(x, layout, s, cut, _ends_back, _walk_back), s.kept
        self._rows = (layout.rows, layout.chunks, CHUNK, x.value_dim)
        self._states = (layout.rows, layout.chunks, x.key_dim, x.value_dim)

    def __call__(self, k: Tensor, d_out: Tensor, d_final: Tensor, solved: Solved) -> tuple[Tensor, Tensor, Tensor]:
        """dR [rows, N, C, Dv], dS behind each chunk [rows, N, Dk, Dv], and before the first [B, H, Dk, Dv]."""
        read = (k, d_out, solved.matrices, solved.gates, solved.scaled)
        starts = self._launches.starts(d_final, *read)
        d_rows, d_states = (k.new_empty(size, dtype=self._kept) for size in (self._rows, self._states))
        d_start = torch.empty_like(d_final)
        self._launches.walk(*read, starts, d_states, d_rows, d_start)
        return d_rows, d_states, d_start
