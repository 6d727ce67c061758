"""Registration of tcal::attention_statistics and tcal::attention_output_sums: schema, fake, path. No backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tcal_compiler.kernels.scores import Scores
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
    given: dict[str, Any] = {"scores": Scores(2 * key_dim**-0.5, window=650)}
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

            return attention_statistics_triton(q, k, v, scores=Scores(scale, window))
        context, *sums = attention_statistics_streaming(q, k, v, scores=Scores(scale, window))
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

            return attention_output_sums_triton(q, k, v, o, scores=Scores(scale, window))
        co, oo, cn, nn, rms = attention_output_sums_streaming(q, k, v, o, scores=Scores(scale, window))
    return co, oo, cn, nn, rms


@_output_sums.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, o: Tensor, scale: float, window: int) -> Any:
    heads, channels = (q.shape[1],), (q.shape[1], v.shape[3])
    return tuple(q.new_empty(size, dtype=torch.float64) for size in (heads, heads, channels, channels, heads))


def attention_statistics(q: Tensor, k: Tensor, v: Tensor, *, scores: Scores) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics of `attention_statistics_reference`, in memory O(T). Raises ValueError when shapes do not fit.

    Scores that more than scale and window shape go through PyTorch on every device.
    """
    if not scores.plain or scores.first:
        STATISTICS.check(q, k, v)
        scores.check(STATISTICS.op, q.shape[1])
        return attention_statistics_streaming(q, k, v, scores=scores)
    return torch.ops.tcal.attention_statistics(q, k, v, float(scores.scale), scores.window)


def attention_output_sums(q: Tensor, k: Tensor, v: Tensor, o: Tensor, *, scores: Scores) -> tuple[Tensor, ...]:
    """Sums of `attention_output_sums_reference`, in memory O(T); scores as in `attention_statistics`.

    Raises ValueError when shapes do not fit.
    """
    if not scores.plain or scores.first:
        OUTPUT_SUMS.check(q, k, v, o)
        scores.check(OUTPUT_SUMS.op, q.shape[1])
        return attention_output_sums_streaming(q, k, v, o, scores=scores)
    return torch.ops.tcal.attention_output_sums(q, k, v, o, float(scores.scale), scores.window)
