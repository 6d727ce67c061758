"""Parts shared by the Triton kernels of the gated delta rule: tiles, decays, products, launch settings.

Tensors are contiguous. A program's chunk starts at token `t0`; rows beyond `T` and columns beyond `D` are zero. Tiles
that a product needs transposed are loaded so: no register value is ever transposed, because Triton 3.4 to 3.7.0
miscompiles products with a transposed left operand at an inner size of 64 on Hopper. Addresses are int64, grids are
one-dimensional.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 64


@triton.jit
def load_rows(ptr, t0, stride, T, d0, D, C: tl.constexpr, BD: tl.constexpr):
    """[C, BD]: rows t0.. of a matrix with `stride` between rows, columns d0.. below D."""
    t = t0 + tl.arange(0, C).to(tl.int64)
    d = d0 + tl.arange(0, BD)
    return tl.load(ptr + t[:, None] * stride + d[None, :], mask=(t[:, None] < T) & (d[None, :] < D), other=0.0)


@triton.jit
def load_columns(ptr, t0, stride, T, d0, D, C: tl.constexpr, BD: tl.constexpr):
    """[BD, C]: the transpose of `load_rows`."""
    t = t0 + tl.arange(0, C).to(tl.int64)
    d = d0 + tl.arange(0, BD)
    return tl.load(ptr + t[None, :] * stride + d[:, None], mask=(t[None, :] < T) & (d[:, None] < D), other=0.0)


@triton.jit
def store_rows(ptr, x, t0, stride, T, d0, D, C: tl.constexpr, BD: tl.constexpr):
    t = t0 + tl.arange(0, C).to(tl.int64)
    d = d0 + tl.arange(0, BD)
    mask = (t[:, None] < T) & (d[None, :] < D)
    tl.store(ptr + t[:, None] * stride + d[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_gate(ptr, t0, stride, T, C: tl.constexpr):
    """[C] of one value a token."""
    t = t0 + tl.arange(0, C).to(tl.int64)
    return tl.load(ptr + t * stride, mask=t < T, other=0.0)


@triton.jit
def store_gate(ptr, x, t0, stride, T, C: tl.constexpr):
    t = t0 + tl.arange(0, C).to(tl.int64)
    tl.store(ptr + t * stride, x, mask=t < T)


@triton.jit
def decay_sums(g_ptr, t0, stride, T, C: tl.constexpr, GATE: tl.constexpr):
    """c_t [C], the running sum of g in type GATE, and c_C. A g below -70 has decayed everything."""
    g = tl.maximum(load_gate(g_ptr, t0, stride, T, C), -70.0).to(GATE)
    return tl.cumsum(g, 0), tl.sum(g, 0)


@triton.jit
def exp32(x):
    return tl.exp(x.to(tl.float32))


@triton.jit
def pair_decay(c, C: tl.constexpr):
    """L [C, C]: exp(c_i - c_j) for j <= i, else 0."""
    i = tl.arange(0, C)
    return tl.exp(tl.where(i[:, None] >= i[None, :], (c[:, None] - c[None, :]).to(tl.float32), float("-inf")))


@triton.jit
def pair_decay_transposed(c, C: tl.constexpr):
    i = tl.arange(0, C)
    return tl.exp(tl.where(i[:, None] <= i[None, :], (c[None, :] - c[:, None]).to(tl.float32), float("-inf")))


@triton.jit
def dot(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b in float32, operands rounded to DOT first; PRECISION matters for float32 operands."""
    return tl.dot(a.to(DOT), b.to(DOT), input_precision=PRECISION)


@dataclass(frozen=True)
class Setting:
    """What the kernels are compiled for."""

    key_block: int  # all key columns, a power of two
    value_block: int  # value columns of one program of a walk
    key_part: int  # key columns of one program of the gradients
    raw: Any  # type of the operands of products of keys and queries, which are exact in their own type
    dot: Any  # type of the operands of products with computed values
    gate: Any  # type in which g is summed
    precision: str  # of products of float32 operands
    kept: torch.dtype  # of V', dR, states and pairs between kernels; the inverse stays float32
    stages: int  # of the loops that load tiles ahead; each costs shared memory
    warps: int
    solve_warps: int = 4

    def blocks(self, columns: int) -> dict[str, Any]:
        """The constexpr arguments that most kernels share."""
        types = dict(RAW=self.raw, DOT=self.dot, GATE=self.gate, PRECISION=self.precision)
        return dict(C=CHUNK, BK=columns, BV=self.value_block, num_warps=self.warps, num_stages=self.stages, **types)


def setting_for(q: Tensor, v: Tensor) -> Setting:
    """bfloat16: bfloat16 products, but one tf32 product where the inverse meets the values; float16: tf32 products,
    because computed values may leave its range; float32: three tf32 products for one and g summed in float64.
    """
    key_block = max(16, triton.next_power_of_2(q.shape[-1]))
    narrow, wide = q.dtype == torch.bfloat16, q.dtype == torch.float32
    most = 64 if narrow or key_block <= 64 else 32
    if key_block > 128:
        most = 32 if narrow else 16
    raw = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(q.dtype, tl.float32)
    emulated = not q.is_cuda  # the interpreter multiplies the bits of bfloat16
    return Setting(
        key_block=key_block,
        value_block=min(most, max(16, triton.next_power_of_2(v.shape[-1]))),
        key_part=min(64, key_block),
        raw=tl.float32 if emulated else raw,
        dot=tl.bfloat16 if narrow and not emulated else tl.float32,
        gate=tl.float64 if wide else tl.float32,
        precision="tf32x3" if wide else "tf32",
        kept=torch.bfloat16 if narrow and not emulated else torch.float32,
        stages=3 if narrow and key_block <= 128 else 2 if key_block <= 128 else 1,
        warps=4,
    )
