"""How softmax attention makes its weights from q k^T: everything that shapes scores, in one value.

B batch, T query tokens, S key tokens, H query heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Scores:
    """Softmax over s of c tanh(scale q_t k_s / c) - slope (t - s), for 0 <= t - s < window, and for s < first.

    Fields stand in the order of SCHEMA: an operator takes them flat, and everything else takes this object. A field may
    hold a graph's node in place of its value.

    Attributes:
        window: visible tokens, including one's own; 0 for all.
        softcap: c; 0 leaves the scores as they are.
        slopes: [H], or None: what a score loses with each token of distance (alibi, arXiv:2108.12409).
        sinks: [H], or None: logits whose exp also counts in the denominator, so that a row sums to less than 1.
        first: tokens at the start that every later one sees, whatever the window (arXiv:2309.17453).
    """

    scale: float
    window: int = 0
    softcap: float = 0.0
    slopes: Tensor | None = None
    sinks: Tensor | None = None
    first: int = 0

    SCHEMA = "float scale, int window=0, float softcap=0.0, Tensor? slopes=None, Tensor? sinks=None, int first=0"

    @property
    def flat(self) -> tuple[Any, ...]:
        """An operator's arguments; Scores(*flat) is the object again."""
        return tuple(getattr(self, f.name) for f in fields(self))

    @property
    def plain(self) -> bool:
        """Whether scale and what is visible are all there is."""
        return not self.softcap and self.slopes is None and self.sinks is None

    def check(self, op: str, heads: int) -> None:
        """Raises ValueError when a value per head has another shape than [heads]."""
        for name in ("slopes", "sinks"):
            x = getattr(self, name)
            if x is not None and tuple(x.shape) != (heads,):
                raise ValueError(f"{op}: want {name} [H] for q [B,H,T,Dk]; got {tuple(x.shape)}, H = {heads}")

    def hidden(self, distance: Tensor) -> Tensor:
        """[.., T, S]: whether a query does not see a key, `distance` tokens behind it; keys from the first one on."""
        hidden = distance < 0
        if not self.window:
            return hidden
        far = distance >= self.window
        if self.first:
            far = far & (torch.arange(distance.shape[-1], device=distance.device) >= self.first)
        return hidden | far

    def mask(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of keys `distance` [.., T, S] tokens behind their query: [.., 1 or H, T, S].

        -inf for hidden keys, else -slope distance, or 0.
        """
        far = distance.unsqueeze(-3)
        if self.slopes is None:
            bias = torch.zeros_like(far, dtype=dtype)
        else:
            bias = -self.slopes.to(dtype)[:, None, None] * far.to(dtype)
        return bias.masked_fill(self.hidden(far), float("-inf"))

    def weights(self, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        """Attention rows [B, H, T, S] of q [B, H, T, D] over k [B, H, S, D]; mask is added to capped scores."""
        scores = q @ k.transpose(-1, -2) * self.scale
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores + mask
        if self.sinks is None:
            return scores.softmax(-1)
        column = self.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat((scores, column), -1).softmax(-1)[..., :-1]
