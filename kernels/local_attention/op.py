"""Registration of tcal::window_rows and tcal::window_step: schemas and fakes. Inference only: there is no backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tcal_compiler.kernels.shapes import Shapes

from .step import WindowRows, window_rows_reference, window_step_reference

SHAPES = Shapes(
    "window_step", "q [B,H,T,Dk], k [B,K,T,Dk], v [B,K,T,Dv], past [B,N,C]", positive=("T",), groups=("H", "K")
)
_SIZES = {"window": "int", "first": "bool", "slots": "int", "front": "bool", "heads": "int", "kv_heads": "int"}
_ROWS = ", ".join(["Tensor"] * len(WindowRows._fields))


@torch.library.custom_op(
    "tcal::window_rows",
    mutates_args=(),
    schema="(Tensor tokens, Tensor past_lengths, Tensor new_lengths, Tensor like, "
    f"{', '.join(f'{kind} {name}' for name, kind in _SIZES.items())}) -> ({_ROWS})",
)
def _rows(tokens: Tensor, past_lengths: Tensor, new_lengths: Tensor, like: Tensor, *sizes: Any) -> Any:
    return window_rows_reference(tokens, past_lengths, new_lengths, like, **dict(zip(_SIZES, sizes, strict=True)))


@_rows.register_fake
def _(tokens: Tensor, past_lengths: Tensor, new_lengths: Tensor, like: Tensor, *sizes: Any) -> Any:
    (batch, length), (_, _, slots, _, heads, kv_heads) = tokens.shape, sizes
    new_size = torch.library.get_ctx().new_dynamic_size  # of T these sizes would be no simple function
    blocks, inner, keys = new_size(min=1), new_size(min=1), new_size(min=1)

    def rows(*shape: Any) -> Tensor:
        return tokens.new_empty(shape, dtype=torch.int64)

    every = [rows(batch, blocks, kv_heads, n) for n in (keys, keys, inner)]
    return *every, rows(batch, length, heads), rows(batch, 2 * slots, 1), like.new_empty(batch, blocks, 1, inner, keys)


@torch.library.custom_op(
    "tcal::window_step",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor past, Tensor keys, Tensor values, Tensor queries, Tensor context, "
    "Tensor held, Tensor mask, float scale) -> (Tensor, Tensor)",
)
def _step(q: Tensor, k: Tensor, v: Tensor, past: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *rows, scale = others
    SHAPES.check(q, k, v, past)
    context, held = window_step_reference(q, k, v, past, rows=WindowRows(*rows), scale=scale)
    return context.contiguous(), held


@_step.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, past: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), torch.empty_like(past)


def window_rows(
    tokens: Tensor,
    past_lengths: Tensor,
    new_lengths: Tensor,
    like: Tensor,
    *,
    window: int,
    first: bool,
    slots: int,
    front: bool,
    heads: int,
    kv_heads: int,
) -> WindowRows:
    """`window_rows_reference`, usable under export."""
    sizes = (window, first, slots, front, heads, kv_heads)
    return WindowRows(*torch.ops.tcal.window_rows(tokens, past_lengths, new_lengths, like, *sizes))


def window_step(q: Tensor, k: Tensor, v: Tensor, past: Tensor, rows: WindowRows, scale: float) -> tuple[Tensor, Tensor]:
    """`window_step_reference`, usable under export. Raises ValueError when shapes do not fit."""
    return torch.ops.tcal.window_step(q, k, v, past, *rows, scale)
