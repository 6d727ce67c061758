"""Triton kernel of the decode step: one launch, each state read and written once, in registers between.

A program takes BV of the Dv columns of one state [Dk, Dv], and all its rows. With the norm it takes all columns, since
their squares have one sum; with a state of more than MOST_FUSED numbers a second launch for the norm is faster, as
where that was measured (`tuning`). Both readings of a token come from the state before
it, so that neither waits for the update:

    w = beta (v - exp(g) S^T k)     o = scale (exp(g) S^T q + (k . q) w)     S <- exp(g) S + k w^T
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tcal_compiler.kernels.launch import Launch, cdiv, per_size
from tcal_compiler.kernels.tuning import Fields, tuned

from .reference import L2_EPS

MOST_FUSED = 128 * 64  # numbers of a state that one program holds
MOST_REGISTERS = 128  # of a thread: so a multiprocessor holds four tiles of 128 x 64
ENOUGH_PROGRAMS = 512
NORM_ROWS = 2  # heads of one program of the norm's own launch


@triton.jit
def _vector(ptr, i, D):
    return tl.load(ptr + i, mask=i < D, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["H", "K"], do_not_specialize_on_alignment=["T"])
def _step(
    q, k, v, g, beta, gate, weight, start, out, final, scale, eps, l2_eps, T, H, K,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, zb, zt, zh,
    DK: tl.constexpr, DV: tl.constexpr, NORMALIZE: tl.constexpr, NORM: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(DV, BV)
    pid = tl.program_id(0).to(tl.int64)
    row, v0 = pid // parts, (pid % parts).to(tl.int32) * BV
    b, h = row // H, row % H
    dk, dv = tl.arange(0, BK), v0 + tl.arange(0, BV)
    at, there = row * DK * DV + dk[:, None] * DV + dv[None, :], (dk[:, None] < DK) & (dv[None, :] < DV)
    state = tl.load(start + at, mask=there, other=0.0, eviction_policy=EVICTION).to(tl.float32)
    shared = h // (H // K)
    q_at, k_at = q + b * qb + h * qh, k + b * kb + shared * kh
    v_at, z_at = v + b * vb + shared * vh, gate + b * zb + h * zh
    for t in range(T):
        here = (b * T + t) * H + h
        query, key, value = _vector(q_at, dk, DK), _vector(k_at, dk, DK), _vector(v_at, dv, DV)
        keep, rate = tl.exp(tl.load(g + here).to(tl.float32)), tl.load(beta + here).to(tl.float32)
        q_size, k_size = scale, 1.0
        if NORMALIZE:
            q_size = scale / tl.sqrt(tl.sum(query * query, 0) + l2_eps)
            k_size = 1.0 / tl.sqrt(tl.sum(key * key, 0) + l2_eps)
        recalled = tl.sum(state * key[:, None], 0) * (keep * k_size)
        read = tl.sum(state * query[:, None], 0) * (keep * q_size)
        write = (value - recalled) * (rate * k_size)
        state = state * keep + key[:, None] * write[None, :]
        y = read + write * (tl.sum(key * query, 0) * q_size)
        if NORM:
            z, w = _vector(z_at, dv, DV), _vector(weight + h * DV, dv, DV)
            y = y / tl.sqrt(tl.sum(y * y, 0) / DV + eps) * w * z / (1.0 + tl.exp(-z))
        tl.store(out + here * DV + dv, y.to(out.dtype.element_ty), mask=dv < DV)
        q_at, k_at, v_at, z_at = q_at + qt, k_at + kt, v_at + vt, z_at + zt
    tl.store(final + at, state.to(final.dtype.element_ty), mask=there, eviction_policy=EVICTION)


@triton.jit(do_not_specialize=["N", "T", "H"])
def _norm(
    y, gate, weight, out, eps, N, T, H, zb, zt, zh, DV: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """The gated norm of y [N, Dv], N = B T H, for which `_step` took a head in parts."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    h, t, b = n % H, n // H % T, n // H // T
    dv = tl.arange(0, BV)[None, :]
    there = (n[:, None] < N) & (dv < DV)
    x = tl.load(y + n[:, None] * DV + dv, mask=there, other=0.0)
    z = tl.load(gate + (b * zb + t * zt + h * zh)[:, None] + dv, mask=there, other=0.0).to(tl.float32)
    w = tl.load(weight + h[:, None] * DV + dv, mask=there, other=0.0).to(tl.float32)
    size = tl.sqrt(tl.sum(x * x, 1) / DV + eps)
    normed = x / size[:, None] * w * z / (1.0 + tl.exp(-z))
    tl.store(out + n[:, None] * DV + dv, normed.to(out.dtype.element_ty), mask=there)


