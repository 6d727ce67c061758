"""Choosing the next token from logits, in numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tcal_compiler.errors import ConfigError


@dataclass(frozen=True)
class Sampler:
    """temperature 0 is greedy. top_k keeps the k likeliest tokens, top_p the fewest whose probability reaches p."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(
                "temperature", f"{self.temperature} is not a number from 0 up", "0 is greedy, 1 the model's own"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError("top_k", f"{self.top_k} keeps no token", "at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError("top_p", f"{self.top_p} is no probability", "above 0, at most 1")

    def __call__(self, logits: NDArray[np.floating], rng: np.random.Generator) -> int:
        """The next token of logits [V]."""
        if self.temperature == 0:
            return int(logits.argmax())
        scaled = logits.astype(np.float64) / self.temperature
        order = np.argsort(-scaled, kind="stable")[: self.top_k]
        weights = np.exp(scaled[order] - scaled[order[0]])
        weights /= weights.sum()
        if self.top_p is not None:
            count = int(np.searchsorted(weights.cumsum(), self.top_p)) + 1
            order, weights = order[:count], weights[:count] / weights[:count].sum()
        return int(rng.choice(order, p=weights))
