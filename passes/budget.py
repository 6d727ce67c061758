"""Budgets of policies: how many attention sites stay softmax, by count, memory or divergence."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tcal_compiler.errors import ConfigError
from tcal_compiler.kernels.cached_attention import held_positions

from .types import SiteScan

BUDGETS = "N sites, P%, SIZE@TOKENS (2MB@8192: bytes of states and caches behind so many tokens)"
FLOAT_BYTES = 4  # the exported student is float32
_SIZE = re.compile(r"(\d+(?:\.\d+)?)(B|[KMG]i?B)@(\d+)")
_NATS = re.compile(r"(\d+(?:\.\d*)?(?:e-?\d+)?|\.\d+)nats")
_PREFIX = {"B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


KeptSets = Iterable[tuple[Sequence[int], float]]


def cache_bytes(tokens: int, *, kv_heads: int, key_dim: int, value_dim: int, window: int | None) -> int:
    """Bytes that softmax attention keeps of so many tokens of a sequence: keys and values, in float32.

    window: visible tokens, None for all; what the window has left behind is not kept.
    """
    kept = tokens if window is None else min(tokens, held_positions(window))
    return kept * kv_heads * (key_dim + value_dim) * FLOAT_BYTES


def state_bytes(*, heads: int, key_dim: int, value_dim: int) -> int:
    """Bytes of a Gated DeltaNet state, whatever the length: [heads, key_dim, value_dim] in float32."""
    return heads * key_dim * value_dim * FLOAT_BYTES


def _costs(scan: SiteScan, tokens: int) -> dict[int, tuple[int, int]]:
    """Site -> bytes behind so many tokens as softmax and as Gated DeltaNet."""
    costs = {}
    for s in scan.sites:
        dims = {"key_dim": s.key_dim, "value_dim": s.value_dim}
        cache = cache_bytes(tokens, kv_heads=s.num_kv_heads, window=s.window, **dims)
        costs[s.index] = cache, state_bytes(heads=s.num_heads, **dims)
    return costs


def memory(scan: SiteScan, keep: Iterable[int], tokens: int) -> int:
    """Bytes of states and caches of all convertible sites behind so many tokens of one sequence."""
    kept = set(keep)
    return sum(cache if i in kept else state for i, (cache, state) in _costs(scan, tokens).items())


@dataclass(frozen=True)
class Budget:
    """One of: count sites; at most size bytes behind `tokens` tokens; a KL of at most `nats` per token."""

    policy: str
    count: int | None = None
    size: int | None = None
    tokens: int = 0
    nats: float | None = None

    def pick(self, scan: SiteScan, sets: KeptSets) -> list[tuple[tuple[int, ...], float]]:
        """The sets up to the one that the budget asks for.

        sets: kept sites and the KL of that student, from none to all, one more at a time; no more of them are taken
        than it needs. By count the set of that many sites, by size the last one that fits, by nats the first one.

        Raises ConfigError when no set fits.
        """
        taken: list[tuple[tuple[int, ...], float]] = []
        fits = False
        for keep, kl in sets:
            if self.size is not None:
                if memory(scan, keep, self.tokens) <= self.size:
                    fits = True
                elif fits:
                    break
            taken.append((tuple(keep), kl))
            if len(keep) == self.count or (self.nats is not None and kl <= self.nats):
                return taken
        if not fits:
            raise ConfigError(f"--policy {self.policy}", "no set of sites that it ranks fits", "another budget")
        return taken


def parse_budget(scan: SiteScan, policy: str, text: str, *, hint: str) -> Budget:
    """The budget behind a policy's colon. Raises ConfigError when it is none, or none that these sites can keep."""
    where, total = f"--policy {policy}", len(scan.sites)
    if found := _SIZE.fullmatch(text):
        try:
            size, tokens = int(float(found[1]) * _PREFIX[found[2]]), int(found[3])
        except (ValueError, OverflowError):
            raise ConfigError(where, f"'{text}' is no size", hint) from None
        least = sum(min(c) for c in _costs(scan, tokens).values())
        if least > size:
            what = f"{size} bytes behind {tokens} tokens are too few: these sites need at least {least}"
            raise ConfigError(where, what, f"{least}B@{tokens} or more")
        return Budget(policy, size=size, tokens=tokens)
    if found := _NATS.fullmatch(text):
        return Budget(policy, nats=float(found[1]))
    try:
        percent = float(text[:-1]) if text.endswith("%") else None
        count = int(text) if percent is None else round(total * percent / 100)
    except (ValueError, OverflowError):
        raise ConfigError(where, f"'{text}' is no number", hint) from None
    if (percent is not None and not 0 <= percent <= 100) or not 0 <= count <= total:
        what = f"asks to keep {text} of {total} sites"
        raise ConfigError(where, what, f"a number from 0 to {total}, or a percentage from 0% to 100%")
    return Budget(policy, count=count)


def prefixes(ranking: Sequence[int]) -> KeptSets:
    """The sets that keep the first 0, 1, ... sites of a ranking, without a KL."""
    return ((tuple(ranking[:n]), math.nan) for n in range(len(ranking) + 1))