class Tile(NamedTuple):
    """What the kernel is compiled for: all key columns, the value columns of one program, its warps, a thread's
    registers, and whether the state is the first that the cache gives up."""

    BK: int
    BV: int
    num_warps: int
    maxnreg: int = MOST_REGISTERS
    streams: int = 0


def measured_for(dtype: torch.dtype, device: torch.device, key_dim: int, value_dim: int, *, normed: bool) -> Fields:
    """Of the table: fields of the widest tile; "apart": 1 where the norm is a launch of its own."""
    op = "gated_delta_step with norm" if normed else "gated_delta_step"
    return tuned(op, dtype, device, key_dim, value_dim)


def tiles(key_dim: int, value_dim: int, *, whole: bool, measured: Fields | None = None) -> list[Tile]:
    """The tiles that a call may take, widest first; whole: all value columns in one program, if they fit.

    32 columns are a cache line of the state, 8 a sector. A warp takes 1024 numbers, or 2048 beyond 8 warps.
    """
    fields = dict(measured or {})
    whole = not fields.pop("apart", 0) and whole
    key_block, value_block = (max(8, triton.next_power_of_2(n)) for n in (key_dim, value_dim))
    widths = [n for n in (32, 16, 8) if n <= value_block]
    if whole and key_block * value_block <= MOST_FUSED:
        widths = [value_block]
    sizes = (key_block * n for n in widths)
    warps = (max(1, min(size // 1024, 8), size // 2048) for size in sizes)
    widest, *others = (Tile(key_block, *pair) for pair in zip(widths, warps, strict=True))
    return [widest._replace(**fields), *others]


def choose_tile(options: list[Tile], rows: int, value_dim: int) -> Tile:
    """Few states are cut finer, so that every multiprocessor gets some."""
    return next((t for t in options if rows * cdiv(value_dim, t.BV) >= ENOUGH_PROGRAMS), options[-1])


def gated_delta_step_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    scale: float,
    normalize: bool = False,
    eps: float = 1e-5,
    in_place: bool = False,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Contract of `gated_delta_step_reference`, not float64; in_place: the returned state is `state`, overwritten.

    tile: one of `tiles`, None for the one that suits the number of states.
    q, k, v and gate may have any strides between tokens and heads. Nothing here waits for the device.
    """
    q, k, v, z = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, v if gate is None else gate))
    g, beta = g.contiguous(), beta.contiguous()
    w = v if weight is None else weight.contiguous()  # like z, a pointer that nothing reads without the norm
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *z.stride()[:3])
    numbers = (scale, eps, normalize, gate is not None)
    step, norm = _launches(q.shape, v.shape[2:], strides, q.dtype, q.device, *numbers, tile)
    start = state if state.is_contiguous() else state.contiguous()
    final = start if in_place else torch.empty_like(start)
    y = v.new_empty(*q.shape[:3], v.shape[3], dtype=torch.float32 if norm else v.dtype)
    step(q, k, v, g, beta, z, w, start, y, final)
    if norm:
        out = torch.empty_like(y, dtype=v.dtype)
        norm(y, z, w, out)
    else:
        out = y
    if not in_place:
        return out, final
    return out, state if final is state else state.copy_(final)


@per_size
def _launches(
    q: torch.Size, v: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, device: torch.device,
    scale: float, eps: float, normalize: bool, normed: bool, tile: Tile | None,
) -> tuple[Launch, Launch | None]:  # fmt: skip
    """The step for q [B, T, H, Dk] and v [..., K, Dv], and the norm where it is apart. strides: of q, k, v, gate."""
    (batch, tokens, heads, key_dim), (kv_heads, value_dim) = q, v
    rows = batch * heads
    if tile is None:
        measured = measured_for(dtype, device, key_dim, value_dim, normed=normed)
        tile = choose_tile(tiles(key_dim, value_dim, whole=normed, measured=measured), rows, value_dim)
    fused = normed and value_dim <= tile.BV
    step = Launch(
        _step, rows * cdiv(value_dim, tile.BV), scale, eps, L2_EPS, tokens, heads, kv_heads, *strides,
        DK=key_dim, DV=value_dim, NORMALIZE=normalize, NORM=fused, BK=tile.BK, BV=tile.BV,
        EVICTION="evict_first" if tile.streams else "", num_warps=tile.num_warps, maxnreg=tile.maxnreg,
    )  # fmt: skip
    if fused or not normed:
        return step, None
    sizes = (rows * tokens, tokens, heads, *strides[-3:])
    block = triton.next_power_of_2(value_dim)
    blocks = dict(DV=value_dim, BV=block, ROWS=NORM_ROWS, num_warps=1)
    return step, Launch(_norm, cdiv(rows * tokens, NORM_ROWS), eps, *sizes, **blocks)
