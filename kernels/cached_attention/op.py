"""Registration of tcal::cached_attention: schema and fake. Inference only: there is no backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .reference import cached_attention_reference


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_lengths: Tensor,
    of_heads: tuple[Tensor | None, ...],
) -> None:
    ok = all(t.dim() == 4 for t in (q, k, v, past_key, past_value)) and past_lengths.dim() == 1
    if ok:
        batch, heads, tokens, key_dim = q.shape
        kv_heads, value_dim, slots = k.shape[1], v.shape[3], past_key.shape[2]
        ok = (
            tuple(k.shape) == (batch, kv_heads, tokens, key_dim)
            and tuple(v.shape) == (batch, kv_heads, tokens, value_dim)
            and tuple(past_key.shape) == (batch, kv_heads, slots, key_dim)
            and tuple(past_value.shape) == (batch, kv_heads, slots, value_dim)
            and past_lengths.shape[0] == batch
            and kv_heads > 0
            and heads % kv_heads == 0
            and all(t is None or tuple(t.shape) == (heads,) for t in of_heads)
        )
    if not ok:
        named = dict(q=q, k=k, v=v, past_key=past_key, past_value=past_value, past_lengths=past_lengths)
        raise ValueError(
            "cached_attention: want q [B,H,T,Dk], k [B,K,T,Dk], v [B,K,T,Dv], past_key [B,K,S,Dk], "
            "past_value [B,K,S,Dv], past_lengths [B] with H a multiple of K, slopes and sinks [H]; "
            f"got { ({n: tuple(t.shape) for n, t in named.items()}) }, "
            f"slopes and sinks {[None if t is None else tuple(t.shape) for t in of_heads]}"
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
    _check(q, k, v, past_key, past_value, past_lengths, (slopes, sinks))
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
