"""The walk over chunks of the gated delta rule: the serial part of its forward, on Triton.

With W, U of `solve`, a chunk takes the state S before it to V' = U - W S and e^c_C S + K^T (e^(c_C - c) V'). That is
linear in S, so a long sequence with few heads is cut into segments that are walked at once:
1. ends: of every segment but the last its end N from a start of zero (the first: from the true one), and M, its end
   from a start of the unit matrix without values, so that it takes S to M S + N.
2. join: the true start of every segment, one after another.
3. walk: every segment from its true start. It reads the outputs, O = scale (e^c q) S + P V'; or, for a backward, it
   stores the states before each chunk, and V' in place of U.
One segment is the third launch alone. Sums and the state are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tcal_compiler.kernels.tiles import dot, load_columns, load_rows, store_rows

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
    k, w, u, fade, keep, starts, states, final, q, scores, into, out, scale, T, N, LENGTH, SEGMENTS, H, K, DK, DV,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, READ: tl.constexpr,
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
        at, t0 = row * N + n, n * C
        if READ:
            queries = load_rows(q + (b * T * H + h) * DK, t0, H * DK, T, 0, DK, C, BK)
            read = dot(queries, state, DOT, PRECISION) * (tl.load(into + at * C + tl.arange(0, C)) * scale)[:, None]
        else:
            store_rows(states + at * DK * DV, state, 0, DV, DK, v0, DV, BK, BV)
        new, state = _chunk(state, kp, w, u, fade, keep, at, t0, v0, DV, T, K, DK, DV, C, BK, BV, DOT, PRECISION)
        if READ:
            read += dot(load_rows(scores + at * C * C, 0, C, C, 0, C, C, C), new, DOT, PRECISION)
            store_rows(out + (b * T * H + h) * DV, read, t0, H * DV, T, v0, DV, C, BV)
        else:
            store_rows(u + at * C * DV, new, 0, DV, C, v0, DV, C, BV)
    if segment == SEGMENTS - 1:
        store_rows(final + row * DK * DV, state, 0, DV, DK, v0, DV, BK, BV)


@dataclass(frozen=True)
class Cut:
    """How a walk is laid out: segments of the sequence, value columns of a program, tiles loaded ahead."""

    segments: int
    columns: int
    stages: int


def cut_for(chunks: int, rows: int, value_dim: int, s: Setting, device: torch.device, *, wide: bool) -> Cut:
    """As many programs as the card runs at once, where there are enough chunks to cut; as measured on an H200.

    wide: the walk loads five tiles a chunk, not three, so that a processor's shared memory holds one program, not two.
    """
    columns, narrow = s.value_block, s.dot == tl.bfloat16
    stages = s.stages if narrow or not wide or s.key_block <= 64 else 1
    if device.type != "cuda" or s.key_block > 128:
        return Cut(1, columns, stages)
    at_once = 1 if wide else 2
    processors = _processors(device)
    programs = rows * triton.cdiv(value_dim, columns)
    segments = min(MOST, chunks // SHORTEST, at_once * processors // programs)
    if segments < at_once * WORTH:
        segments = 1
        if programs <= processors:
            columns = min(columns, 32)
    return Cut(segments, columns, 3 if narrow and (wide or s.key_block <= 64 or columns <= 32) else stages)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def join(state: Tensor, ends: Tensor, s: Setting) -> Tensor:
    """The true start of every segment [B H, segments, Dk, Dv], from that of the first and the ends of all but the last.

    ends [B H, segments - 1, Dk, Dv + Dk]: N, then M, which takes a segment's start S to its end M S + N.
    """
    rows, others, key_dim, width = ends.shape
    value_dim = width - key_dim
    starts = torch.empty(rows, others + 1, key_dim, value_dim, dtype=torch.float32, device=ends.device)
    grid = (rows * triton.cdiv(value_dim, 16),)
    _join[grid](state, ends, starts, others + 1, key_dim, value_dim, BK=s.key_block, BV=16, num_warps=4)
    return starts


@dataclass(frozen=True)
class Walk:
    """A walk over the chunks of all sequences: its data and its launches."""

    k: Tensor  # [B, T, K, Dk]
    solved: Solved
    state: Tensor  # [B, H, Dk, Dv], before the first chunk
    s: Setting
    cut: Cut

    def run(self, states: Tensor, q: Tensor, out: Tensor, scale: float, *, read: bool) -> Tensor:
        """The final state [B, H, Dk, Dv].

        read: fills out [B, T, H, Dv]; else states [B H, N, Dk, Dv], before each chunk, and V' in place of U. What
        is not filled is never touched, so that any tensor may stand for it.
        """
        rows, chunks, _, value_dim = self.solved.u.shape
        heads = self.state.shape[1]
        length = triton.cdiv(chunks, self.cut.segments)
        segments = triton.cdiv(chunks, length)
        sizes = (self.k.shape[1], chunks, length, segments, heads, *self.k.shape[2:], value_dim)
        starts = self.state if segments == 1 else self._starts(sizes)
        final = torch.empty_like(self.state)
        x = self.solved
        grid = (rows * segments * triton.cdiv(value_dim, self.cut.columns),)
        _walk[grid](
            self.k, x.w, x.u, x.fade, x.keep, starts, states, final, q, x.scores, x.into, out, scale, *sizes,
            READ=read, **self._blocks(),
        )  # fmt: skip
        return final

    def _starts(self, sizes: tuple[int, ...]) -> Tensor:
        """The true start of every segment, [B H, segments, Dk, Dv]."""
        x, segments, (key_dim, value_dim) = self.solved, sizes[3], sizes[-2:]
        rows, columns = x.u.shape[0], self.cut.columns
        ends = torch.empty(rows, segments - 1, key_dim, value_dim + key_dim, dtype=torch.float32, device=x.u.device)
        grid = (rows * (segments - 1) * (triton.cdiv(value_dim, columns) + triton.cdiv(key_dim, columns)),)
        stages = self.cut.stages if self.s.key_block <= 64 else self.s.stages  # two programs run at once
        blocks = self._blocks() | dict(STAGES=stages)
        _ends[grid](self.k, x.w, x.u, x.fade, x.keep, self.state, ends, *sizes, **blocks)
        return join(self.state, ends, self.s)

    def _blocks(self) -> dict[str, Any]:
        blocks = dict(C=CHUNK, BK=self.s.key_block, BV=self.cut.columns, DOT=self.s.dot, PRECISION=self.s.precision)
        return blocks | dict(STAGES=self.cut.stages, num_warps=self.s.warps)


def walk_states(k: Tensor, solved: Solved, state: Tensor, s: Setting) -> tuple[Tensor, Tensor]:
    """States before each chunk [B H, N, Dk, Dv], and the final one; V' is then in solved.u."""
    rows, chunks, _, value_dim = solved.u.shape
    states = torch.empty(rows, chunks, state.shape[2], value_dim, dtype=s.kept, device=k.device)
    cut = cut_for(chunks, rows, value_dim, s, k.device, wide=False)
    return states, Walk(k, solved, state, s, cut).run(states, k, states, 1.0, read=False)


def walk_outputs(
    q: Tensor, k: Tensor, solved: Solved, state: Tensor, s: Setting, *, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, Dv] in dtype, and the final state."""
    rows, chunks, _, value_dim = solved.u.shape
    out = torch.empty(*q.shape[:3], value_dim, dtype=dtype, device=q.device)
    cut = cut_for(chunks, rows, value_dim, s, k.device, wide=True)
    return out, Walk(k, solved, state, s, cut).run(out, q, out, scale, read=True)
