"""The shapes that an operator takes, written once: the check and its message come from the same text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)  # one of each: it is looked up at every call
class Shapes:
    """`wants` names each tensor and its sizes: "q [B,T,H,Dk], k [B,T,K,Dk]"; equal letters are equal sizes.

    Attributes:
        positive: sizes that may not be 0.
        groups: (H, K): H is a multiple of K, and K is not 0.
    """

    op: str
    wants: str
    positive: tuple[str, ...] = ()
    groups: tuple[str, str] | None = None

    @cached_property
    def _named(self) -> list[tuple[str, str]]:
        return re.findall(r"(\w+) \[([^\]]*)\]", self.wants)

    def check(self, *tensors: Tensor | None) -> dict[str, int]:
        """The size of each letter. None stands for an optional tensor that is not given. Raises ValueError."""
        return self._sizes(*(None if t is None else t.shape for t in tensors))

    def check_numbers(self, *tensors: Tensor | None) -> dict[str, int]:
        """As `check`, of sizes that are numbers, not symbols: those seen before cost less time. Not to be changed."""
        return _seen(self, *(None if t is None else t.shape for t in tensors))

    def _sizes(self, *shapes: torch.Size | None) -> dict[str, int]:
        sizes: dict[str, int] = {}
        named = self._named
        fits = len(named) == len(shapes)
        for (_, letters), shape in zip(named, shapes, strict=False):
            if shape is not None:
                want = letters.split(",")
                fits = fits and len(want) == len(shape)
                fits = fits and all(sizes.setdefault(n, s) == s for n, s in zip(want, shape, strict=True))
        if fits and self.groups:
            heads, kv_heads = (sizes[n] for n in self.groups)
            fits = kv_heads > 0 and heads % kv_heads == 0
        if fits and all(sizes[n] > 0 for n in self.positive):
            return sizes
        found = {n: tuple(shape) for (n, _), shape in zip(named, shapes, strict=False) if shape is not None}
        also = [f"{n} > 0" for n in self.positive]
        if self.groups:
            also.append("{} a multiple of {}".format(*self.groups))
        condition = f" with {' and '.join(also)}" if also else ""
        raise ValueError(f"{self.op}: want {self.wants}{condition}; got {found}")


@lru_cache(maxsize=1024)
def _seen(shapes: Shapes, *sizes: torch.Size | None) -> dict[str, int]:
    return shapes._sizes(*sizes)
