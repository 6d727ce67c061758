"""Registration of tcal::attention_statistics and tcal::attention_output_sums: schema, fake, path. No backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tcal_compiler.kernels.self_check import exactly, relative_errors, takes_triton
from tcal_compiler.kernels.shapes import Shapes

from .reference import OCTAVES
from .streaming import attention_output_sums_streaming, attention_statistics_streaming

_QKV = "q [B,H,T,Dk], k [B,K,T,Dk], v [B,K,T,Dv]"
_RULES: dict[str, Any] = dict(positive=("T",), groups=("H", "K"))
STATISTICS = Shapes("attention_statistics", _QKV, **_RULES)
OUTPUT_SUMS = Shapes("attention_output_sums", f"{_QKV}, o [B,T,H,Dv]", **_RULES)
NAMES = ("context", "distance", "entropy", "mass", "<ctx,o>", "<o,o>", "<ctx,n>", "<n,n>", "rms")


def _takes_triton(q: Tensor, v: Tensor) -> bool:
    return takes_triton("attention_statistics", self_check, q, q.shape[-1], v.shape[-1])


def self_check(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> dict[str, float]:
    """Errors of Triton's results against float64: two query heads on one key head, 700 tokens, a window of 650."""
    from .triton_kernel import attention_output_sums_triton, attention_statistics_triton

    gen = torch.Generator().manual_seed(0)
    sizes = [(1, 2, 700, key_dim), (1, 1, 700, key_dim), (1, 1, 700, value_dim), (1, 700, 2, value_dim)]
    q, k, v, noise = (torch.randn(size, generator=gen).to(device, dtype) for size in sizes)
    given: dict[str, Any] = dict(scale=2 * key_dim**-0.5, window=650)
    context, *_ = exact = attention_statistics_streaming(*exactly((q, k, v)), **given)
    o = (context + noise).to(dtype)  # so that <ctx, o> does not vanish
    actual = (*attention_statistics_triton(q, k, v, **given), *attention_output_sums_triton(q, k, v, o, **given))
    exact_sums = attention_output_sums_streaming(*exactly((q, k, v, o)), **given)
    return relative_errors(NAMES, actual, (*exact, *exact_sums))


@torch.library.custom_op("tcal::attention_statistics", mutates_args=())
def _statistics(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    STATISTICS.check(q, k, v)
    with torch.autocast(q.device.type, enabled=False):
        if _takes_triton(q, v):
            from .triton_kernel import attention_statistics_triton

            return attention_statistics_triton(q, k, v, scale=scale, window=window or None)
        context, *sums = attention_statistics_streaming(q, k, v, scale=scale, window=window or None)
    distance, entropy, mass = sums
    return context.contiguous(), distance, entropy, mass


@_statistics.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Any:
    heads = q.shape[1]
    sums = (q.new_empty(heads, *size, dtype=torch.float64) for size in ((), (), (OCTAVES,)))
    return (v.new_empty(q.shape[0], q.shape[2], heads, v.shape[3]), *sums)


@torch.library.custom_op("tcal::attention_output_sums", mutates_args=())
def _output_sums(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    OUTPUT_SUMS.check(q, k, v, o)
    with torch.autocast(q.device.type, enabled=False):
        if _takes_triton(q, v):
            from .triton_kernel import attention_output_sums_triton

            return attention_output_sums_triton(q, k, v, o, scale=scale, window=window or None)
        co, oo, cn, nn, rms = attention_output_sums_streaming(q, k, v, o, scale=scale, window=window or None)
    return co, oo, cn, nn, rms


@_output_sums.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, o: Tensor, scale: float, window: int) -> Any:
    heads, channels = (q.shape[1],), (q.shape[1], v.shape[3])
    return tuple(q.new_empty(size, dtype=torch.float64) for size in (heads, heads, channels, channels, heads))


def _shaped(shape: dict[str, Any]) -> bool:
    """Whether anything but scale and window makes the scores; softcap 0 and None do not."""
    return any(isinstance(x, Tensor) or bool(x) for x in shape.values())


def attention_statistics(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None, **shape: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics of `attention_statistics_reference`, in memory O(T). Raises ValueError when shapes do not fit.

    shape: softcap, slopes and sinks of the scores, as in `attention_rows`; with any of them, PyTorch on every device.
    """
    if _shaped(shape):
        STATISTICS.check(q, k, v)
        return attention_statistics_streaming(q, k, v, scale=scale, window=window, **shape)
    return torch.ops.tcal.attention_statistics(q, k, v, float(scale), window or 0)


def attention_output_sums(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, *, scale: float, window: int | None = None, **shape: Any
) -> tuple[Tensor, ...]:
    """Sums of `attention_output_sums_reference`, in memory O(T); shape as in `attention_statistics`.

    Raises ValueError when shapes do not fit.
    """
    if _shaped(shape):
        OUTPUT_SUMS.check(q, k, v, o)
        return attention_output_sums_streaming(q, k, v, o, scale=scale, window=window, **shape)
    return torch.ops.tcal.attention_output_sums(q, k, v, o, float(scale), window or 0)
