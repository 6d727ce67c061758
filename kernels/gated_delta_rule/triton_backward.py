"""Triton backward of the gated delta rule: four steps after the forward's solve and walk are run again.

The names are those of `chunked_backward`; q is not scaled in memory, so `scale` is applied where q meets dO.
1. the walk back (`triton_walk_back`): dS behind each chunk, dR
2. pairs, all chunks: G = [dO; -dR] V'^T, masked and decayed, dv, the value part of dbeta, the pair part of dg
3. keys, all chunks, a part of Dk per program: dq, dk, and this part's share of dbeta and dg
4. gates: sums over the parts and along tokens give dg and dbeta
dk and dv are summed over the query heads of a group in PyTorch. No atomics: results are the same every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tcal_compiler.kernels.launch import Launch, cdiv, per_size
from tcal_compiler.kernels.self_check import takes_tf32
from tcal_compiler.kernels.tiles import dot, load_columns, load_gate, load_rows, store_gate, store_rows

from .triton_layout import COUNTS, Layout, chunk_at, layout_of
from .triton_solve import Solve
from .triton_tiles import (
    CHUNK,
    Setting,
    Sizes,
    as_kernels_take,
    decay_sums,
    exp32,
    pair_decay,
    setting_for,
    sizes_of,
)
from .triton_walk import Walk
from .triton_walk_back import WalkBack


@triton.jit(do_not_specialize=COUNTS)
def _pairs(
    q, k, v, g, beta, d_out, fresh, d_rows, pairs, dv, d_rate, d_total, chunks, scale, T, N, H, K, DK, DV,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
    GATE: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    h, t0, end = chunk_at(pid, chunks, T, N, H, C, PACKED)
    kv = h // (H // K)
    rate = load_gate(beta + h, t0, H, end, C)
    d_scores = tl.zeros((C, C), tl.float32)
    d_low = tl.zeros((C, C), tl.float32)
    by_value = tl.zeros((C,), tl.float32)
    for v0 in range(0, DV, BV):
        new_t = load_columns(fresh + pid * C * DV, 0, DV, C, v0, DV, C, BV)
        grad = load_rows(d_out + h * DV, t0, H * DV, end, v0, DV, C, BV)
        rows = load_rows(d_rows + pid * C * DV, 0, DV, C, v0, DV, C, BV).to(tl.float32)
        d_scores += dot(grad, new_t, DOT, PRECISION)
        d_low -= dot(rows, new_t, DOT, PRECISION)
        values = load_rows(v + kv * DV, t0, K * DV, end, v0, DV, C, BV)
        by_value += tl.sum(values.to(tl.float32) * rows, 1)
        store_rows(dv + h * DV, rows * rate[:, None], t0, H * DV, end, v0, DV, C, BV)
    store_gate(d_rate + pid * C, by_value, 0, 1, C, C)
    i = tl.arange(0, C)
    strict = i[:, None] > i[None, :]
    c, _ = decay_sums(load_gate(g + h, t0, H, end, C), GATE)
    decay = pair_decay(c, C)
    d_scores = d_scores * decay * scale
    d_low = tl.where(strict, d_low * decay, 0.0)
    store_rows(pairs + pid * 2 * C * C, d_scores, 0, C, C, 0, C, C, C)
    store_rows(pairs + (pid * 2 + 1) * C * C, d_low, 0, C, C, 0, C, C, C)
    keys_t = load_columns(k + kv * DK, t0, K * DK, end, 0, DK, C, BK)
    moved = d_scores * dot(load_rows(q + h * DK, t0, H * DK, end, 0, DK, C, BK), keys_t, DOT, PRECISION)
    low = dot(load_rows(k + kv * DK, t0, K * DK, end, 0, DK, C, BK), keys_t, DOT, PRECISION)
    moved = tl.where(strict, moved + d_low * low * rate[:, None], 0.0)  # L_tt = 1 whatever g is
    store_gate(d_total + pid * C, tl.sum(moved, 1) - tl.sum(moved, 0), 0, 1, C, C)


@triton.jit(do_not_specialize=COUNTS)
def _keys(
    q, k, g, beta, d_out, fresh, d_rows, states, d_states, pairs, dq, dk, d_rate, d_total, d_end, d_kept, chunks,
    scale, T, N, H, K, DK, DV, count,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
    GATE: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(DK, BK)
    pid = tl.program_id(0).to(tl.int64)
    at, part = pid // parts, pid % parts
    k0 = part.to(tl.int32) * BK
    h, t0, end = chunk_at(at, chunks, T, N, H, C, PACKED)
    kv = h // (H // K)
    c, last = decay_sums(load_gate(g + h, t0, H, end, C), GATE)
    into, leave = exp32(c), exp32(last - c)
    rate = load_gate(beta + h, t0, H, end, C)
    by_query = tl.zeros((C, BK), tl.float32)
    by_scaled = tl.zeros((C, BK), tl.float32)
    by_key = tl.zeros((C, BK), tl.float32)
    kept = tl.zeros((BV, BK), tl.float32)
    for v0 in range(0, DV, BV):
        state_t = load_columns(states + at * DK * DV, k0, DV, DK, v0, DV, BK, BV)
        d_state_t = load_columns(d_states + at * DK * DV, k0, DV, DK, v0, DV, BK, BV)
        grad = load_rows(d_out + h * DV, t0, H * DV, end, v0, DV, C, BV)
        rows = load_rows(d_rows + at * C * DV, 0, DV, C, v0, DV, C, BV)
        new = load_rows(fresh + at * C * DV, 0, DV, C, v0, DV, C, BV)
        by_query += dot(grad, state_t, DOT, PRECISION)
        by_scaled -= dot(rows, state_t, DOT, PRECISION)
        by_key += dot(new, d_state_t, DOT, PRECISION)
        kept += state_t.to(tl.float32) * d_state_t.to(tl.float32)
    queries = load_rows(q + h * DK, t0, H * DK, end, k0, DK, C, BK)
    keys = load_rows(k + kv * DK, t0, K * DK, end, k0, DK, C, BK)
    wide = keys.to(tl.float32)
    by_query *= (into * scale)[:, None]
    by_scaled *= into[:, None]
    by_key *= leave[:, None]
    total = tl.sum(by_query * queries.to(tl.float32) + by_scaled * wide * rate[:, None], 1)
    share = (part * count + at) * C  # of [parts, rows, N, C]; count = rows N
    store_gate(d_total + share, total, 0, 1, C, C)
    store_gate(d_end + share, tl.sum(by_key * wide, 1), 0, 1, C, C)
    tl.store(d_kept + part * count + at, tl.sum(tl.sum(kept, 1), 0) * exp32(last))
    scores = pairs + at * 2 * C * C
    by_query += dot(load_rows(scores, 0, C, C, 0, C, C, C), keys, DOT, PRECISION)
    by_scaled += dot(load_rows(scores + C * C, 0, C, C, 0, C, C, C), keys, DOT, PRECISION)
    by_key += dot(load_columns(scores, 0, C, C, 0, C, C, C), queries, DOT, PRECISION)
    scaled = wide * rate[:, None]
    by_key += dot(load_columns(scores + C * C, 0, C, C, 0, C, C, C), scaled, DOT, PRECISION)
    store_gate(d_rate + share, tl.sum(by_scaled * wide, 1), 0, 1, C, C)
    store_rows(dq + h * DK, by_query, t0, H * DK, end, k0, DK, C, BK)
    store_rows(dk + h * DK, by_key + by_scaled * rate[:, None], t0, H * DK, end, k0, DK, C, BK)


@triton.jit(do_not_specialize=COUNTS)
def _gates(
    by_value, by_pair, by_key, total, at_ends, kept, dg, dbeta, chunks, T, N, H, parts, count,
    C: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Sums over the parts of Dk. dg_t gathers the gradients of c_s for s >= t and what c_C takes at the chunk's end."""
    pid = tl.program_id(0).to(tl.int64)
    h, t0, end = chunk_at(pid, chunks, T, N, H, C, PACKED)
    rate = load_gate(by_value + pid * C, 0, 1, C, C)
    d_total = load_gate(by_pair + pid * C, 0, 1, C, C).to(GATE)
    at_end = tl.zeros((C,), GATE)
    whole = tl.zeros((C,), GATE)
    for part in range(parts):
        share = (part * count + pid) * C
        rate += load_gate(by_key + share, 0, 1, C, C)
        d_total += load_gate(total + share, 0, 1, C, C).to(GATE)
        at_end += load_gate(at_ends + share, 0, 1, C, C).to(GATE)
        whole += tl.load(kept + part * count + pid).to(GATE)
    later = tl.sum(d_total, 0) - tl.cumsum(d_total, 0) + d_total
    grad = later + whole + tl.cumsum(at_end, 0) - at_end
    store_gate(dg + h, grad.to(tl.float32), t0, H, end, C)
    store_gate(dbeta + h, rate, t0, H, end, C)


