"""Parts shared by the Triton kernels of the gated delta rule: decays and launch settings.

Tensors are contiguous. A program's chunk starts at token `t0`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tcal_compiler.kernels.tuning import tuned

CHUNK = 64
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def decay_sums(g, GATE: tl.constexpr):
    """c_t [C], the running sum of g [C] in type GATE, and c_C. A g below -70 has decayed everything."""
    g = tl.maximum(g, -70.0).to(GATE)
    return tl.cumsum(g, 0), tl.sum(g, 0)


@triton.jit
def exp32(x):
    return tl.exp(x.to(tl.float32))


@triton.jit
def pair_decay(c, C: tl.constexpr):
    """L [C, C]: exp(c_i - c_j) for j <= i, else 0."""
    i = tl.arange(0, C)
    c = c * LOG2_E
    return tl.exp2(tl.where(i[:, None] >= i[None, :], (c[:, None] - c[None, :]).to(tl.float32), float("-inf")))


@dataclass(frozen=True)
class Setting:
    """What the kernels are compiled for."""

    key_block: int  # all key columns, a power of two
    value_block: int  # value columns of one program of the walk that stores states
    key_part: int  # key columns of one program of the gradients
    dot: Any  # type of the operands of products
    gate: Any  # type in which g is summed
    precision: str  # of products of float32 operands, as `dot` takes it
    kept: torch.dtype  # of U, W, P, V', dR, states, pairs between kernels; the inverse stays float32
    stages: int  # of the loops that load tiles ahead; each costs shared memory
    warps: int  # of the walk that stores states
    pair_warps: int  # of the gradients
    pair_columns: int  # value columns that these take at a time
    solve_warps: int
    solve_registers: int | None  # of a thread at most
    solve_keys: int  # key columns that one product of the solve takes
    read_columns: int  # value columns of one program of the walk that reads the outputs and of the walk back
    read_stages: int
    read_warps: int
    read_programs: int  # of these walks that a processor runs at once, as its shared memory holds them


class Sizes(NamedTuple):
    """What launches are made for: of one call's q and v, as `as_kernels_take` returns them."""

    batch: int
    tokens: int
    heads: int
    key_dim: int
    kv_heads: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device


def sizes_of(q: Tensor, v: Tensor) -> Sizes:
    (batch, tokens, heads, key_dim), (kv_heads, value_dim) = q.shape, v.shape[2:]
    return Sizes(batch, tokens, heads, key_dim, kv_heads, value_dim, q.dtype, q.device)


def setting_for(x: Sizes, *, tf32: bool = False) -> Setting:
    """bfloat16: bfloat16 products, but one tf32 product where the inverse meets the values, which halves the error.
    float32: three tf32 products for one, and g summed in float64; with tf32 one product of factors that are
    rounded to nearest.

    Shared memory sets value_block and stages; each row was run on Hopper, Triton 3.6. bfloat16 products with 256
    key columns were wrong there with one stage (o off by a third, illegal addresses), and more stages did not fit.
    What `tuning` has for this card is taken instead.
    """
    narrow, cuda = x.dtype == torch.bfloat16, x.device.type == "cuda"
    usual = _usual_setting(x.key_dim, x.value_dim, narrow=narrow, cuda=cuda, tf32=tf32)
    measured: dict[str, Any] = tuned("gated_delta_rule", x.dtype, x.device, x.key_dim, x.value_dim)
    return replace(usual, **measured) if measured else usual


@lru_cache(maxsize=64)  # every new size asks for it
def _usual_setting(key_dim: int, value_dim: int, *, narrow: bool, cuda: bool, tf32: bool) -> Setting:
    key_block = max(16, triton.next_power_of_2(key_dim))
    bfloat16_products = narrow and cuda  # the interpreter multiplies the bits of bfloat16
    most = 64 if narrow or key_block <= 64 else 32 if key_block <= 128 else 16
    wide = narrow and value_dim > 64
    return Setting(
        key_block=key_block,
        value_block=64,
        key_part=min(64, key_block),
        dot=tl.bfloat16 if bfloat16_products else tl.float32,
        gate=tl.float32 if narrow else tl.float64,
        precision="tf32" if narrow else "nearest" if tf32 else "tf32x3",
        kept=torch.bfloat16 if bfloat16_products else torch.float32,
        stages=2 if key_block <= 128 else 1,
        warps=4,
        pair_warps=4,
        pair_columns=min(most, max(16, triton.next_power_of_2(value_dim))),
        solve_warps=4,
        solve_registers=168 if narrow else None,  # so that a processor runs three programs at once
        solve_keys=key_block if narrow else min(32, key_block),
        read_columns=128 if wide else 64,
        read_stages=3 if bfloat16_products else 2 if key_block <= 64 else 1,
        read_warps=8 if wide else 4,
        read_programs=1,
    )


def as_kernels_take(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """q, k, v, g, beta, state: contiguous; q, k, v bfloat16 or float32, the rest float32.

    float16 is widened, since computed values may leave its range, and so is bfloat16 beyond head dims of 128.
    """
    q, k, v, *rest = tensors
    dtype = torch.bfloat16 if q.dtype == torch.bfloat16 and q.shape[-1] <= 128 else torch.float32
    return (*(_as(x, dtype) for x in (q, k, v)), *(_as(x, torch.float32) for x in rest))


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous()
