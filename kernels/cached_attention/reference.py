"""The definition of causal attention over a key/value cache. Rows of a batch may have seen different numbers of tokens.

B batch, T new tokens, H query heads, K key/value heads (H a multiple of K), D head dim, S slots of the cache,
R rotated channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotary positions, arXiv:2104.09864, on the first R channels of x [B, H, T, D]; cos and sin [B, 1, T, R / 2].

    Channel i is paired with i + R / 2, or (interleaved) 2 i with 2 i + 1.
    """
    rotated = 2 * cos.shape[-1]
    head, tail = x[..., :rotated], x[..., rotated:]
    if interleaved:
        a, b = head.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = head.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned, tail), -1)


def new_slots(past_lengths: Tensor, tokens: int) -> Tensor:
    """[B, T]: the slot of each new token, which is also its position."""
    return past_lengths[:, None] + torch.arange(tokens, device=past_lengths.device)


def write(cache: Tensor, new: Tensor, slots: Tensor) -> Tensor:
    """A copy of cache [B, K, S, D] with new [B, K, T, D] at slots [B, T]."""
    return cache.scatter(2, slots[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3]), new)


def hidden_keys(distance: Tensor, window: int) -> Tensor:
    """True for keys `distance` slots behind their query that it does not see: distance < 0, or >= window (0: none)."""
    hidden = distance < 0
    return hidden | (distance >= window) if window else hidden


def score_mask(distance: Tensor, *, window: int, slopes: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of keys `distance` [.., T, S] slots behind their query: [.., 1 or H, T, S].

    -inf for hidden keys, else -slope distance, with one slope [H] for each head (alibi, arXiv:2108.12409) or none.
    """
    far = distance.unsqueeze(-3)
    bias = torch.zeros_like(far, dtype=dtype) if slopes is None else -slopes.to(dtype)[:, None, None] * far.to(dtype)
    return bias.masked_fill(hidden_keys(far, window), float("-inf"))


def attention_weights(
    q: Tensor, k: Tensor, mask: Tensor, *, scale: float, softcap: float = 0.0, sinks: Tensor | None = None
) -> Tensor:
    """Softmax over s of c tanh(scale q k^T / c) + mask, where exp(sink) also counts in the denominator: [B, H, T, S].

    q [B, H, T, D], k [B, H, S, D], mask to be added to [B, H, T, S]; c = softcap, 0: the scores as they are; sinks [H]
    or None. With sinks a row sums to less than 1.
    """
    scores = q @ k.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat((scores, column), -1).softmax(-1)[..., :-1]


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    *,
    scale: float,
    window: int,
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention of q [B, H, T, D] at slots [B, T] over slots 0 .. own, or over the last `window` (0: all)."""
    distance = slots[:, :, None] - torch.arange(keys.shape[2], device=keys.device)
    groups = q.shape[1] // keys.shape[1]
    if not softcap and slopes is None and sinks is None:
        visible = ~hidden_keys(distance, window)[:, None]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=visible, scale=scale, enable_gqa=groups > 1)
    mask = score_mask(distance, window=window, slopes=slopes, dtype=q.dtype)
    keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
    return attention_weights(q, keys, mask, scale=scale, softcap=softcap, sinks=sinks) @ values


def cached_attention_reference(
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
    """Row b's new token i goes to slot past_lengths[b] + i, and sees every slot up to its own.

    q [B, H, T, Dk], k [B, K, T, Dk], v [B, K, T, Dv]; past_key [B, K, S, Dk] and past_value [B, K, S, Dv], of which row
    b holds past_lengths[b] tokens (int64 [B]). total: slots needed, at least max(past_lengths) + T; a cache with fewer
    grows to it. window: visible slots including one's own, 0 for all. cos, sin [N, R / 2]: q and k are rotated by row
    `slot` of these tables first. softcap, slopes [H], sinks [H]: see attention_weights and score_mask. What lies behind
    a row's last token is never read, so a row may end in padding that later tokens overwrite.

    Returns the context [B, H, T, Dv] and the new caches of max(S, total) slots.
    """
    slots = new_slots(past_lengths, q.shape[2])
    if cos is not None and sin is not None:
        rows = [table.to(q.dtype)[slots][:, None] for table in (cos, sin)]
        q, k = (rotate(x, *rows, interleaved=interleaved) for x in (q, k))
    room = max(0, total - past_key.shape[2])
    keys, values = (write(F.pad(cache, (0, 0, 0, room)), x, slots) for cache, x in ((past_key, k), (past_value, v)))
    context = attend(q, keys, values, slots, scale=scale, window=window, softcap=softcap, slopes=slopes, sinks=sinks)
    return context, keys, values
