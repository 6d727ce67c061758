"""Tiles that Triton kernels load, store and multiply.

Rows beyond `T` and columns beyond `D` are zero. Tiles that a product needs transposed are loaded so: no register value
is ever transposed, because Triton 3.4 to 3.7.0 miscompiles products with a transposed left operand at an inner size of
64 on Hopper. Addresses are int64; a launch's grid is one-dimensional.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def dot(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b in float32, operands rounded to DOT first; PRECISION matters for float32 operands."""
    return tl.dot(a.to(DOT), b.to(DOT), input_precision=PRECISION)
