"""Sequences of several lengths in one row: tensors [1, T, ...], of which sequence i is tokens cu[i] to cu[i + 1].

`bounds` are these numbers on the host. A sequence of no tokens keeps its initial state.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

NOT_WHOLE = -1  # in joined numbers of several rows: those of a row that does not reach from 0 to its tokens


def read_bounds(cu_seqlens: Tensor, batch: int, tokens: int, states: int) -> tuple[int, ...]:
    """The numbers of cu_seqlens [N + 1]; waits for the device if they are not on the CPU. Raises ValueError."""
    where = "gated_delta_rule: cu_seqlens"
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{where}: want int32 or int64, got {cu_seqlens.dtype}")
    if batch != 1 or len(cu_seqlens) != states + 1:
        raise ValueError(
            f"{where}: want a batch of 1 and one number more than there are initial states; "
            f"got a batch of {batch}, {len(cu_seqlens)} numbers and {states} states"
        )
    bounds = tuple(cu_seqlens.tolist())
    if NOT_WHOLE in bounds:
        raise ValueError(f"{where}: below 0, or, under vmap, not from 0 to the number of tokens in each row; {bounds}")
    fall = next((i for i, (start, end) in enumerate(pairwise(bounds)) if end < start), None)
    if fall is not None:
        raise ValueError(f"{where}: may not fall, but goes from {bounds[fall]} to {bounds[fall + 1]} at {fall}")
    if bounds[0] != 0 or bounds[-1] != tokens:
        raise ValueError(f"{where}: want 0 to {tokens}, the number of tokens; got {bounds[0]} to {bounds[-1]}")
    return bounds


def forward_each(
    rule: Callable[..., tuple[Tensor, Tensor]], bounds: tuple[int, ...], *inputs: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """What `rule` (contract of `gated_delta_rule_reference`) gives for each sequence alone."""
    *by_token, states = inputs
    outputs, finals = [], []
    for i, (start, end) in enumerate(pairwise(bounds)):
        final = states[i : i + 1]
        if end > start:
            out, final = rule(*(x[:, start:end] for x in by_token), final, scale=scale)
            outputs.append(out)
        finals.append(final)
    return torch.cat(outputs, 1), torch.cat(finals)


def backward_each(
    rule: Callable[..., tuple[Tensor, ...]],
    bounds: tuple[int, ...],
    d_out: Tensor,
    d_state: Tensor,
    *inputs: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    """What `rule` (contract of `gated_delta_rule_chunked_backward`) gives for each sequence alone."""
    *by_token, states = inputs
    grads, d_starts = [], []
    for i, (start, end) in enumerate(pairwise(bounds)):
        some, t = slice(i, i + 1), slice(start, end)
        d_start = d_state[some].to(states.dtype)
        if end > start:
            *of_tokens, d_start = rule(
                d_out[:, t], d_state[some], *(x[:, t] for x in by_token), states[some], scale=scale
            )
            grads.append(of_tokens)
        d_starts.append(d_start)
    return (*(torch.cat(x, 1) for x in zip(*grads, strict=True)), torch.cat(d_starts))
