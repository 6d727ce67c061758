"""Softmax attention over the last tokens and the first ones.

B batch, T tokens, H query and K key/value heads, Dk and Dv head dims.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from tcal_compiler.kernels.registration import without_autocast

_as_exported = False  # a plain global: what compiles a graph cannot read a context variable


@contextmanager
def as_exported() -> Iterator[None]:
    """Inside, in all threads, `local_attention` is computed as an exported program computes it, to the last bit."""
    global _as_exported
    before, _as_exported = _as_exported, True
    try:
        yield
    finally:
        _as_exported = before


def _seen(length: int, window: int, first: bool, device: torch.device) -> Tensor:
    """[T, T]: whether a query, by row, sees a key."""
    tokens = torch.arange(length, device=device)
    distance = tokens[:, None] - tokens
    near = distance < window
    return (distance >= 0) & (near | (tokens < 1) if first else near)


def local_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int, first: bool = False
) -> Tensor:
    """`local_attention` by scaled_dot_product_attention and a mask: the form in which a graph's reader knows it."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_seen(q.shape[2], window, first, q.device), scale=scale)


def local_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int, first: bool = False) -> Tensor:
    """softmax(scale q k^T) v over the last `window` tokens, oneself among them, and (first) the sequence's first token.

    q [B, H, T, Dk], k [B, K, T, Dk], v [B, K, T, Dv], H a multiple of K -> [B, H, T, Dv] in v's dtype, computed in
    float32 at least, autocast or not. Memory O(T window): blocks of `window` queries see their own block and the one
    before. Differentiable, usable under vmap; under export and inside `as_exported` it is `local_attention_reference`.
    """
    if torch.compiler.is_exporting() or _as_exported:
        return local_attention_reference(q, k, v, scale=scale, window=window, first=first)
    length, heads = q.shape[2], k.shape[1]
    if torch.compiler.is_compiling():  # where the length may be no number yet: one block is no case of its own
        blocks = -(-length // window) + 1
    else:
        window = min(window, length)  # a longer one sees no more, and a block of it would be mostly padding
        blocks = -(-length // window)
    behind = blocks * window - length
    exact = torch.promote_types(q.dtype, torch.float32)
    queries = F.pad(q.to(exact), (0, 0, 0, behind)).unflatten(2, (blocks, window)).unflatten(1, (heads, -1))

    def pairs(x: Tensor) -> Tensor:
        x = x.to(exact)
        parts = F.pad(x, (0, 0, window, behind)).unflatten(2, (blocks + 1, window))
        before, own = parts[:, :, :-1], parts[:, :, 1:]
        if first:  # in place of what no query of the block sees
            before = torch.cat([x[:, :, None, :1].expand(-1, -1, blocks, -1, -1), before[..., 1:, :]], 3)
        return torch.cat([before, own], 3)[:, :, None]

    query, key = torch.arange(window, device=q.device), torch.arange(2 * window, device=q.device)
    distance = query[:, None] + window - key
    token = (torch.arange(blocks, device=q.device)[:, None, None] - 1) * window + key
    seen = (distance >= 0) & (distance < window) & (token >= int(first))
    if first:
        seen = seen | (key == 0)
    with without_autocast(q.device):
        scores = (scale * queries @ pairs(k).transpose(-1, -2)).masked_fill(~seen, float("-inf"))
        return (scores.softmax(-1) @ pairs(v)).to(v.dtype).flatten(1, 2).flatten(2, 3)[:, :, :length]
