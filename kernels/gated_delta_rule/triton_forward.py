"""Triton forward of the gated delta rule: three launches; up to 16 tokens are one launch of the decode step.

The names are those of `chunked`. B batch, T tokens, H query heads, K key/value heads; N chunks of C = 64 tokens.
1. solve, all chunks at once: T = (I + B)^-1 * L, U = T (beta v), W = T (beta e^c k). Reads k, v, g, beta.
2. walk (`triton_walk`), chunk after chunk: V' [B H, N, C, Dv], S [B H, N, Dk, Dv] before each chunk, the
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
from tcal_compiler.kernels.tiles import dot, load_columns, load_gate, load_rows, store_gate, store_rows

from .triton_tiles import CHUNK, Setting, as_kernels_take, decay_sums, exp32, pair_decay, setting_for
from .triton_walk import walk_chunks


@triton.jit
def _diagonal_blocks(x, C: tl.constexpr, B: tl.constexpr):
    """[C / B, B, B] of [C, C]."""
    n: tl.constexpr = C // B
    a = tl.arange(0, n)
    same = a[:, None, None, None] == a[None, None, :, None]
    return tl.sum(tl.where(same, tl.reshape(x, (n, B, n, B)), 0.0), 2)


@triton.jit
def _joined(x, B: tl.constexpr):
    """[n / 2, 2 B, 2 B] of [n, B, B]: two blocks on the diagonal of one."""
    n: tl.constexpr = x.shape[0] // 2
    a = tl.arange(0, 2)
    same = (a[:, None] == a[None, :])[None, :, None, :, None]
    x = tl.reshape(x, (n, 2, B, B))
    return tl.reshape(tl.where(same, x[:, :, :, None, :], 0.0), (n, 2 * B, 2 * B))


@triton.jit
def _doubled(x, low, C: tl.constexpr, B: tl.constexpr, PRECISION: tl.constexpr):
    """Inverses [n, C, C] on blocks of 2 B from those on blocks of B: X - X L X, L what lies between them."""
    i = tl.arange(0, C)
    between = (i[:, None] // (2 * B) == i[None, :] // (2 * B)) & (i[:, None] // B != i[None, :] // B)
    corner = tl.where(between[None, :, :], low, 0.0)
    return x - tl.dot(tl.dot(x, corner, input_precision=PRECISION), x, input_precision=PRECISION)


@triton.jit
def _inverse(low, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + low)^-1 for strictly lower [C, C], C = 64: blocks double from 1 to C, small ones in batches."""
    r = tl.arange(0, 16)
    blocks = _diagonal_blocks(low, C, 16)
    pairs = (r[:, None] // 2 == r[None, :] // 2)[None, :, :]
    x = tl.where((r[:, None] == r[None, :])[None, :, :], 1.0, 0.0) - tl.where(pairs, blocks, 0.0)
    x = _doubled(x, blocks, 16, 2, PRECISION)
    x = _doubled(x, blocks, 16, 4, PRECISION)
    x = _doubled(x, blocks, 16, 8, PRECISION)
    x = _doubled(_joined(x, 16), _diagonal_blocks(low, C, 32), 32, 16, PRECISION)
    x = tl.reshape(_joined(x, 32), (C, C))
    i = tl.arange(0, C)
    corner = tl.where(i[:, None] // 32 != i[None, :] // 32, low, 0.0)
    return x - tl.dot(tl.dot(x, corner, input_precision=PRECISION), x, input_precision=PRECISION)


@triton.jit
def _solve(
    k, v, g, beta, solve, w, u, fade, keep, T, N, H, K, DK, DV,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
    GATE: tl.constexpr, PRECISION: tl.constexpr, INVERSE: tl.constexpr,
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
    c, last = decay_sums(g + b * T * H + h, t0, H, T, C, GATE)
    store_gate(fade + pid * C, exp32(last - c), 0, 1, C, C)
    tl.store(keep + pid, exp32(last))
    low = dot(keys, keys_t, DOT, PRECISION) * rate[:, None]
    low = tl.where(i[:, None] > i[None, :], low, 0.0)
    x = _inverse(low, C, PRECISION)
    x = x * pair_decay(c, C)
    if INVERSE:
        store_rows(solve + pid * C * C, x, 0, C, C, 0, C, C, C)
    vp = v + (b * T * K + h // (H // K)) * DV
    for v0 in range(0, DV, BV):
        values = load_rows(vp, t0, K * DV, T, v0, DV, C, BV).to(tl.float32) * rate[:, None]
        store_rows(u + pid * C * DV, dot(x, values, tl.float32, PRECISION), 0, DV, C, v0, DV, C, BV)
    into = rate * exp32(c)
    for k0 in range(0, DK, BV):
        some = load_rows(kp, t0, K * DK, T, k0, DK, C, BV).to(tl.float32) * into[:, None]
        store_rows(w + pid * C * DK, dot(x, some, tl.float32, PRECISION), 0, DK, C, k0, DK, C, BV)


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

    solve: Tensor  # [B H, N, C, C], or empty
    fresh: Tensor  # [B H, N, C, Dv]
    states: Tensor  # [B H, N, Dk, Dv], before each chunk
    final: Tensor  # [B, H, Dk, Dv]


def walk(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, s: Setting, *, inverse: bool = False) -> Walked:
    """Launches 1 and 2; tensors contiguous, g, beta float32. inverse: whether T is written too, for the backward."""
    batch, tokens, heads = g.shape
    kv_heads, key_dim, value_dim = k.shape[2], k.shape[3], v.shape[3]
    rows, chunks = batch * heads, triton.cdiv(tokens, CHUNK)

    def empty(*size: int, dtype: torch.dtype = s.kept) -> Tensor:
        return torch.empty(rows, chunks, *size, dtype=dtype, device=k.device)

    solve = empty(CHUNK, CHUNK, dtype=torch.float32) if inverse else empty(0)
    w, u = empty(CHUNK, key_dim), empty(CHUNK, value_dim)
    fade, keep = empty(CHUNK, dtype=torch.float32), empty(dtype=torch.float32)
    sizes = (tokens, chunks, heads, kv_heads, key_dim, value_dim)
    types = dict(DOT=s.dot, GATE=s.gate, PRECISION=s.precision)
    blocks = dict(C=CHUNK, BK=s.key_block, BV=min(32, s.value_block), num_warps=s.solve_warps, INVERSE=inverse)
    _solve[(rows * chunks,)](k, v, g, beta, solve, w, u, fade, keep, *sizes, **blocks, **types)
    states, final = walk_chunks(k, w, u, fade, keep, state, s)
    return Walked(solve, u, states, final)


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
    chunks = w.fresh.shape[1]
    sizes = (tokens, chunks, heads, kv_heads, key_dim, value_dim)
    grid = (batch * heads * chunks,)
    _outputs[grid](q, k, g, w.fresh, w.states, out, scale, *sizes, **s.blocks(s.key_block))
    return out, w.final.to(state_dtype)
