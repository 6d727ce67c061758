"""Tiles that Triton kernels load, store and multiply.

Rows beyond `T` and columns beyond `D` are zero. A product's left operand is never a transposed value, but loaded so,
because Triton 3.4 to 3.7.0 miscompiles products with a transposed left operand at an inner size of 64 on Hopper.
Addresses are int64; a launch's grid is one-dimensional.
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
def store_columns(ptr, x, t0, stride, T, d0, D, C: tl.constexpr, BD: tl.constexpr):
    """x [BD, C], as `load_columns` loads it."""
    t = t0 + tl.arange(0, C).to(tl.int64)
    d = d0 + tl.arange(0, BD)
    mask = (t[None, :] < T) & (d[:, None] < D)
    tl.store(ptr + t[None, :] * stride + d[:, None], x.to(ptr.dtype.element_ty), mask=mask)


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
def nearest_tf32(x):
    """The nearest TensorFloat32 of float32 x, ties away from zero, as PTX's cvt.rna.tf32. Infinities and NaN stay."""
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000  # without the last 13 of 23
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def dot(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b in float32, operands rounded to DOT first. PRECISION, for float32 operands: Triton's input_precision, whose
    "tf32" leaves them to the tensor cores, which cut them off; "nearest" is tf32 of operands that are rounded first.
    """
    a, b = a.to(DOT), b.to(DOT)
    if PRECISION == "nearest":
        product = tl.dot(nearest_tf32(a), nearest_tf32(b), input_precision="tf32")
    else:
        product = tl.dot(a, b, input_precision=PRECISION)
    return product
