"""Attention over the last tokens and the first one, from token to token, with a state of a fixed size.

B batch, T new tokens, H query and K key/value heads, G = H / K, D head dim (the larger one of keys and values), N slots
of the state. State [B, 2 N, K D]: keys, then values, of a row's last N tokens, in order up to slot N - 1; with a front,
slot 0 is the row's first token and the others are its last N - 1. No query sees a slot that holds no token.

A block is Q = min(T, max(N + 1, BLOCK)) queries, which see J = N + Q keys: so T tokens cost O(T Q), and one token no
more than a block of one. Which rows of what is given come where depends on sizes and lengths alone: `window_rows` says
it once for all layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # queries: smaller products would cost more than what they leave out


class WindowRows(NamedTuple):
    """Numbers of rows, int64, in the order of `window_step`'s operator; nb is the number of blocks.

    keys, values [B, nb, K, J]: of [B, 2 N + 2 T, K] rows: the state's slots, then the new keys, then the new values.
    queries [B, nb, K, G Q]: of [B, T, H] queries. context [B, T, H]: of [B, nb, K, G Q] results.
    held [B, 2 N, 1]: of a row's 2 N + 2 T slots, those of the next state.
    mask [B, nb, 1, G Q, J]: 0 for what a query sees, else -inf.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    context: Tensor
    held: Tensor
    mask: Tensor


def window_rows_reference(
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
    """What `window_step` reads, for queries that see the last `window` tokens, themselves included.

    tokens [B, T]: any tensor of that shape. past_lengths, new_lengths [B]: real tokens of each row so far and among the
    T, behind which padding stands. like: of the mask's dtype. first: the first token is seen too, which needs a front.
    window <= N + 1, with a front N.
    """
    (batch, length), group, device = tokens.shape, heads // kv_heads, tokens.device
    size = min(length, max(slots + 1, BLOCK))
    row = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    past, start = past_lengths.view(-1, 1, 1, 1), torch.arange(0, length, size, device=device).view(-1, 1, 1)
    column, inner = torch.arange(slots + size, device=device), torch.arange(group * size, device=device)
    source, query = start + column, start + inner % size
    place = source.clamp(max=slots + length - 1).expand(batch, -1, -1, -1)
    place_held = new_lengths[:, None] + column[:slots]
    behind = (inner % size)[:, None] + slots - column
    seen = (behind >= 0) & (behind < window) & (past - slots + source >= int(first))
    if front:
        place = torch.where(column == 0, torch.where(past > 0, 0, slots), place)
        place_held = torch.where(column[:slots] == 0, place[:, 0, 0, :1], place_held)
        seen = seen | (column == 0) if first else seen

    def parts(at: Tensor) -> tuple[Tensor, Tensor]:
        """Slots of keys and of values among 2 N + 2 T."""
        new = at >= slots
        return at + slots * new, at + torch.where(new, slots + length, slots)

    head = torch.arange(kv_heads, device=device)[:, None]
    keys, values = ((2 * (slots + length) * row + at) * kv_heads + head for at in parts(place))
    queries = (length * row + query.clamp(max=length - 1)) * heads + head * group + inner // size
    token = torch.arange(length, device=device)
    at = token // size * heads * size + token % size
    context = row[:, 0] * len(start) * heads * size + at[:, None] + torch.arange(heads, device=device) * size
    mask = torch.zeros_like(seen, dtype=like.dtype).masked_fill(~seen, float("-inf"))[:, :, None]
    held = torch.cat(parts(place_held), 1)[:, :, None]
    return WindowRows(keys, values, queries, context, held, mask)


def window_step_reference(
    q: Tensor, k: Tensor, v: Tensor, past: Tensor, *, rows: WindowRows, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + mask) v over what is held and the new tokens, and what is held then.

    q [B, H, T, Dk], k [B, K, T, Dk], v [B, K, T, Dv], rotated already; past [B, 2 N, K D] -> the context [B, H, T, Dv]
    and the next past.
    """
    dim = past.shape[2] // k.shape[1]
    new = (F.pad(x, (0, dim - x.shape[3])).transpose(1, 2).flatten(2) for x in (k, v))
    slots = torch.cat([past, *new], 1)
    table = slots.reshape(-1, dim)
    keys, values = table[rows.keys], table[rows.values]
    queries = F.pad(q, (0, dim - q.shape[3])).transpose(1, 2).reshape(-1, dim)[rows.queries]
    weights = (scale * queries @ keys.transpose(-1, -2) + rows.mask).softmax(-1)
    context = (weights @ values).reshape(-1, dim)[rows.context][..., : v.shape[3]]
    return context.transpose(1, 2), torch.take_along_dim(slots, rows.held, 1)
