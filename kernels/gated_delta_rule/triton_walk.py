"""The walk over chunks of the gated delta rule: the serial part of its forward, on Triton.

With T of `solve`, a chunk takes the state S before it to V' = T R, R = beta (v - e^c (k S)), and the state behind it
e^c_C S + k^T (e^(c_C - c) V'). That is linear in S, so a long sequence with few heads is cut into segments that are
walked at once:
1. ends: of every segment but the last its end N from a start of zero (the first: from the true one), and M, its end
   from a start of the unit matrix without values, so that it takes S to M S + N. Chunks before those behind which no
   state is remembered (`remembered`) have no say in either.
2. join: the true start of every segment, one after another.
3. walk: every segment from its true start. It reads the outputs, O = scale (e^c q) S + P V'; or, for a backward, it
   stores the states before each chunk, and V'.
One segment is the third launch alone. Sums and the state are float32. Segments and packed sequences: `triton_layout`.

To read outputs, T~ of `solve` stands for T: V' = diag(beta) Y, Y = T~ v - T~ (e^c (k S)), and beta goes into P and
into e^(c_C - c).

A program holds the transpose of some columns of S. Then the state, R, V' and Y are left operands of products, which
registers hold, and what meets them on the right are tiles as they are loaded: none goes through shared memory between
two products.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tcal_compiler.kernels.launch import Launch, cdiv
from tcal_compiler.kernels.tiles import dot, load_columns, load_rows, store_columns, store_rows

from .triton_layout import COUNTS, Cuts, Layout, segment_at
from .triton_solve import Solved
from .triton_tiles import CHUNK, Setting, Sizes

FORGOTTEN = tl.constexpr(-70.0)  # a state that has decayed by this exponent is no part of any sum
SHORTEST = 8  # chunks of a segment
MOST = 24  # segments
WORTH = 2  # from this many segments that run at once on one processor, cutting takes less time than not (H200)


@triton.jit
def remembered(gates, at, STEP: tl.constexpr, count, C: tl.constexpr):
    """How many chunks, of `count` that lie STEP apart from place `at` on, have a say in what is behind the first."""
    back = tl.arange(0, 128)
    bounds = tl.load(gates + (at + STEP * back) * 4 * C + 3 * C + 1, mask=back < count, other=0.0)
    total = tl.cumsum(bounds, 0)
    return tl.minimum(tl.min(tl.where(total < FORGOTTEN, back + 1, count), 0), count)


@triton.jit
def load_gates(gates, C: tl.constexpr):
    """The four rows of a chunk's gates but the last, and its first number. As one tile, of which Triton keeps one copy
    in shared memory; it would load single rows into every thread that needs their numbers."""
    rows, columns = tl.arange(0, 4)[:, None], tl.arange(0, C)[None, :]
    tile = tl.permute(tl.reshape(tl.load(gates + rows * C + columns), (2, 2, C)), (2, 0, 1))
    even, odd = tl.split(tile)
    into, rate = tl.split(even)
    fade, _ = tl.split(odd)
    return into, fade, rate, tl.load(gates + 3 * C)


@triton.jit
def _chunk(
    state, kp, vp, inverse, into, fade, rate, keep, t0, v0, columns, T, K, DK, DV,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    READ: tl.constexpr,
):  # fmt: skip
    """V' of a chunk (READ: Y), [BV, C], and the state behind it, [BV, BK]. columns: those of v that there are, the
    others being zero."""
    keys = load_rows(kp, t0, K * DK, T, 0, DK, C, BK)
    values = load_columns(vp, t0, K * DV, T, v0, columns, C, BV)
    solve = load_columns(inverse, 0, C, C, 0, C, C, C)
    seen = dot(state, tl.trans(keys), DOT, PRECISION) * into[None, :]
    if READ:
        new = dot(values, solve, DOT, PRECISION) - dot(seen, solve, DOT, PRECISION)
    else:
        new = dot((values.to(tl.float32) - seen) * rate[None, :], solve, DOT, PRECISION)
    return new, state * keep + dot(new * fade[None, :], keys, DOT, PRECISION)


@triton.jit
def end_start(start, row, segment, part, DK, DV, BK: tl.constexpr, BV: tl.constexpr):
    """Where program `part` of a segment's ends starts: the state [BV, BK], whether its rows are of M, the first of
    them, and how many of the values' there are."""
    values = tl.cdiv(DV, BV)
    unit = part >= values
    v0 = tl.where(unit, part - values, part) * BV
    columns = tl.where(unit, 0, DV)
    known = load_columns(start + row * DK * DV, 0, DV, tl.where(segment == 0, DK, 0), v0, columns, BK, BV)
    diagonal = (v0 + tl.arange(0, BV))[:, None] == tl.arange(0, BK)[None, :]
    return known.to(tl.float32) + tl.where(diagonal & unit, 1.0, 0.0), unit, v0, columns


