"""The walk over chunks of the gated delta rule: the serial part of its forward, on Triton.

With W, U of `solve`, a chunk takes the state S before it to V' = U - W S and e^c_C S + K^T (e^(c_C - c) V'). That is
linear in S, so a long sequence with few heads is cut into segments that are walked at once:
1. ends: of every segment but the last its end N from a start of zero (the first: from the true one), and M, its end
   from a start of the unit matrix without values, so that it takes S to M S + N.
2. join: the true start of every segment, one after another.
3. walk: every segment from its true start. It reads the outputs, O = scale (e^c q) S + P V'; or, for a backward, it
   stores the states before each chunk, and V' in place of U.
One segment is the third launch alone. Sums and the state are float32. Segments and packed sequences: `triton_layout`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tcal_compiler.kernels.launch import cdiv, launch
from tcal_compiler.kernels.tiles import dot, load_columns, load_rows, store_rows

from .triton_layout import COUNTS, Cuts, Layout, segment_at
from .triton_solve import Solved
from .triton_tiles import CHUNK, Setting

SHORTEST = 8  # chunks of a segment
MOST = 24  # segments
WORTH = 4  # from this many segments that run at once on one processor, cutting takes less time than not (H200)


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
def end_start(start, row, segment, part, DK, DV, BK: tl.constexpr, BV: tl.constexpr):
    """Where program `part` of a segment's ends starts: the state [BK, BV], whether its columns are of M, the first of
    them, and how many of the values' there are."""
    values = tl.cdiv(DV, BV)
    unit = part >= values
    v0 = tl.where(unit, part - values, part) * BV
    columns = tl.where(unit, 0, DV)
    known = load_rows(start + row * DK * DV, 0, DV, tl.where(segment == 0, DK, 0), v0, columns, BK, BV)
    diagonal = tl.arange(0, BK)[:, None] == (v0 + tl.arange(0, BV))[None, :]
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
    store_rows(to, state, 0, width, DK, tl.where(unit, DV, 0) + v0, tl.where(unit, width, DV), BK, BV)


