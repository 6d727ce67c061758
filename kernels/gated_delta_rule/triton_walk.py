"""The walk over chunks of the gated delta rule: the serial part of its forward, on Triton.

With W, U of `solve`, a chunk takes the state S before it to V' = U - W S and e^c_C S + K^T (e^(c_C - c) V'). That is
linear in S, so a long sequence with few heads is cut into segments that are walked at once:
1. ends: of every segment but the last its end N from a start of zero (the first: from the true one), and M, its end
   from a start of the unit matrix without values, so that it takes S to M S + N.
2. join: the true start of every segment, one after another.
3. walk: every segment from its true start.
One segment is the third launch alone. V' overwrites U. Sums and the state are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tcal_compiler.kernels.tiles import dot, load_columns, load_rows, store_rows

from .triton_tiles import CHUNK, Setting

SHORTEST = 8  # chunks of a segment
MOST = 24  # segments
WORTH = 8  # segments from which on the three launches, each over all tokens, take less time than one (H200)


@triton.jit
def _chunk(
    state, kp, w, u, fade, keep, at, t0, v0, columns, T, K, DK, DV,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """V' of a chunk, and the state behind it. columns: those of U that there are; V' of the others starts from zero."""
    new = load_rows(u + at * C * DV, 0, DV, C, v0, columns, C, BV).to(tl.float32)
    new -= dot(load_rows(w + at * C * DK, 0, DK, C, 0, DK, C, BK), state, DOT, PRECISION)
    faded = new * tl.load(fade + at * C + tl.arange(0, C))[:, None]
    keys_t = load_columns(kp, t0, K * DK, T, 0, DK, C, BK)
    return new, state * tl.load(keep + at) + dot(keys_t, faded, DOT, PRECISION)


@triton.jit
def _ends(
    k, w, u, fade, keep, start, ends, T, N, LENGTH, SEGMENTS, H, K, DK, DV,
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
    kp = k + (b * T * K + h // (H // K)) * DK
    known = load_rows(start + row * DK * DV, 0, DV, tl.where(segment == 0, DK, 0), v0, columns, BK, BV)
    diagonal = tl.arange(0, BK)[:, None] == (v0 + tl.arange(0, BV))[None, :]
    state = known.to(tl.float32) + tl.where(diagonal & unit, 1.0, 0.0)
    first = (segment * LENGTH).to(tl.int32)
    last = tl.where(unit & (segment == 0), first, first + LENGTH)  # nothing needs M of the first
    for n in tl.range(first, last, num_stages=STAGES):
        _, state = _chunk(
            state, kp, w, u, fade, keep, row * N + n, n * C, v0, columns, T, K, DK, DV, C, BK, BV, DOT, PRECISION
        )
    at = (row * (SEGMENTS - 1) + segment) * DK * (DV + DK)
    store_rows(ends + at, state, 0, DV + DK, DK, tl.where(unit, DV, 0) + v0, tl.where(unit, DV + DK, DV), BK, BV)


@triton.jit
def _join(start, ends, starts, SEGMENTS, DK, DV, BK: tl.constexpr, BV: tl.constexpr):
    parts = tl.cdiv(DV, BV)
    pid = tl.program_id(0).to(tl.int64)
    row, v0 = pid // parts, (pid % parts).to(tl.int32) * BV
    state = load_rows(start + row * DK * DV, 0, DV, DK, v0, DV, BK, BV).to(tl.float32)
    to = starts + row * SEGMENTS * DK * DV
    store_rows(to, state, 0, DV, DK, v0, DV, BK, BV)
    width = DV + DK
    ends += row * (SEGMENTS - 1) * DK * width
    state = load_rows(ends, 0, width, DK, v0, DV, BK, BV)
    store_rows(to + DK * DV, state, 0, DV, DK, v0, DV, BK, BV)
    for s in tl.range(1, SEGMENTS - 1, num_stages=2):
        at = ends + s * DK * width
        moved = dot(load_rows(at, 0, width, DK, DV, width, BK, BK), state, tl.float32, "tf32x3")
        state = moved + load_rows(at, 0, width, DK, v0, DV, BK, BV)
        store_rows(to + (s + 1) * DK * DV, state, 0, DV, DK, v0, DV, BK, BV)


@triton.jit
def _walk(
    k, w, u, fade, keep, starts, states, final, T, N, LENGTH, SEGMENTS, H, K, DK, DV,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(DV, BV)
    pid = tl.program_id(0).to(tl.int64)
    at_start, v0 = pid // parts, (pid % parts).to(tl.int32) * BV
    row, segment = at_start // SEGMENTS, at_start % SEGMENTS
    b, h = row // H, row % H
    kp = k + (b * T * K + h // (H // K)) * DK
    state = load_rows(starts + at_start * DK * DV, 0, DV, DK, v0, DV, BK, BV).to(tl.float32)
    first = (segment * LENGTH).to(tl.int32)
    for n in tl.range(first, tl.minimum(first + LENGTH, N), num_stages=STAGES):
        at = row * N + n
        store_rows(states + at * DK * DV, state, 0, DV, DK, v0, DV, BK, BV)
        new, state = _chunk(state, kp, w, u, fade, keep, at, n * C, v0, DV, T, K, DK, DV, C, BK, BV, DOT, PRECISION)
        store_rows(u + at * C * DV, new, 0, DV, C, v0, DV, C, BV)
    if segment == SEGMENTS - 1:
        store_rows(final + row * DK * DV, state, 0, DV, DK, v0, DV, BK, BV)


@dataclass(frozen=True)
class Cut:
    """How a walk is laid out: segments of the sequence, value columns of a program, tiles loaded ahead."""

    segments: int
    columns: int
    stages: int


def cut_for(chunks: int, rows: int, value_dim: int, s: Setting, device: torch.device) -> Cut:
    """As many programs as the card runs at once, where there are enough chunks to cut; as measured on an H200."""
    columns, narrow = s.value_block, s.dot == tl.bfloat16
    if device.type != "cuda" or s.key_block > 128:
        return Cut(1, columns, s.stages)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    programs = rows * triton.cdiv(value_dim, columns)
    segments = min(MOST, chunks // SHORTEST, 2 * processors // programs)
    if segments < WORTH:
        segments = 1
        if programs <= processors:
            columns = min(columns, 32)
    return Cut(segments, columns, 3 if narrow and (s.key_block <= 64 or columns <= 32) else s.stages)


def walk_chunks(
    k: Tensor,
    w: Tensor,
    u: Tensor,
    fade: Tensor,
    keep: Tensor,
    state: Tensor,
    s: Setting,
    cut: Cut | None = None,
) -> tuple[Tensor, Tensor]:
    """States before each chunk [B H, N, Dk, Dv], and the final one; V' is then in u.

    k [B, T, K, Dk]; w [B H, N, C, Dk], u [B H, N, C, Dv], fade [B H, N, C] = e^(c_C - c), keep [B H, N] = e^c_C; state
    [B, H, Dk, Dv].
    """
    rows, chunks, _, value_dim = u.shape
    heads, key_dim = state.shape[1:3]
    cut = cut or cut_for(chunks, rows, value_dim, s, k.device)
    length = triton.cdiv(chunks, cut.segments)
    segments = triton.cdiv(chunks, length)
    parts = triton.cdiv(value_dim, cut.columns)
    states = torch.empty(rows, chunks, key_dim, value_dim, dtype=s.kept, device=k.device)
    final = torch.empty_like(state)
    sizes = (k.shape[1], chunks, length, segments, heads, *k.shape[2:], value_dim)
    blocks = dict(C=CHUNK, BK=s.key_block, BV=cut.columns, DOT=s.dot, PRECISION=s.precision)
    blocks |= dict(STAGES=cut.stages, num_warps=s.warps)
    starts = state
    if segments > 1:
        ends = torch.empty(rows, segments - 1, key_dim, value_dim + key_dim, dtype=torch.float32, device=k.device)
        starts = torch.empty(rows, segments, key_dim, value_dim, dtype=torch.float32, device=k.device)
        grid = (rows * (segments - 1) * (parts + triton.cdiv(key_dim, cut.columns)),)
        _ends[grid](k, w, u, fade, keep, state, ends, *sizes, **blocks)
        columns = min(16, cut.columns)
        grid = (rows * triton.cdiv(value_dim, columns),)
        _join[grid](state, ends, starts, segments, key_dim, value_dim, BK=s.key_block, BV=columns, num_warps=4)
    _walk[(rows * segments * parts,)](k, w, u, fade, keep, starts, states, final, *sizes, **blocks)
    return states, final