@triton.jit
def end_is_read(part, segment, segments, DV, BV: tl.constexpr):
    """Nothing needs the end of the last segment, nor M of the first."""
    return (segment < segments - 1) & ((segment > 0) | (part < tl.cdiv(DV, BV)))


@triton.jit
def store_end(ends, index, state, unit, v0, DK, DV, BK: tl.constexpr, BV: tl.constexpr):
    """N or M into ends [segments of all sequences, H, Dk, Dv + Dk]."""
    width = DV + DK
    to = ends + index * DK * width
    store_columns(to, state, 0, width, DK, tl.where(unit, DV, 0) + v0, tl.where(unit, width, DV), BK, BV)


@triton.jit(do_not_specialize=COUNTS)
def _ends(
    k, v, matrices, gates, start, ends, cuts, T, N, LENGTH, SEGMENTS, H, K, DK, DV,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, PACKED: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(DV, BV) + tl.cdiv(DK, BV)
    pid = tl.program_id(0).to(tl.int64)
    index, part = pid // parts, (pid % parts).to(tl.int32)
    h, row, origin, tokens, at, count, segment, segments = segment_at(index, cuts, T, N, SEGMENTS, H, PACKED)
    state, unit, v0, columns = end_start(start, row, segment, part, DK, DV, BK, BV)
    kp, vp = k + (origin * K + h // (H // K)) * DK, v + (origin * K + h // (H // K)) * DV
    read = end_is_read(part, segment, segments, DV, BV)
    first = (segment * LENGTH).to(tl.int32)
    last = tl.where(read, tl.minimum(first + LENGTH, count), first)
    first = last - remembered(gates, at + last - 1, -1, last - first, C)
    for n in tl.range(first, last, num_stages=STAGES):
        into, fade, rate, keep = load_gates(gates + (at + n) * 4 * C, C)
        _, state = _chunk(
            state, kp, vp, matrices + (at + n) * 2 * C * C, into, fade, rate, keep, n * C, v0, columns,
            tokens, K, DK, DV, C, BK, BV, DOT, PRECISION, READ,
        )  # fmt: skip
    if read:
        store_end(ends, index, state, unit, v0, DK, DV, BK, BV)


@triton.jit(do_not_specialize=COUNTS)
def _join(start, ends, starts, firsts, SEGMENTS, H, DK, DV, BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr):
    parts = tl.cdiv(DV, BV)
    pid = tl.program_id(0).to(tl.int64)
    row, v0 = pid // parts, (pid % parts).to(tl.int32) * BV
    b, h = row // H, row % H
    if PACKED:
        first = tl.load(firsts + b)
        segments = (tl.load(firsts + b + 1) - first).to(tl.int32)
    else:
        first, segments = b * SEGMENTS, SEGMENTS
    width, index = DV + DK, first * H + h
    state = load_rows(start + row * DK * DV, 0, DV, DK, v0, DV, BK, BV).to(tl.float32)
    store_rows(starts + index * DK * DV, state, 0, DV, DK, v0, DV, BK, BV)
    second = tl.where(segments > 1, DK, 0)  # its rows, if there is one
    state = load_rows(ends + index * DK * width, 0, width, second, v0, DV, BK, BV)
    store_rows(starts + (index + H) * DK * DV, state, 0, DV, second, v0, DV, BK, BV)
    for s in tl.range(1, segments - 1, num_stages=2):
        index = (first + s) * H + h
        at = ends + index * DK * width
        moved = dot(load_rows(at, 0, width, DK, DV, width, BK, BK), state, tl.float32, "tf32x3")
        state = moved + load_rows(at, 0, width, DK, v0, DV, BK, BV)
        store_rows(starts + (index + H) * DK * DV, state, 0, DV, DK, v0, DV, BK, BV)


@triton.jit(do_not_specialize=COUNTS)
def _walk(
    q, k, v, matrices, gates, starts, states, fresh, final, out, cuts, scale,
    T, N, LENGTH, SEGMENTS, H, K, DK, DV,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, PACKED: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(DV, BV)
    pid = tl.program_id(0).to(tl.int64)
    index, v0 = pid // parts, (pid % parts).to(tl.int32) * BV
    h, row, origin, tokens, at_start, count, segment, segments = segment_at(index, cuts, T, N, SEGMENTS, H, PACKED)
    kp, vp = k + (origin * K + h // (H // K)) * DK, v + (origin * K + h // (H // K)) * DV
    qp, op = q + (origin * H + h) * DK, out + (origin * H + h) * DV
    state = load_columns(starts + index * DK * DV, 0, DV, DK, v0, DV, BK, BV).to(tl.float32)
    first = (segment * LENGTH).to(tl.int32)
    for n in tl.range(first, tl.minimum(first + LENGTH, count), num_stages=STAGES):
        at, t0 = at_start + n, n * C
        inverse = matrices + at * 2 * C * C
        into, fade, rate, keep = load_gates(gates + at * 4 * C, C)
        if READ:
            queries = load_columns(qp, t0, H * DK, tokens, 0, DK, C, BK)
            read = dot(state, queries, DOT, PRECISION) * (into * scale)[None, :]
        else:
            store_columns(states + at * DK * DV, state, 0, DV, DK, v0, DV, BK, BV)
        new, state = _chunk(
            state, kp, vp, inverse, into, fade, rate, keep, t0, v0, DV, tokens, K, DK, DV,
            C, BK, BV, DOT, PRECISION, READ,
        )  # fmt: skip
        if READ:
            read += dot(new, load_columns(inverse + C * C, 0, C, C, 0, C, C, C), DOT, PRECISION)
            store_columns(op, read, t0, H * DV, tokens, v0, DV, C, BV)
        else:
            store_columns(fresh + at * C * DV, new, 0, DV, C, v0, DV, C, BV)
    if segment == segments - 1:
        store_columns(final + row * DK * DV, state, 0, DV, DK, v0, DV, BK, BV)


@dataclass(frozen=True)
class Cut:
    """How a walk is laid out: segments of the sequence, value columns of a program, tiles loaded ahead, warps."""

    segments: int
    columns: int
    stages: int
    warps: int = 4


def least_cut(s: Setting) -> int:
    """From how many chunks every walk over a sequence is cut, if it has few heads for the card's processors."""
    return SHORTEST * WORTH * max(2, s.read_programs)


def cut_for_states(chunks: int, rows: int, value_dim: int, s: Setting, device: torch.device) -> Cut:
    """Of the walk that stores states: as many programs as the card runs at once, where there are enough chunks to cut;
    as measured on an H200."""
    segments = _segments(chunks, rows * cdiv(value_dim, s.value_block), 2, s, device)
    stages = 3 if s.dot == tl.bfloat16 and s.key_block <= 64 else s.stages
    return Cut(segments, s.value_block, stages, s.warps)


def cut_to_read(chunks: int, rows: int, value_dim: int, s: Setting, device: torch.device) -> Cut:
    """Of the walk that reads the outputs, and of the walk back, which has as much to load."""
    segments = _segments(chunks, rows * cdiv(value_dim, s.read_columns), s.read_programs, s, device)
    return Cut(segments, s.read_columns, s.read_stages, s.read_warps)


def _segments(chunks: int, programs: int, at_once: int, s: Setting, device: torch.device) -> int:
    """programs: of a walk that is not cut."""
    if s.key_block > 128:
        return 1
    segments = min(MOST, chunks // SHORTEST, at_once * processors(device) // programs)
    return segments if segments >= at_once * WORTH else 1


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class Join:
    """The true start of every segment [segments, H, Dk, Dv], from those of all sequences [B, H, Dk, Dv].

    ends [segments, H, Dk, Dv + Dk]: N, then M, which takes a segment's start S to its end M S + N; of a sequence's last
    segment nothing, of its first the true end in the place of N.
    """

    def __init__(self, x: Sizes, layout: Layout, cuts: Cuts, s: Setting) -> None:
        self._firsts, packed = cuts.firsts, cuts.firsts is not None
        self._starts = (cuts.total, x.heads, x.key_dim, x.value_dim)
        programs = layout.sequences * x.heads * cdiv(x.value_dim, 16)
        blocks = dict(BK=s.key_block, BV=16, PACKED=packed, num_warps=4)
        self._launch = Launch(_join, programs, cuts.each, x.heads, x.key_dim, x.value_dim, **blocks)

    def __call__(self, state: Tensor, ends: Tensor) -> Tensor:
        starts = state.new_empty(self._starts)
        self._launch(state, ends, starts, state if self._firsts is None else self._firsts)
        return starts


class CutWalk:
    """The launches of a walk, from the first chunk on or from the last, for one size.

    ends and walk: kernels 1 and 3, which take the table of segments behind all other tensors; numbers: those that
    `walk` takes before the sizes.
    """

    def __init__(
        self, x: Sizes, layout: Layout, s: Setting, cut: Cut, ends: Any, walk: Any, *numbers: float, **options: Any
    ) -> None:
        cuts = layout.cuts(cut.segments)
        sizes = (layout.tokens, layout.chunks, cuts.length, cuts.each, x.heads, x.kv_heads, x.key_dim, x.value_dim)
        options |= dict(C=CHUNK, BK=s.key_block, BV=cut.columns, DOT=s.dot, PRECISION=s.precision)
        options |= dict(STAGES=cut.stages, PACKED=layout.packed, num_warps=cut.warps)
        segments, parts = cuts.total * x.heads, cdiv(x.value_dim, cut.columns)
        self._cuts, self._end_sizes = cuts, (cuts.total, x.heads, x.key_dim, x.value_dim + x.key_dim)
        self._walk = Launch(walk, segments * parts, *numbers, *sizes, **options)
        self._before: tuple[Launch, Join] | None = None  # where a sequence is cut
        if cuts.total > layout.sequences:
            programs = segments * (parts + cdiv(x.key_dim, cut.columns))
            self._before = Launch(ends, programs, *sizes, **options), Join(x, layout, cuts, s)

    def starts(self, state: Tensor, *read: Tensor) -> Tensor:
        """The true start of every segment, [segments, H, Dk, Dv]; `state` where no sequence is cut."""
        if self._before is None:
            return state
        launch, join = self._before
        ends = state.new_empty(self._end_sizes)
        launch(*read, state, ends, self._cuts.given(read[0]))
        return join(state, ends)

    def walk(self, *tensors: Tensor) -> None:
        self._walk(*tensors, self._cuts.given(tensors[0]))


class Walk:
    """The walk of the forward, for one size.

    read: it reads the outputs; else it stores the states before each chunk, and V'. What it does not fill it never
    touches, so that any tensor may stand for that.
    """

    def __init__(self, x: Sizes, layout: Layout, s: Setting, scale: float = 1.0, *, read: bool) -> None:
        choose = cut_to_read if read else cut_for_states
        cut = choose(layout.longest, layout.whole_rows, x.value_dim, s, layout.device)
        self._launches, self._kept = CutWalk(x, layout, s, cut, _ends, _walk, scale, READ=read), s.kept
        self._states = (layout.rows, layout.chunks, x.key_dim, x.value_dim)
        self._fresh = (layout.rows, layout.chunks, CHUNK, x.value_dim)

    def states(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, solved: Solved) -> tuple[Tensor, Tensor]:
        """States before each chunk [rows, N, Dk, Dv], V' [rows, N, C, Dv]."""
        states, fresh = (k.new_empty(size, dtype=self._kept) for size in (self._states, self._fresh))
        self._run(q, k, v, state, solved, states, fresh, states)
        return states, fresh

    def outputs(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, solved: Solved, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Outputs [B, T, H, Dv] in dtype, and the final state [B, H, Dk, Dv]."""
        out = q.new_empty(*q.shape[:3], v.shape[3], dtype=dtype)
        return out, self._run(q, k, v, state, solved, out, out, out)

    def _run(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, solved: Solved, states: Tensor, fresh: Tensor, out: Tensor
    ) -> Tensor:
        starts = self._launches.starts(state, k, v, solved.matrices, solved.gates)
        final = torch.empty_like(state)
        self._launches.walk(q, k, v, solved.matrices, solved.gates, starts, states, fresh, final, out)
        return final
