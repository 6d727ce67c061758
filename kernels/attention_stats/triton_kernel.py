"""Triton kernel of the attention statistics: flash attention whose loop also sums what the statistics need.

A program takes BM query rows of a head and walks over tiles of BN keys, from the diagonal away. Per row it keeps the
largest score so far (`top`, base 2), and sums that are rescaled when that grows: of the weights p = 2^(score - top), of
p log2 p for the entropy, of p times distance, and of p v.

Row mass by distance octave costs little, because most tiles lie in one octave: their row sums are collected in
`pending`. Only tiles that cross an octave's border, the diagonal or the window's edge (`edge`) are masked and summed
bin by bin; `bins` [BM, 32] is rescaled there alone, so it has a reference `base` of its own.

With M = m0 / BN and c = 2^i, the tiles M - 1 - c down to M + BM / BN - 2 c have all distances in [c BN, 2 c BN).

Reads q, k, v (and o) and writes ctx (or nothing) once from the view of a program, and 22 (or 3 + 2 Dv) sums a program;
4 T^2 / 2 (Dk + Dv) / 2 operations a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tcal_compiler.kernels.scores import Scores
from tcal_compiler.kernels.tiles import dot, load_columns, load_rows, store_rows

from .reference import EPS, OCTAVES

LOG2_E = tl.constexpr(1.4426950408889634)
HIDDEN = tl.constexpr(-1e30)  # a masked score: its weight is 0 even beside
NOTHING = tl.constexpr(-1e20)  # the top of a row that has seen no key yet
MAX_BINS = tl.constexpr(32)


@triton.jit
def _soften(scores, top, total, entropy):
    """Weights p and the row sums rescaled to the new top."""
    new = tl.maximum(top, tl.max(scores, 1))
    shrink = tl.exp2(top - new)
    power = scores - new[:, None]
    p = tl.exp2(power)
    entropy = shrink * (entropy + total * (top - new)) + tl.sum(p * power, 1)
    mass = tl.sum(p, 1)
    return p, mass, shrink, new, total * shrink + mass, entropy


@triton.jit
def _add_bin(bins, base, top, index, mass):
    """bins [BM, 32] rescaled from base to top, and mass [BM] added to one of them."""
    column = tl.arange(0, MAX_BINS)
    return bins * tl.exp2(base - top)[:, None] + tl.where(column[None, :] == index, mass[:, None], 0.0)


@triton.jit
def _bit_length(x):
    return tl.sum(((x >> tl.arange(0, 32)) > 0).to(tl.int32), 0)


@triton.jit
def _scores(queries, kp, n0, kt, T, DK, scale, BN: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    return dot(queries, load_columns(kp, n0, kt, T, 0, DK, BN, BK), DOT, PRECISION) * (scale * LOG2_E)


@triton.jit
def _add_octaves(bins, base, top, p, far, nearest, furthest, OCT: tl.constexpr):
    """The weights p [BM, BN] added to the bins of their distances `far`, which lie in nearest..furthest."""
    column = tl.arange(0, MAX_BINS)[None, :]
    bins = bins * tl.exp2(base - top)[:, None]
    for i in range(_bit_length(nearest), _bit_length(furthest) + 1):
        here = (far < (1 << i)) & (far >= ((1 << i) >> 1))
        mass = tl.sum(tl.where(here, p, 0.0), 1)
        bins += tl.where(column == tl.minimum(i, OCT - 1), mass[:, None], 0.0)
    return bins


@triton.jit
def _store_statistics(at, distance, nats, mass, OCT: tl.constexpr):
    """Sums over a program's rows: distance [BM], entropy [BM], mass by octave [BM, 32]."""
    column = tl.arange(0, MAX_BINS)
    tl.store(at, tl.sum(distance, 0))
    tl.store(at + 1, tl.sum(nats, 0))
    tl.store(at + 2 + column, tl.sum(mass, 0), mask=column < OCT)


@triton.jit
def _store_output_sums(at_head, at_channel, context, out, valid, eps, DV, BV: tl.constexpr):
    rms = tl.sqrt(tl.sum(out * out, 1) / DV + eps)
    unit = out / rms[:, None]
    tl.store(at_head, tl.sum(tl.sum(context * out, 1), 0))
    tl.store(at_head + 1, tl.sum(tl.sum(out * out, 1), 0))
    tl.store(at_head + 2, tl.sum(tl.where(valid, rms, 0.0), 0))
    channel = tl.arange(0, BV)
    tl.store(at_channel + channel, tl.sum(context * unit, 0), mask=channel < DV)
    tl.store(at_channel + DV + channel, tl.sum(unit * unit, 0), mask=channel < DV)