@triton.jit(do_not_specialize=COUNTS)
def _ends(
    k, w, u, fade, keep, start, ends, cuts, T, N, LENGTH, SEGMENTS, H, K, DK, DV,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(DV, BV) + tl.cdiv(DK, BV)
    pid = tl.program_id(0).to(tl.int64)
    index, part = pid // parts, (pid % parts).to(tl.int32)
    h, row, origin, tokens, at, count, segment, segments = segment_at(index, cuts, T, N, SEGMENTS, H, PACKED)
    state, unit, v0, columns = end_start(start, row, segment, part, DK, DV, BK, BV)
    kp = k + (origin * K + h // (H // K)) * DK
    read = end_is_read(part, segment, segments, DV, BV)
    first = (segment * LENGTH).to(tl.int32)
    last = tl.where(read, tl.minimum(first + LENGTH, count), first)
    for n in tl.range(first, last, num_stages=STAGES):
        _, state = _chunk(
            state, kp, w, u, fade, keep, at + n, n * C, v0, columns, tokens, K, DK, DV, C, BK, BV, DOT, PRECISION
        )
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
    k, w, u, fade, keep, starts, states, final, q, scores, into, out, cuts, scale, T, N, LENGTH, SEGMENTS, H, K, DK, DV,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, PACKED: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(DV, BV)
    pid = tl.program_id(0).to(tl.int64)
    index, v0 = pid // parts, (pid % parts).to(tl.int32) * BV
    h, row, origin, tokens, at_start, count, segment, segments = segment_at(index, cuts, T, N, SEGMENTS, H, PACKED)
    kp = k + (origin * K + h // (H // K)) * DK
    qp, op = q + (origin * H + h) * DK, out + (origin * H + h) * DV
    state = load_rows(starts + index * DK * DV, 0, DV, DK, v0, DV, BK, BV).to(tl.float32)
    first = (segment * LENGTH).to(tl.int32)
    for n in tl.range(first, tl.minimum(first + LENGTH, count), num_stages=STAGES):
        at, t0 = at_start + n, n * C
        if READ:
            queries = load_rows(qp, t0, H * DK, tokens, 0, DK, C, BK)
            read = dot(queries, state, DOT, PRECISION) * (tl.load(into + at * C + tl.arange(0, C)) * scale)[:, None]
        else:
            store_rows(states + at * DK * DV, state, 0, DV, DK, v0, DV, BK, BV)
        new, state = _chunk(state, kp, w, u, fade, keep, at, t0, v0, DV, tokens, K, DK, DV, C, BK, BV, DOT, PRECISION)
        if READ:
            read += dot(load_rows(scores + at * C * C, 0, C, C, 0, C, C, C), new, DOT, PRECISION)
            store_rows(op, read, t0, H * DV, tokens, v0, DV, C, BV)
        else:
            store_rows(u + at * C * DV, new, 0, DV, C, v0, DV, C, BV)
    if segment == segments - 1:
        store_rows(final + row * DK * DV, state, 0, DV, DK, v0, DV, BK, BV)


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


def cut_to_read(chunks: int, rows: int, value_dim: int, s: Setting, device: torch.device) -> Cut:
    """As `cut_for`, of the walk that reads the outputs, whose fields are its own."""
    if s.key_block > 128:
        return Cut(1, s.read_columns, s.read_stages, s.read_warps)
    segments, columns = _cut(chunks, rows, value_dim, s.read_columns, s.read_programs, device)
    warps = s.read_warps if columns == s.read_columns else min(s.read_warps, s.warps)
    return Cut(segments, columns, s.read_stages, warps)


def cut_for(chunks: int, rows: int, value_dim: int, s: Setting, device: torch.device, *, wide: bool) -> Cut:
    """As many programs as the card runs at once, where there are enough chunks to cut; as measured on an H200.

    wide: the walk back loads five tiles a chunk, not three, so that a processor's shared memory holds one program, not
    two.
    """
    narrow = s.dot == tl.bfloat16
    stages = s.stages if narrow or not wide or s.key_block <= 64 else 1
    if s.key_block > 128:
        return Cut(1, s.value_block, stages, s.warps)
    segments, columns = _cut(chunks, rows, value_dim, s.value_block, 1 if wide else 2, device)
    stages = 3 if narrow and (wide or s.key_block <= 64 or columns <= 32) else stages
    return Cut(segments, columns, stages, s.warps)


def _cut(chunks: int, rows: int, value_dim: int, columns: int, at_once: int, device: torch.device) -> tuple[int, int]:
    """Segments and columns. Without segments, fewer columns while the programs do not fill the card."""
    count = processors(device)
    segments = min(MOST, chunks // SHORTEST, at_once * count // (rows * cdiv(value_dim, columns)))
    if segments >= at_once * WORTH:
        return segments, columns
    while columns > 32 and rows * cdiv(value_dim, columns) <= count:
        columns //= 2
    return 1, columns


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def join(state: Tensor, ends: Tensor, cuts: Cuts, s: Setting) -> Tensor:
    """The true start of every segment [segments, H, Dk, Dv], from those of all sequences [B, H, Dk, Dv].

    ends [segments, H, Dk, Dv + Dk]: N, then M, which takes a segment's start S to its end M S + N; of a sequence's last
    segment nothing, of its first the true end in the place of N.
    """
    batch, heads, key_dim, value_dim = state.shape
    starts = state.new_empty(cuts.total, *state.shape[1:])
    programs = batch * heads * cdiv(value_dim, 16)
    sizes = (cuts.each, heads, key_dim, value_dim)
    packed = cuts.firsts is not None
    firsts = cuts.firsts if packed else state
    blocks = dict(BK=s.key_block, BV=16, PACKED=packed, num_warps=4)
    launch(_join, programs, state, ends, starts, firsts, *sizes, **blocks)
    return starts


@dataclass(frozen=True)
class Walk:
    """A walk over the chunks of all sequences: its data and its launches."""

    k: Tensor  # [B, T, K, Dk]
    solved: Solved
    state: Tensor  # [B, H, Dk, Dv], before the first chunk
    layout: Layout
    s: Setting
    cut: Cut

    def run(self, states: Tensor, q: Tensor, out: Tensor, scale: float, *, read: bool) -> Tensor:
        """The final state [B, H, Dk, Dv].

        read: fills out [B, T, H, Dv]; else states [rows, N, Dk, Dv], before each chunk, and V' in place of U. What
        is not filled is never touched, so that any tensor may stand for it.
        """
        value_dim = self.solved.u.shape[3]
        lay, cuts = self.layout, self.layout.cuts(self.cut.segments)
        sizes = (lay.tokens, lay.chunks, cuts.length, cuts.each, lay.heads, *self.k.shape[2:], value_dim)
        starts = self.state if cuts.total == lay.sequences else self._starts(cuts, sizes)
        final = torch.empty_like(self.state)
        x = self.solved
        programs = cuts.total * lay.heads * cdiv(value_dim, self.cut.columns)
        launch(
            _walk, programs, self.k, x.w, x.u, x.fade, x.keep, starts, states, final, q, x.scores, x.into, out,
            cuts.given(self.k), scale, *sizes, READ=read, **self._blocks(),
        )  # fmt: skip
        return final

    def _starts(self, cuts: Cuts, sizes: tuple[int, ...]) -> Tensor:
        """The true start of every segment, [segments, H, Dk, Dv]."""
        x, (key_dim, value_dim), columns = self.solved, sizes[-2:], self.cut.columns
        ends = self.state.new_empty(cuts.total, self.layout.heads, key_dim, value_dim + key_dim)
        programs = cuts.total * self.layout.heads * (cdiv(value_dim, columns) + cdiv(key_dim, columns))
        stages = self.cut.stages if self.s.key_block <= 64 else self.s.stages  # two programs run at once
        blocks = self._blocks() | dict(STAGES=stages)
        read = (self.k, x.w, x.u, x.fade, x.keep, self.state)
        launch(_ends, programs, *read, ends, cuts.given(self.k), *sizes, **blocks)
        return join(self.state, ends, cuts, self.s)

    def _blocks(self) -> dict[str, Any]:
        blocks = dict(C=CHUNK, BK=self.s.key_block, BV=self.cut.columns, DOT=self.s.dot, PRECISION=self.s.precision)
        return blocks | dict(STAGES=self.cut.stages, PACKED=self.layout.packed, num_warps=self.cut.warps)


def walk_states(k: Tensor, solved: Solved, state: Tensor, layout: Layout, s: Setting) -> tuple[Tensor, Tensor]:
    """States before each chunk [rows, N, Dk, Dv], and the final one; V' is then in solved.u."""
    rows, chunks, _, value_dim = solved.u.shape
    states = torch.empty(rows, chunks, state.shape[2], value_dim, dtype=s.kept, device=k.device)
    cut = cut_for(layout.longest, layout.whole_rows, value_dim, s, k.device, wide=False)
    return states, Walk(k, solved, state, layout, s, cut).run(states, k, states, 1.0, read=False)


def walk_outputs(
    q: Tensor, k: Tensor, solved: Solved, state: Tensor, layout: Layout, s: Setting, *, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, Dv] in dtype, and the final state."""
    value_dim = solved.u.shape[3]
    out = torch.empty(*q.shape[:3], value_dim, dtype=dtype, device=q.device)
    cut = cut_to_read(layout.longest, layout.whole_rows, value_dim, s, k.device)
    return out, Walk(k, solved, state, layout, s, cut).run(out, q, out, scale, read=True)
