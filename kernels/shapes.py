"""The shapes that an operator takes, written once: the check and its message come from the same text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass(frozen=True)
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
        sizes: dict[str, int] = {}
        named = self._named
        fits = len(named) == len(tensors)
        for (_, letters), tensor in zip(named, tensors, strict=False):
            if tensor is not None:
                want = letters.split(",")
                fits = fits and len(want) == tensor.dim()
                fits = fits and all(sizes.setdefault(n, s) == s for n, s in zip(want, tensor.shape, strict=True))
        if fits and self.groups:
            heads, kv_heads = (sizes[n] for n in self.groups)
            fits = kv_heads > 0 and heads % kv_heads == 0
        if fits and all(sizes[n] > 0 for n in self.positive):
            return sizes
        found = {n: tuple(t.shape) for (n, _), t in zip(named, tensors, strict=False) if t is not None}
        also = [f"{n} > 0" for n in self.positive]
        if self.groups:
            also.append("{} a multiple of {}".format(*self.groups))
        condition = f" with {' and '.join(also)}" if also else ""
        raise ValueError(f"{self.op}: want {self.wants}{condition}; got {found}")
