"""Sliding-window attention over a cache that holds the window alone, in terms of `cached_attention`.

B batch, T new tokens, H query heads, K key/value heads, Dk and Dv head dims, R positions that are held.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tcal_compiler.kernels.scores import Scores

from .op import cached_attention


def held_positions(window: int) -> int:
    """What a query's window holds beside itself, and at least 1, so that no tensor is empty."""
    return max(window - 1, 1)


def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_lengths: Tensor,
    new_lengths: Tensor,
    past_tokens: int,
    *flat: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row b's attention over what is held and the new tokens; flat: Scores with a window of at most R - first + 1.

    q [B, H, T, Dk], k [B, K, T, Dk], v [B, K, T, Dv], rotated already. past_key [B, K, R, Dk] and past_value
    [B, K, R, Dv]: min(past_lengths[b], R) tokens of row b, in order, from slot 0 on: its `first` ones (Scores) and the
    last ones. new_lengths [B]: how many of the T tokens are real; padding stands behind them. past_tokens: at least
    max(past_lengths).

    Returns the context [B, H, T, Dv] and the next pasts. Raises ValueError when shapes do not fit.
    """
    batch, kv_heads, slots, _ = past_key.shape
    scores = Scores(*flat)
    held, filled = past_lengths.clamp(max=slots), torch.sym_min(past_tokens, slots)
    total = filled + q.shape[2]
    old_keys, old_values = (x.narrow(2, 0, filled) for x in (past_key, past_value))
    context, *grown = cached_attention(q, k, v, old_keys, old_values, held, total=total, scores=scores)
    count = (held + new_lengths)[:, None]
    kept = torch.arange(slots, device=q.device)
    last = (count - slots).clamp(min=0) * (kept >= scores.first) + kept
    last = torch.minimum(last, (count - 1).clamp(min=0))  # slots behind a row's last token are never read
    rows = torch.arange(batch * kv_heads, device=q.device).view(batch, kv_heads, 1) * total + last[:, None]
    keys, values = (F.embedding(rows, x.flatten(0, 2)) for x in grown)
    return context, keys, values
