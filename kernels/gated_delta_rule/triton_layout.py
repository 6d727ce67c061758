"""How the tokens of a call lie in sequences, these in chunks, and those in segments: on the host and in the kernels.

What a chunk gives by itself lies in tensors [rows, N, ...]. A batch has B H rows, of the N chunks of one sequence.
Packed sequences (`packed`) have H rows, of the N chunks of all of them: a chunk belongs to one sequence, so that the
last one of a sequence may be short. Segments are runs of chunks of one sequence; what belongs to a segment lies in
[segments of all sequences, H, ...]. Kernels count tokens from the first one of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from tcal_compiler.kernels.launch import cdiv

from .triton_tiles import CHUNK, Sizes

COLUMNS = tl.constexpr(7)  # of the table of segments
# Arguments whose value kernels are not compiled for, so that one call's kernels serve for all lengths and heads.
COUNTS = ("T", "N", "LENGTH", "SEGMENTS", "H", "K", "parts", "count")


@triton.jit
def chunk_at(pid, chunks, T, N, H, C: tl.constexpr, PACKED: tl.constexpr):
    """Head, first token and end of the sequence's tokens, of chunk `pid` of [rows, N]."""
    row, n = pid // N, pid % N
    if PACKED:
        start, end = tl.load(chunks + 2 * n), tl.load(chunks + 2 * n + 1)
    else:
        start = row // H * T + n * C
        end = row // H * T + T
    return row % H, start, end


@triton.jit
def segment_at(index, cuts, T, N, SEGMENTS, H, PACKED: tl.constexpr):
    """Of place `index` of [segments of all sequences, H]: head; row of the state, of [sequences, H]; the sequence's
    first token, tokens, first place in [rows, N] and chunks; this segment's number in it, its number of segments.
    """
    piece, h = index // H, index % H
    if PACKED:
        cut = cuts + piece * COLUMNS
        b, origin, tokens = tl.load(cut), tl.load(cut + 1), tl.load(cut + 2)
        at, count = h * N + tl.load(cut + 3), tl.load(cut + 4).to(tl.int32)
        segment, segments = tl.load(cut + 5), tl.load(cut + 6)
    else:
        b, segment = piece // SEGMENTS, piece % SEGMENTS
        origin, tokens, segments = b * T, T, SEGMENTS
        at, count = (b * H + h) * N, N
    return h, b * H + h, origin, tokens, at, count, segment, segments


@dataclass(frozen=True)
class Cuts:
    """Segments of at most `length` chunks."""

    length: int
    each: int  # of every sequence of a batch
    total: int  # of all sequences
    table: Tensor | None  # [total, COLUMNS], only packed
    firsts: Tensor | None  # [sequences + 1]: the number of each one's first segment, only packed

    def given(self, other: Tensor) -> Tensor:
        """What kernels are given as the table: `other`, which they do not touch, where there is none."""
        return other if self.table is None else self.table


@dataclass(frozen=True)
class Layout:
    """One call's tokens."""

    sequences: int
    tokens: int  # of every sequence of a batch; packed, of all
    heads: int
    rows: int
    chunks: int  # N
    longest: int  # chunks of the longest sequence
    bounds: tuple[int, ...] | None  # of packed sequences
    device: torch.device
    table: Tensor | None  # [N, 2], only packed: a chunk's first token, and where its sequence ends

    @property
    def packed(self) -> bool:
        return self.bounds is not None

    def given(self, other: Tensor) -> Tensor:
        """As that of `Cuts`."""
        return other if self.table is None else self.table

    @property
    def whole_rows(self) -> int:
        """As many rows of the longest sequence have as many chunks."""
        return cdiv(self.rows * self.chunks, self.longest)

    def cuts(self, segments: int) -> Cuts:
        """The longest sequence in `segments` segments at most, the others in segments as long."""
        length = cdiv(self.longest, segments)
        if self.bounds is None:
            each = cdiv(self.longest, length)
            return Cuts(length, each, self.sequences * each, None, None)
        table, firsts = _segments(self.bounds, length, self.device)
        return Cuts(length, 0, len(table), table, firsts)


def layout_of(x: Sizes, bounds: tuple[int, ...] | None) -> Layout:
    if bounds is None:
        chunks = cdiv(x.tokens, CHUNK)
        return Layout(x.batch, x.tokens, x.heads, x.batch * x.heads, chunks, chunks, None, x.device, None)
    table, longest = _chunks(bounds, x.device)
    return Layout(len(bounds) - 1, x.tokens, x.heads, x.heads, len(table), longest, bounds, x.device, table)


@lru_cache(maxsize=16)  # a model's layers, forward and backward, ask for the same
def _chunks(bounds: tuple[int, ...], device: torch.device) -> tuple[Tensor, int]:
    rows = [(t, end) for start, end in pairwise(bounds) for t in range(start, end, CHUNK)]
    longest = max(cdiv(end - start, CHUNK) for start, end in pairwise(bounds))
    return torch.tensor(rows).to(device), longest


@lru_cache(maxsize=64)
def _segments(bounds: tuple[int, ...], length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Columns as `segment_at` reads them. A sequence of no tokens has one segment of no chunks."""
    rows: list[tuple[int, ...]] = []
    firsts, chunk = [0], 0
    for b, (start, end) in enumerate(pairwise(bounds)):
        count = cdiv(end - start, CHUNK)
        segments = max(1, cdiv(count, length))
        rows += [(b, start, end - start, chunk, count, s, segments) for s in range(segments)]
        firsts.append(len(rows))
        chunk += count
    return torch.tensor(rows).to(device), torch.tensor(firsts).to(device)