def _over_group(x: Tensor, like: Tensor) -> Tensor:
    """[B, T, H, D] -> [B, T, K, D]: the sum over the query heads that share a key/value head."""
    kv_heads = like.shape[2]
    return (x if x.shape[2] == kv_heads else x.unflatten(2, (kv_heads, -1)).sum(3)).to(like.dtype)


def gated_delta_rule_triton_backward(
    d_out: Tensor,
    d_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    *,
    scale: float,
    bounds: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Same contract as `gated_delta_rule_chunked_backward`; float32, bfloat16 and float16, not float64.

    bounds of packed sequences: as for `gated_delta_rule_triton`.
    """
    inputs = (q, k, v, g, beta, initial_state)
    tf32 = takes_tf32(q)
    q, k, v, g, beta, state = as_kernels_take(inputs)
    d_out, d_state = d_out.to(q.dtype).contiguous(), d_state.float().contiguous()
    solve, walk, walk_back, at_all_chunks = _launches(sizes_of(q, v), bounds, scale, tf32)
    solved = solve(q, k, g, beta)
    states, fresh = walk.states(q, k, v, state, solved)
    d_rows, d_states, d_start = walk_back(k, d_out, d_state, solved)
    del solved  # what follows needs the memory
    *firsts, dg, dbeta = at_all_chunks((q, k, v, g, beta, d_out), (states, fresh, d_rows, d_states))
    dq, dk, dv = (_over_group(x, like) for x, like in zip(firsts, inputs[:3], strict=True))
    return dq, dk, dv, dg.to(inputs[3].dtype), dbeta.to(inputs[4].dtype), d_start.to(inputs[5].dtype)


class AtAllChunks:
    """Steps 2 to 4, for one size: dq, dk, dv per query head, dg, dbeta."""

    def __init__(self, x: Sizes, layout: Layout, s: Setting, scale: float) -> None:
        count, parts = layout.rows * layout.chunks, cdiv(x.key_dim, s.key_part)
        sizes = (layout.tokens, layout.chunks, x.heads, x.kv_heads, x.key_dim, x.value_dim)
        types: dict[str, Any] = dict(C=CHUNK, GATE=s.gate, PACKED=layout.packed)
        products = types | dict(BV=s.pair_columns, DOT=s.dot, PRECISION=s.precision)
        products |= dict(num_warps=s.pair_warps, num_stages=s.stages)
        self._pairs = Launch(_pairs, count, scale, *sizes, BK=s.key_block, **products)
        self._keys = Launch(_keys, count * parts, scale, *sizes, count, BK=s.key_part, **products)
        self._gates = Launch(_gates, count, *sizes[:3], parts, count, num_warps=1, **types)
        self._layout, self._kept, self._one_head = layout, s.kept, x.heads == x.kv_heads
        self._chunks, self._parts = (layout.rows, layout.chunks), (parts, layout.rows, layout.chunks)

    def __call__(
        self, inputs: tuple[Tensor, ...], walked: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        q, k, v, g, beta, d_out = inputs
        states, fresh, d_rows, d_states = walked
        table = self._layout.given(q)

        def floats(*size: int) -> Tensor:
            return q.new_empty(size, dtype=torch.float32)

        def per_head(x: Tensor) -> Tensor:  # float32 where it is summed over a group afterwards
            return q.new_empty(*q.shape[:3], x.shape[3], dtype=x.dtype if self._one_head else torch.float32)

        dq, dk, dv = torch.empty_like(q), per_head(k), per_head(v)
        pairs = q.new_empty(*self._chunks, 2, CHUNK, CHUNK, dtype=self._kept)
        by_value, by_pair = (floats(*self._chunks, CHUNK) for _ in range(2))
        by_key, total, end = (floats(*self._parts, CHUNK) for _ in range(3))
        kept = floats(*self._parts)
        self._pairs(q, k, v, g, beta, d_out, fresh, d_rows, pairs, dv, by_value, by_pair, table)
        read = (q, k, g, beta, d_out, fresh, d_rows, states, d_states, pairs)
        self._keys(*read, dq, dk, by_key, total, end, kept, table)
        dg, dbeta = torch.empty_like(g), torch.empty_like(beta)
        self._gates(by_value, by_pair, by_key, total, end, kept, dg, dbeta, table)
        return dq, dk, dv, dg, dbeta


@per_size
def _launches(
    x: Sizes, bounds: tuple[int, ...] | None, scale: float, tf32: bool
) -> tuple[Solve, Walk, WalkBack, AtAllChunks]:
    s, layout = setting_for(x, tf32=tf32), layout_of(x, bounds)
    solve, walk = Solve(x, layout, s, scale, read=False), Walk(x, layout, s, read=False)
    return solve, walk, WalkBack(x, layout, s), AtAllChunks(x, layout, s, scale)
