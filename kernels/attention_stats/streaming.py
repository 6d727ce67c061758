"""The attention statistics in plain PyTorch, some query rows at a time: memory is O(block T)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tcal_compiler.kernels.gated_delta_rule.reference import expand_heads
from tcal_compiler.kernels.scores import Scores

from .reference import OCTAVES, sums_of_outputs

BLOCK = 128


def attention_rows(
    q: Tensor,
    k: Tensor,
    *,
    scores: Scores,
    start: int,
    stop: int,
) -> Tensor:
    """Attention rows of query tokens start..stop: [B, H, stop - start, stop], causal and windowed.

    q [B, H, T, Dk] and k [B, H, T, Dk] with heads already expanded.
    """
    distance = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(stop, device=q.device)[None]
    return scores.weights(q[:, :, start:stop], k[:, :, :stop], scores.mask(distance, q.dtype))


def _blocks(q: Tensor, k: Tensor, v: Tensor, *, block: int, scores: Scores) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each block of query tokens: their rows, their context [B, H, block, Dv], and t - s [block, stop]."""
    heads, length = q.shape[1], q.shape[2]
    k, v = (expand_heads(x.transpose(1, 2), heads).transpose(1, 2) for x in (k, v))
    for start in range(0, length, block):
        stop = min(start + block, length)
        rows = attention_rows(q, k, start=start, stop=stop, scores=scores)
        far = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(stop, device=q.device)[None]
        yield rows, rows @ v[:, :, :stop], far.clamp_min(0)


def attention_statistics_streaming(
    q: Tensor, k: Tensor, v: Tensor, *, scores: Scores, block: int = BLOCK
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contract of `attention_statistics_reference`, for all kinds of scores; rows in q's dtype.

    With sinks, the context is the teacher's, and the other sums are of rows that are scaled to sum to 1: where a token
    looks, if it does not look at the sink.
    """
    heads = q.shape[1]
    distance, entropy, mass = (
        torch.zeros(heads, *size, dtype=torch.float64, device=q.device) for size in ((), (), (OCTAVES,))
    )
    context = []
    for rows, part, far in _blocks(q, k, v, block=block, scores=scores):
        context.append(part)
        if scores.sinks is not None:
            rows = rows / rows.sum(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
        distance += (rows * far.clamp_min(0.5).to(rows.dtype)).sum((0, 2, 3), dtype=torch.float64)
        entropy -= torch.xlogy(rows, rows).sum((0, 2, 3), dtype=torch.float64)
        octave = torch.where(far > 0, far.clamp_min(1).log2().floor().long() + 1, 0).clamp_max(OCTAVES - 1)
        by_pair = rows.sum(0, dtype=torch.float64).flatten(1)
        mass.index_add_(1, octave.flatten(), by_pair)
    return torch.cat(context, 2).transpose(1, 2), distance, entropy, mass


def attention_output_sums_streaming(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, *, scores: Scores, block: int = BLOCK
) -> tuple[Tensor, ...]:
    """Contract of `attention_output_sums_reference`; rows and context in q's dtype."""
    total: tuple[Tensor, ...] = ()
    for start, (_, part, _) in enumerate(_blocks(q, k, v, block=block, scores=scores)):
        sums = sums_of_outputs(part.transpose(1, 2), o[:, start * block : (start + 1) * block])
        total = tuple(a + b for a, b in zip(total, sums, strict=True)) if total else sums
    return total
