"""Registration of tcal::cached_attention: schema and fake. Inference only: there is no backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tcal_compiler.kernels.shapes import Shapes

from .reference import cached_attention_reference

SHAPES = Shapes(
    "cached_attention",
    "q [B,H,T,Dk], k [B,K,T,Dk], v [B,K,T,Dv], past_key [B,K,S,Dk], past_value [B,K,S,Dv], past_lengths [B]",
    groups=("H", "K"),
)


def _check_per_head(q: Tensor, slopes: Tensor | None, sinks: Tensor | None) -> None:
    for name, x in (("slopes", slopes), ("sinks", sinks)):
        if x is not None and tuple(x.shape) != (q.shape[1],):
            raise ValueError(
                f"cached_attention: want {name} [H] for q [B,H,T,Dk]; got {tuple(x.shape)}, H = {q.shape[1]}"
            )


@torch.library.custom_op("tcal::cached_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_lengths: Tensor,
    total: int,
    scale: float,
    window: int,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    SHAPES.check(q, k, v, past_key, past_value, past_lengths)
    _check_per_head(q, slopes, sinks)
    out = cached_attention_reference(
        q,
        k,
        v,
        past_key,
        past_value,
        past_lengths,
        total=total,
        scale=scale,
        window=window,
        cos=cos,
        sin=sin,
        interleaved=interleaved,
        softcap=softcap,
        slopes=slopes,
        sinks=sinks,
    )
    context, keys, values = (x.contiguous() for x in out)
    return context, keys, values


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_lengths: Tensor,
    total: int,
    scale: float,
    window: int,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Any:
    slots = torch.sym_max(past_key.shape[2], total)
    caches = (x.new_empty(x.shape[0], x.shape[1], slots, x.shape[3]) for x in (past_key, past_value))
    return (q.new_empty(*q.shape[:3], v.shape[3]), *caches)


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_lengths: Tensor,
    *,
    total: int,
    scale: float,
    window: int = 0,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of `cached_attention_reference`, usable under export. Raises ValueError when shapes do not fit."""
    return torch.ops.tcal.cached_attention(
        q, k, v, past_key, past_value, past_lengths, total, scale, window, cos, sin, interleaved, softcap, slopes, sinks
    )