@triton.jit
def _tiles_of_octave(s, j, M, first, whole, SEGMENTS, RATIO: tl.constexpr):
    """From tile j on: how many tiles to mask, then how many that lie in octave FIRST + s. At last, all that is left."""
    upper = M - 1 - (1 << s)
    pure = tl.maximum(upper - tl.maximum(M + RATIO - (2 << s), whole) + 1, 0)
    edge = tl.where(pure > 0, j - upper, 0)
    return tl.where(s == SEGMENTS, j - first + 1, edge), tl.where(s == SEGMENTS, 0, pure)


@triton.jit
def _attention(
    q, k, v, o, context, row_sums, head_sums, channel_sums, scale, eps, T, H, K, DK, DV, WINDOW, BLOCKS, SEGMENTS,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, ot, oh,
    OCT: tl.constexpr, STATS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    FIRST: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    row, block = pid // BLOCKS, BLOCKS - 1 - pid % BLOCKS  # long rows first
    b, h = row // H, row % H
    m0 = (block * BM).to(tl.int32)
    t, M = m0 + tl.arange(0, BM), m0 // BN
    queries = load_rows(q + b * qb + h * qh, m0, qt, T, 0, DK, BM, BK)
    kp, vp = k + b * kb + h // (H // K) * kh, v + b * vb + h // (H // K) * vh
    top, base = tl.full((BM,), NOTHING, tl.float32), tl.full((BM,), NOTHING, tl.float32)
    total, entropy, distance = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    bins, acc = tl.zeros((BM, MAX_BINS), tl.float32), tl.zeros((BM, BV), tl.float32)
    offset = tl.arange(0, BN)
    first = tl.maximum(m0 - WINDOW + 1, 0) // BN  # the first tile of which any row sees a key
    whole = (tl.maximum(m0 + BM - WINDOW, 0) + BN - 1) // BN  # the first tile of which every row sees all keys
    j = tl.minimum(M + BM // BN, (T + BN - 1) // BN) - 1
    for s in range(SEGMENTS + 1):
        edge, pure = _tiles_of_octave(s, j, M, first, whole, SEGMENTS, BM // BN)
        for n in range(edge):
            n0 = (j - n) * BN
            far = t[:, None] - (n0 + offset)[None, :]
            scores = _scores(queries, kp, n0, kt, T, DK, scale, BN, BK, DOT, PRECISION)
            scores = tl.where((far >= 0) & (far < WINDOW), scores, HIDDEN)
            p, _, shrink, top, total, entropy = _soften(scores, top, total, entropy)
            if STATS:
                distance = distance * shrink + tl.sum(p * tl.where(far > 0, far.to(tl.float32), 0.5), 1)
                nearest = tl.maximum(m0 - n0 - BN + 1, 0)
                bins = _add_octaves(bins, base, top, p, far, nearest, m0 + BM - 1 - n0, OCT)
                base = top
            acc = acc * shrink[:, None] + dot(p, load_rows(vp, n0, vt, T, 0, DV, BN, BV), DOT, PRECISION)
        j -= edge
        pending = tl.zeros((BM,), tl.float32)
        for n in range(pure):
            n0 = (j - n) * BN
            scores = _scores(queries, kp, n0, kt, T, DK, scale, BN, BK, DOT, PRECISION)
            p, mass, shrink, top, total, entropy = _soften(scores, top, total, entropy)
            if STATS:
                pending, distance = pending * shrink + mass, distance * shrink + (t - n0).to(tl.float32) * mass
                distance -= tl.sum(p * offset.to(tl.float32)[None, :], 1)
            acc = acc * shrink[:, None] + dot(p, load_rows(vp, n0, vt, T, 0, DV, BN, BV), DOT, PRECISION)
        if STATS:
            bins = _add_bin(bins, base, top, tl.minimum(FIRST + s, OCT - 1), pending)
            base = top
        j -= pure
    valid = t < T
    total = tl.where(valid, total, 1.0)
    acc /= total[:, None]
    if STATS:
        store_rows(context + (b * T * H + h) * DV, acc, m0, H * DV, T, 0, DV, BM, BV)
        part = tl.where(valid, 1.0 / total, 0.0)
        nats = tl.where(valid, (tl.log2(total) - entropy / total) / LOG2_E, 0.0)
        mass = bins * (tl.exp2(base - top) * part)[:, None]
        _store_statistics(row_sums + pid * (2 + OCT), distance * part, nats, mass, OCT)
    else:
        out = load_rows(o + b * ob + h * oh, m0, ot, T, 0, DV, BM, BV).to(tl.float32)
        _store_output_sums(head_sums + pid * 3, channel_sums + pid * 2 * DV, acc, out, valid, eps, DV, BV)


@dataclass(frozen=True)
class Setting:
    """What the kernel is compiled for; BM is a multiple of BN, both powers of two."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int


# (largest head dim up to, operands of 4 bytes): shared memory holds the queries and `num_stages` tiles of keys, values.
# Tiles of 64 x 16 with eight warps access illegal memory when compiled by Triton 3.6 for Hopper (compute-sanitizer).
SETTINGS = {
    (64, False): Setting(128, 64, 8, 3),
    (128, False): Setting(128, 64, 8, 3),
    (256, False): Setting(128, 32, 8, 2),
    (64, True): Setting(128, 32, 8, 2),
    (128, True): Setting(64, 32, 4, 2),
    (256, True): Setting(64, 16, 4, 2),
}


def _launch(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor | None, *, scores: Scores, setting: Setting | None
) -> tuple[Tensor, ...]:
    """ctx and row sums without o; head sums and channel sums with it. Sums [B, H, programs, ...] in float32."""
    assert scores.plain, "the kernel knows scale and window only"
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, tokens, key_dim = q.shape
    kv_heads, value_dim = v.shape[1], v.shape[3]
    dims = [max(16, triton.next_power_of_2(n)) for n in (key_dim, value_dim)]
    s = setting or SETTINGS[max(64, *dims), q.dtype == torch.float32]
    blocks = triton.cdiv(tokens, s.BM)
    segments = triton.cdiv(tokens, s.BN).bit_length()

    def empty(*size: int) -> Tensor:
        return torch.empty(batch, heads, blocks, *size, dtype=torch.float32, device=q.device)

    if o is None:
        context = torch.empty(batch, tokens, heads, value_dim, dtype=v.dtype, device=q.device)
        results = (context, empty(2 + OCTAVES))
        buffers = (q, *results, q, q)
        ob = ot = oh = 0
    else:
        o = o if o.stride(-1) == 1 else o.contiguous()
        results = (empty(3), empty(2, value_dim))
        buffers = (o, q, q, *results)
        ob, ot, oh = o.stride()[:3]
    native = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    strides = [n for x in (q, k, v) for n in x.stride()[:3]]
    sizes = (tokens, heads, kv_heads, key_dim, value_dim, min(scores.window or tokens, tokens), blocks, segments)
    fixed: dict[str, Any] = dict(
        OCT=OCTAVES,
        STATS=o is None,
        BK=dims[0],
        BV=dims[1],
        FIRST=s.BN.bit_length(),
        DOT=native[q.dtype] if q.is_cuda else tl.float32,  # the interpreter multiplies the bits of bfloat16
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
        **vars(s),
    )
    _attention[(batch * heads * blocks,)](q, k, v, *buffers, scores.scale, EPS, *sizes, *strides, ob, ot, oh, **fixed)
    return results


def attention_statistics_triton(
    q: Tensor, k: Tensor, v: Tensor, *, scores: Scores, setting: Setting | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contract of `attention_statistics_reference`; float32, bfloat16, float16 with float32 sums of 128 rows."""
    context, sums = _launch(q, k, v, None, scores=scores, setting=setting)
    total = sums.sum((0, 2), dtype=torch.float64)
    return context, total[:, 0].clone(), total[:, 1].clone(), total[:, 2:].contiguous()


def attention_output_sums_triton(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, *, scores: Scores, setting: Setting | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Contract of `attention_output_sums_reference`; float32, bfloat16, float16 with float32 sums of 128 rows."""
    heads, channels = _launch(q, k, v, o, scores=scores, setting=setting)
    co, oo, rms = heads.sum((0, 2), dtype=torch.float64).unbind(1)
    cn, nn = channels.sum((0, 2), dtype=torch.float64).unbind(1)
    return co.clone(), oo.clone(), cn.contiguous(), nn.contiguous(), rms.clone()
