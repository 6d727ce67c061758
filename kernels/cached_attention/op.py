"""Registration of tcal::cached_attention: schema and fake. Inference only: there is no backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tcal_compiler.kernels.scores import Scores
from tcal_compiler.kernels.shapes import Shapes

from .reference import cached_attention_reference

SHAPES = Shapes(
    "cached_attention",
    "q [B,H,T,Dk], k [B,K,T,Dk], v [B,K,T,Dv], past_key [B,K,S,Dk], past_value [B,K,S,Dv], past_lengths [B]",
    groups=("H", "K"),
)


SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor past_key, Tensor past_value, Tensor past_lengths, SymInt total, "
    f"Tensor? cos, Tensor? sin, bool interleaved, {Scores.SCHEMA}) -> (Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("tcal::cached_attention", mutates_args=(), schema=SCHEMA)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_lengths: Tensor,
    total: int,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    *flat: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    scores = Scores(*flat)
    SHAPES.check(q, k, v, past_key, past_value, past_lengths)
    scores.check(SHAPES.op, q.shape[1])
    rotary: dict[str, Any] = {"cos": cos, "sin": sin, "interleaved": interleaved}
    out = cached_attention_reference(q, k, v, past_key, past_value, past_lengths, total=total, scores=scores, **rotary)
    context, keys, values = (x.contiguous() for x in out)
    return context, keys, values


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, past_key: Tensor, past_value: Tensor, past_lengths: Tensor, total: int, *_: Any
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
    scores: Scores,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of `cached_attention_reference`, usable under export. Raises ValueError when shapes do not fit."""
    return torch.ops.tcal.cached_attention(
        q, k, v, past_key, past_value, past_lengths, total, cos, sin, interleaved, *scores.flat
    )
