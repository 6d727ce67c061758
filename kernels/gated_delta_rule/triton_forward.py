"""Triton forward of the gated delta rule: three launches; up to 16 tokens are one launch of the decode step.

The names are those of `chunked`. B batch, T tokens, H query heads, K key/value heads; N chunks of C = 64 tokens.
1. solve, all chunks at once: T = (I + B)^-1 * L.        Reads k, g, beta; writes T [B H, N, C, C].
2. walk, chunk after chunk, a part of Dv per program: V' [B H, N, C, Dv], S [B H, N, Dk, Dv] before each chunk, the
   final state. S stays in registers.
3. outputs, all chunks at once: O = scale ((q exp(c)) S + (q k^T * L) V').
Sums and the state are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tcal_compiler.kernels.gated_delta_step import MOST_TOKENS
from tcal_compiler.kernels.gated_delta_step.triton_kernel import gated_delta_step_triton
from tcal_compiler.kernels.tiles import dot, load_columns, load_gate, load_rows, store_rows

from .triton_tiles import CHUNK, Setting, as_kernels_take, decay_sums, exp32, pair_decay, setting_for


@triton.jit
def _inverse(low, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + low)^-1 for strictly lower [C, C]: blocks of 16 row by row, then blocks double.

    The inverse on 2b is X - X L X, where X inverts the blocks of b and L is what lies between them.
    """
    i = tl.arange(0, C)
    n: tl.constexpr = C // 16
    a, r = tl.arange(0, n), tl.arange(0, 16)
    same = a[:, None, None, None] == a[None, None, :, None]
    blocks = tl.sum(tl.where(same, tl.reshape(low, (n, 16, n, 16)), 0.0), 2)  # [n, 16, 16]: the diagonal blocks
    x = tl.where(r[None, :, None] == r[None, None, :], 1.0, 0.0) + tl.zeros((n, 16, 16), tl.float32)
    for t in tl.static_range(1, 16):
        row = tl.sum(tl.where(r[None, :, None] == t, blocks, 0.0), 1)  # [n, 16]: row t of low
        row = tl.sum(x * row[:, :, None], 1)  # that row times the rows found so far; later rows meet zeros
        x = tl.where(r[None, :, None] == t, x - row[:, None, :], x)
    x = tl.reshape(tl.where(same, x[:, :, None, :], 0.0), (C, C))
    for level in tl.static_range(4, 6):
        near = (i[:, None] >> (level + 1)) == (i[None, :] >> (level + 1))
        corner = tl.where(near & ((i[:, None] >> level) != (i[None, :] >> level)), low, 0.0)
        x -= tl.dot(tl.dot(x, corner, input_precision=PRECISION), x, input_precision=PRECISION)
    return x


