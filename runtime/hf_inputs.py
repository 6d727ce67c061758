"""Checks of what a student of the transformers kind is called with, beside its ids and mask."""

from __future__ import annotations

import torch
from torch import Tensor

from tcal_compiler.errors import DataError


def check_kept(keep: int | Tensor, tokens: int) -> None:
    """Raises DataError for a number below 0, and for places that new tokens [B, T] do not have."""
    if not isinstance(keep, Tensor):
        wrong = "" if type(keep) is int and keep >= 0 else f"is {keep!r}"
    elif keep.dtype == torch.bool:
        wrong = "" if list(keep.shape) == [tokens] else f"is a choice of shape {list(keep.shape)}"
    elif keep.is_floating_point() or keep.is_complex() or keep.dim() > 1:
        wrong = f"is {keep.dtype} {list(keep.shape)}"
    else:
        low, high = (int(x) for x in keep.aminmax()) if keep.numel() else (0, 0)
        wrong = "" if -tokens <= low and high < tokens else f"names the tokens {low}..{high}"
    if wrong:
        hint = "a number of last tokens, 0 for all, or their places in one dimension"
        raise DataError("logits_to_keep", f"{wrong}; there are {tokens} new tokens", hint)


def check_labels(labels: Tensor, ids: Tensor, keep: int | Tensor, vocab: int) -> None:
    """Raises DataError for labels that no loss of the new tokens ids [B, T] can be made of."""
    if isinstance(keep, Tensor) or keep:
        raise DataError("labels", "are given with logits_to_keep; a loss needs the logits of all tokens", "one of them")
    if labels.shape != ids.shape or labels.dtype not in (torch.int32, torch.int64):
        what = f"are {labels.dtype} {list(labels.shape)}; want int64 {list(ids.shape)}, as the ids"
        raise DataError("labels", what, "the ids themselves, -100 where no loss counts")
    counted = labels[labels != -100]
    low, high = (int(x) for x in counted.aminmax()) if counted.numel() else (0, 0)
    if low < 0 or high >= vocab:
        raise DataError("labels", f"{low}..{high} are outside the vocabulary of {vocab}", "-100 where no loss counts")
