"""The walk of the gated delta rule's backward, from the last chunk to the first, on Triton.

With dS behind a chunk and dV' = P^T dO + (e^(c_C - c) k) dS, dS before it is

    e^c_C dS + (scale e^c q)^T dO - W^T dV'

which is linear in dS with the transposed maps of the forward walk, so that a long sequence is cut as there: segments
count from the last. Sums and dS are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tcal_compiler.kernels.tiles import dot, load_columns, load_rows, store_rows

from . import triton_walk
from .triton_solve import Solved
from .triton_tiles import CHUNK, Setting
from .triton_walk import join


@triton.jit
def _chunk_back(
    state, qp, kp, gp, w, d_fresh, into, fade, keep, at, t0, v0, columns, scale, T, H, K, DK, DV,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dV' of a chunk, and dS before it. columns: those of dO that there are; the others are zero."""
    i = at * C + tl.arange(0, C)
    new = load_rows(d_fresh + at * C * DV, 0, DV, C, v0, columns, C, BV).to(tl.float32)
    new += dot(load_rows(kp, t0, K * DK, T, 0, DK, C, BK), state, DOT, PRECISION) * tl.load(fade + i)[:, None]
    grad = load_rows(gp, t0, H * DV, T, v0, columns, C, BV).to(tl.float32) * (tl.load(into + i) * scale)[:, None]
    state = state * tl.load(keep + at)
    state += dot(load_columns(qp, t0, H * DK, T, 0, DK, C, BK), grad, DOT, PRECISION)
    state -= dot(load_columns(w + at * C * DK, 0, DK, C, 0, DK, C, BK), new, DOT, PRECISION)
    return new, state


@triton.jit
def _ends_back(
    q, k, d_out, w, d_fresh, into, fade, keep, start, ends, scale, T, N, LENGTH, SEGMENTS, H, K, DK, DV,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    values = tl.cdiv(DV, BV)
    parts = values + tl.cdiv(DK, BV)
    pid = tl.program_id(0).to(tl.int64)
    part, segment, row = (pid % parts).to(tl.int32), pid // parts % (SEGMENTS - 1), pid // parts // (SEGMENTS - 1)
    unit = part >= values  # this program's columns are of M
    v0 = tl.where(unit, part - values, part) * BV
    columns = tl.where(unit, 0, DV)
    b, h = row // H, row % H
    qp, gp = q + (b * T * H + h) * DK, d_out + (b * T * H + h) * DV
    kp = k + (b * T * K + h // (H // K)) * DK
    known = load_rows(start + row * DK * DV, 0, DV, tl.where(segment == 0, DK, 0), v0, columns, BK, BV)
    diagonal = tl.arange(0, BK)[:, None] == (v0 + tl.arange(0, BV))[None, :]
    state = known.to(tl.float32) + tl.where(diagonal & unit, 1.0, 0.0)
    first = ((SEGMENTS - 1 - segment) * LENGTH).to(tl.int32)
    last = tl.where(unit & (segment == 0), first, tl.minimum(first + LENGTH, N))  # nothing needs M of the first
    for step in tl.range(0, last - first, num_stages=STAGES):
        n = last - 1 - step
        _, state = _chunk_back(
            state, qp, kp, gp, w, d_fresh, into, fade, keep, row * N + n, n * C, v0, columns, scale, T, H, K, DK, DV,
            C, BK, BV, DOT, PRECISION,
        )  # fmt: skip
    at = (row * (SEGMENTS - 1) + segment) * DK * (DV + DK)
    store_rows(ends + at, state, 0, DV + DK, DK, tl.where(unit, DV, 0) + v0, tl.where(unit, DV + DK, DV), BK, BV)


@triton.jit
def _walk_back(
    q, k, d_out, w, d_fresh, into, fade, keep, starts, d_states, d_start, scale, T, N, LENGTH, SEGMENTS, H, K, DK, DV,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(DV, BV)
    pid = tl.program_id(0).to(tl.int64)
    at_start, v0 = pid // parts, (pid % parts).to(tl.int32) * BV
    row, segment = at_start // SEGMENTS, at_start % SEGMENTS
    b, h = row // H, row % H
    qp, gp = q + (b * T * H + h) * DK, d_out + (b * T * H + h) * DV
    kp = k + (b * T * K + h // (H // K)) * DK
    state = load_rows(starts + at_start * DK * DV, 0, DV, DK, v0, DV, BK, BV).to(tl.float32)
    first = ((SEGMENTS - 1 - segment) * LENGTH).to(tl.int32)
    last = tl.minimum(first + LENGTH, N)
    for step in tl.range(0, last - first, num_stages=STAGES):
        n = last - 1 - step
        at = row * N + n
        store_rows(d_states + at * DK * DV, state, 0, DV, DK, v0, DV, BK, BV)
        new, state = _chunk_back(
            state, qp, kp, gp, w, d_fresh, into, fade, keep, at, n * C, v0, DV, scale, T, H, K, DK, DV,
            C, BK, BV, DOT, PRECISION,
        )  # fmt: skip
        store_rows(d_fresh + at * C * DV, new, 0, DV, C, v0, DV, C, BV)
    if segment == SEGMENTS - 1:
        store_rows(d_start + row * DK * DV, state, 0, DV, DK, v0, DV, BK, BV)


def walk_back(
    q: Tensor, k: Tensor, d_out: Tensor, d_fresh: Tensor, d_final: Tensor, solved: Solved, s: Setting, *, scale: float
) -> tuple[Tensor, Tensor]:
    """dS behind each chunk [B H, N, Dk, Dv], and before the first [B, H, Dk, Dv]; d_fresh, P^T dO, becomes dV'."""
    rows, chunks, _, value_dim = d_fresh.shape
    heads, key_dim = d_final.shape[1:3]
    cut = triton_walk.cut_for(chunks, rows, value_dim, s, k.device, wide=True)
    length = triton.cdiv(chunks, cut.segments)
    segments = triton.cdiv(chunks, length)
    sizes = (scale, k.shape[1], chunks, length, segments, heads, *k.shape[2:], value_dim)
    blocks = dict(C=CHUNK, BK=s.key_block, BV=cut.columns, DOT=s.dot, PRECISION=s.precision)
    blocks |= dict(STAGES=cut.stages, num_warps=s.warps)
    read = (q, k, d_out, solved.w, d_fresh, solved.into, solved.fade, solved.keep)
    parts, starts = triton.cdiv(value_dim, cut.columns), d_final
    if segments > 1:
        ends = torch.empty(rows, segments - 1, key_dim, value_dim + key_dim, dtype=torch.float32, device=k.device)
        grid = (rows * (segments - 1) * (parts + triton.cdiv(key_dim, cut.columns)),)
        _ends_back[grid](*read, d_final, ends, *sizes, **blocks)
        starts = join(d_final, ends, s)
    d_states = torch.empty(rows, chunks, key_dim, value_dim, dtype=s.kept, device=k.device)
    d_start = torch.empty_like(d_final)
    _walk_back[(rows * segments * parts,)](*read, starts, d_states, d_start, *sizes, **blocks)
    return d_states, d_start