@triton.jit
def _solve(
    k, g, beta, solve, T, N, H, K, DK,
    C: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    row, n = pid // N, pid % N
    b, h = row // H, row % H
    t0 = n * C
    i = tl.arange(0, C)
    kp = k + (b * T * K + h // (H // K)) * DK
    keys = load_rows(kp, t0, K * DK, T, 0, DK, C, BK)
    keys_t = load_columns(kp, t0, K * DK, T, 0, DK, C, BK)
    rate = load_gate(beta + b * T * H + h, t0, H, T, C)
    c, _ = decay_sums(g + b * T * H + h, t0, H, T, C, GATE)
    low = dot(keys, keys_t, DOT, PRECISION) * rate[:, None]
    low = tl.where(i[:, None] > i[None, :], low, 0.0)
    x = _inverse(low, C, PRECISION)
    x = x * pair_decay(c, C)
    store_rows(solve + pid * C * C, x, 0, C, C, 0, C, C, C)


@triton.jit
def _walk(
    k, v, g, beta, solve, start, fresh, states, final, T, N, H, K, DK, DV,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
    GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(DV, BV)
    pid = tl.program_id(0).to(tl.int64)
    row, v0 = pid // parts, (pid % parts).to(tl.int32) * BV
    b, h = row // H, row % H
    kv = b * T * K + h // (H // K)
    kp, vp = k + kv * DK, v + kv * DV
    gate = b * T * H + h
    state = load_rows(start + row * DK * DV, 0, DV, DK, v0, DV, BK, BV).to(tl.float32)
    for n in range(N):
        t0 = n * C
        at = row * N + n
        store_rows(states + at * DK * DV, state, 0, DV, DK, v0, DV, BK, BV)
        c, last = decay_sums(g + gate, t0, H, T, C, GATE)
        rate = load_gate(beta + gate, t0, H, T, C)
        keys = load_rows(kp, t0, K * DK, T, 0, DK, C, BK)
        values = load_rows(vp, t0, K * DV, T, v0, DV, C, BV).to(tl.float32)
        read = dot(keys, state, DOT, PRECISION)
        rows = values * rate[:, None] - read * (rate * exp32(c))[:, None]
        inverse = load_rows(solve + at * C * C, 0, C, C, 0, C, C, C)
        new = dot(inverse, rows, tl.float32, PRECISION)
        store_rows(fresh + at * C * DV, new, 0, DV, C, v0, DV, C, BV)
        keys_t = load_columns(kp, t0, K * DK, T, 0, DK, C, BK)
        state = state * exp32(last) + dot(keys_t, new * exp32(last - c)[:, None], DOT, PRECISION)
    store_rows(final + row * DK * DV, state, 0, DV, DK, v0, DV, BK, BV)


@triton.jit
def _outputs(
    q, k, g, fresh, states, out, scale, T, N, H, K, DK, DV,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
    GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    row, n = pid // N, pid % N
    b, h = row // H, row % H
    t0 = n * C
    queries = load_rows(q + (b * T * H + h) * DK, t0, H * DK, T, 0, DK, C, BK)
    keys_t = load_columns(k + (b * T * K + h // (H // K)) * DK, t0, K * DK, T, 0, DK, C, BK)
    c, _ = decay_sums(g + b * T * H + h, t0, H, T, C, GATE)
    scores = dot(queries, keys_t, DOT, PRECISION) * pair_decay(c, C)
    into = exp32(c)
    for v0 in range(0, DV, BV):
        state = load_rows(states + pid * DK * DV, 0, DV, DK, v0, DV, BK, BV)
        new = load_rows(fresh + pid * C * DV, 0, DV, C, v0, DV, C, BV)
        o = dot(queries, state, DOT, PRECISION) * into[:, None] + dot(scores, new, DOT, PRECISION)
        store_rows(out + (b * T * H + h) * DV, o * scale, t0, H * DV, T, v0, DV, C, BV)


@dataclass(frozen=True)
class Walked:
    """What the forward walk leaves in memory."""

    solve: Tensor  # [B H, N, C, C]
    fresh: Tensor  # [B H, N, C, Dv]
    states: Tensor  # [B H, N, Dk, Dv], before each chunk
    final: Tensor  # [B, H, Dk, Dv]


def walk(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, s: Setting) -> Walked:
    """Launches 1 and 2; tensors contiguous, g, beta float32."""
    batch, tokens, heads = g.shape
    kv_heads, key_dim, value_dim = k.shape[2], k.shape[3], v.shape[3]
    rows, chunks = batch * heads, triton.cdiv(tokens, CHUNK)

    def empty(*size: int, dtype: torch.dtype = s.kept) -> Tensor:
        return torch.empty(rows, chunks, *size, dtype=dtype, device=k.device)

    solve = empty(CHUNK, CHUNK, dtype=torch.float32)
    fresh, states = empty(CHUNK, value_dim), empty(key_dim, value_dim)
    final = torch.empty_like(state)
    sizes = (tokens, chunks, heads, kv_heads, key_dim)
    types = dict(DOT=s.dot, GATE=s.gate, PRECISION=s.precision)
    _solve[(rows * chunks,)](k, g, beta, solve, *sizes, C=CHUNK, BK=s.key_block, num_warps=s.solve_warps, **types)
    grid = (rows * triton.cdiv(value_dim, s.value_block),)
    _walk[grid](k, v, g, beta, solve, state, fresh, states, final, *sizes, value_dim, **s.blocks(s.key_block))
    return Walked(solve, fresh, states, final)


def gated_delta_rule_triton(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Same contract as `gated_delta_rule_chunked`; float32, bfloat16 and float16, not float64."""
    if q.shape[1] <= MOST_TOKENS:
        return gated_delta_step_triton(q, k, v, g, beta, initial_state, scale=scale)
    v_dtype, state_dtype = v.dtype, initial_state.dtype
    q, k, v, g, beta, state = as_kernels_take((q, k, v, g, beta, initial_state))
    s = setting_for(q, v)
    batch, tokens, heads, key_dim = q.shape
    kv_heads, value_dim = v.shape[2:]
    out = torch.empty(batch, tokens, heads, value_dim, dtype=v_dtype, device=q.device)
    w = walk(k, v, g, beta, state, s)
    chunks = w.solve.shape[1]
    sizes = (tokens, chunks, heads, kv_heads, key_dim, value_dim)
    grid = (batch * heads * chunks,)
    _outputs[grid](q, k, g, w.fresh, w.states, out, scale, *sizes, **s.blocks(s.key_block))
    return out, w.final.to(state_dtype)
