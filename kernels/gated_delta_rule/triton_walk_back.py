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

from tcal_compiler.kernels.launch import cdiv, launch
from tcal_compiler.kernels.tiles import dot, load_columns, load_rows, store_columns

from . import triton_walk
from .triton_layout import COUNTS, Layout, segment_at
from .triton_solve import Solved
from .triton_tiles import CHUNK, Setting
from .triton_walk import end_is_read, end_start, join, load_gates, remembered, store_end


@triton.jit
def _chunk_back(
    state, qp, kp, gp, inverse, d_fresh, gates, t0, v0, columns, scale, T, H, K, DK, DV,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dR of a chunk, [BV, C], and dS before it, [BV, BK]. columns: those of dO that there are; the others are zero."""
    into, fade, rate, keep = load_gates(gates, C)
    keys = load_rows(kp, t0, K * DK, T, 0, DK, C, BK)
    new = load_columns(d_fresh, 0, DV, C, v0, columns, C, BV).to(tl.float32)
    new += dot(state, tl.trans(keys), DOT, PRECISION) * fade[None, :]
    rows = dot(new, load_rows(inverse, 0, C, C, 0, C, C, C), DOT, PRECISION)
    grad = load_columns(gp, t0, H * DV, T, v0, columns, C, BV).to(tl.float32) * (into * scale)[None, :]
    state = state * keep
    state += dot(grad, load_rows(qp, t0, H * DK, T, 0, DK, C, BK), DOT, PRECISION)
    state -= dot(rows * (into * rate)[None, :], keys, DOT, PRECISION)
    return rows, state


@triton.jit(do_not_specialize=COUNTS)
def _ends_back(
    q, k, d_out, inverse, d_fresh, gates, start, ends, cuts, scale,
    T, N, LENGTH, SEGMENTS, H, K, DK, DV,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(DV, BV) + tl.cdiv(DK, BV)
    pid = tl.program_id(0).to(tl.int64)
    index, part = pid // parts, (pid % parts).to(tl.int32)
    h, row, origin, tokens, at, count, segment, segments = segment_at(index, cuts, T, N, SEGMENTS, H, PACKED)
    state, unit, v0, columns = end_start(start, row, segment, part, DK, DV, BK, BV)
    qp, gp = q + (origin * H + h) * DK, d_out + (origin * H + h) * DV
    kp = k + (origin * K + h // (H // K)) * DK
    read = end_is_read(part, segment, segments, DV, BV)
    first = ((segments - 1 - segment) * LENGTH).to(tl.int32)
    last = tl.where(read, tl.minimum(first + LENGTH, count), first)
    last = first + remembered(gates, at + first, 1, last - first, C)
    for step in tl.range(0, last - first, num_stages=STAGES):
        n = last - 1 - step
        _, state = _chunk_back(
            state, qp, kp, gp, inverse + (at + n) * C * C, d_fresh + (at + n) * C * DV,
            gates + (at + n) * 4 * C, n * C, v0, columns, scale, tokens, H, K, DK, DV, C, BK, BV, DOT, PRECISION,
        )  # fmt: skip
    if read:
        store_end(ends, index, state, unit, v0, DK, DV, BK, BV)


@triton.jit(do_not_specialize=COUNTS)
def _walk_back(
    q, k, d_out, inverse, d_fresh, gates, starts, d_states, d_start, cuts, scale,
    T, N, LENGTH, SEGMENTS, H, K, DK, DV,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(DV, BV)
    pid = tl.program_id(0).to(tl.int64)
    index, v0 = pid // parts, (pid % parts).to(tl.int32) * BV
    h, row, origin, tokens, at_start, count, segment, segments = segment_at(index, cuts, T, N, SEGMENTS, H, PACKED)
    qp, gp = q + (origin * H + h) * DK, d_out + (origin * H + h) * DV
    kp = k + (origin * K + h // (H // K)) * DK
    state = load_columns(starts + index * DK * DV, 0, DV, DK, v0, DV, BK, BV).to(tl.float32)
    first = ((segments - 1 - segment) * LENGTH).to(tl.int32)
    last = tl.minimum(first + LENGTH, count)
    for step in tl.range(0, last - first, num_stages=STAGES):
        n = last - 1 - step
        at = at_start + n
        store_columns(d_states + at * DK * DV, state, 0, DV, DK, v0, DV, BK, BV)
        rows, state = _chunk_back(
            state, qp, kp, gp, inverse + at * C * C, d_fresh + at * C * DV,
            gates + at * 4 * C, n * C, v0, DV, scale, tokens, H, K, DK, DV, C, BK, BV, DOT, PRECISION,
        )  # fmt: skip
        store_columns(d_fresh + at * C * DV, rows, 0, DV, C, v0, DV, C, BV)
    if segment == segments - 1:
        store_columns(d_start + row * DK * DV, state, 0, DV, DK, v0, DV, BK, BV)


def walk_back(
    q: Tensor,
    k: Tensor,
    d_out: Tensor,
    d_fresh: Tensor,
    d_final: Tensor,
    solved: Solved,
    layout: Layout,
    s: Setting,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """dS behind each chunk [rows, N, Dk, Dv], and before the first [B, H, Dk, Dv]; d_fresh, P^T dO, becomes dR."""
    rows, chunks, _, value_dim = d_fresh.shape
    heads, key_dim = d_final.shape[1:3]
    cut = triton_walk.cut_for(layout.longest, layout.whole_rows, value_dim, s, k.device, wide=True)
    cuts = layout.cuts(cut.segments)
    sizes = (scale, layout.tokens, chunks, cuts.length, cuts.each, heads, *k.shape[2:], value_dim)
    blocks = dict(C=CHUNK, BK=s.key_block, BV=cut.columns, DOT=s.dot, PRECISION=s.precision)
    blocks |= dict(STAGES=cut.stages, PACKED=layout.packed, num_warps=cut.warps)
    read = (q, k, d_out, solved.matrices, d_fresh, solved.gates)
    parts, starts = cdiv(value_dim, cut.columns), d_final
    if cuts.total > layout.sequences:
        ends = d_final.new_empty(cuts.total, heads, key_dim, value_dim + key_dim)
        programs = cuts.total * heads * (parts + cdiv(key_dim, cut.columns))
        launch(_ends_back, programs, *read, d_final, ends, cuts.given(q), *sizes, **blocks)
        starts = join(d_final, ends, cuts, s)
    d_states = torch.empty(rows, chunks, key_dim, value_dim, dtype=s.kept, device=k.device)
    d_start = torch.empty_like(d_final)
    programs = cuts.total * heads * parts
    launch(_walk_back, programs, *read, starts, d_states, d_start, cuts.given(q), *sizes, **blocks)
    return d_states, d_start
