"""The definition of causal attention over a key/value cache. Rows of a batch may have seen different numbers of tokens.

B batch, T new tokens, H query heads, K key/value heads (H a multiple of K), D head dim, S slots of the cache,
R rotated channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tcal_compiler.kernels.scores import Scores


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


def attend(q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, scores: Scores) -> Tensor:
    """Softmax attention of q [B, H, T, D] at slots [B, T] over the slots up to its own."""
    distance = slots[:, :, None] - torch.arange(keys.shape[2], device=keys.device)
    groups = q.shape[1] // keys.shape[1]
    if scores.plain:
        visible = ~scores.hidden(distance)[:, None]
        return F.scaled_dot_product_attention(
            q, keys, values, attn_mask=visible, scale=scores.scale, enable_gqa=groups > 1
        )
    keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
    return scores.weights(q, keys, scores.mask(distance, q.dtype)) @ values


def cached_attention_reference(
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
    """Row b's new token i goes to slot past_lengths[b] + i, and sees every slot up to its own.

    q [B, H, T, Dk], k [B, K, T, Dk], v [B, K, T, Dv]; past_key [B, K, S, Dk] and past_value [B, K, S, Dv], of which row
    b holds past_lengths[b] tokens (int64 [B]). total: slots needed, at least max(past_lengths) + T; a cache with fewer
    grows to it. cos, sin [N, R / 2]: q and k are rotated by row `slot` of these tables first. What lies behind a row's
    last token is never read, so a row may end in padding that later tokens overwrite.

    Returns the context [B, H, T, Dv] and the new caches of max(S, total) slots.
    """
    slots = new_slots(past_lengths, q.shape[2])
    if cos is not None and sin is not None:
        rows = [table.to(q.dtype)[slots][:, None] for table in (cos, sin)]
        q, k = (rotate(x, *rows, interleaved=interleaved) for x in (q, k))
    room = max(0, total - past_key.shape[2])
    keys, values = (write(F.pad(cache, (0, 0, 0, room)), x, slots) for cache, x in ((past_key, k), (past_value, v)))
    context = attend(q, keys, values, slots, scores)
    return context, keys, values
