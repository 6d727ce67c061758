"""Budgets of policies: how many attention sites stay softmax, by count, memory or divergence."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tcal_compiler.errors import ConfigError
from tcal_compiler.kernels.cached_attention import held_positions

from .local_windows import local_held
from .types import SiteScan

BUDGETS = (
    "N sites, P%, SIZE@TOKENS (2MB@8192: bytes of states and caches behind so many tokens), TIME@TOKENS (12ms@8192: "
    "of the cores in the step behind them, as measured here)"
)
FLOAT_BYTES = 4  # the exported student is float32
_SIZE = re.compile(r"(\d+(?:\.\d+)?)(B|[KMG]i?B)@(\d+)")
_TIME = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s)@(\d+)")
_UNIT = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_NATS = re.compile(r"(\d+(?:\.\d*)?(?:e-?\d+)?|\.\d+)nats")
_PREFIX = {"B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


KeptSets = Iterable[tuple[Sequence[int], float]]
Costs = Mapping[int, tuple[float, float]]  # site -> what it takes as softmax and as Gated DeltaNet


def cache_bytes(tokens: int, *, kv_heads: int, key_dim: int, value_dim: int, window: int | None, first: int = 0) -> int:
    """Bytes that softmax attention keeps of so many tokens of a sequence: keys and values, in float32.

    window: visible tokens, None for all; what the window has left behind is not kept, but for the `first` ones.
    """
    kept = tokens if window is None else min(tokens, held_positions(window) + first)
    return kept * kv_heads * (key_dim + value_dim) * FLOAT_BYTES


def state_bytes(*, heads: int, kv_heads: int, key_dim: int, value_dim: int, held: int = 0) -> int:
    """Bytes of a converted site's state, whatever the length: [heads, key_dim, value_dim] in float32.

    held: tokens whose keys and values it holds too, for attention beside the state.
    """
    return (heads * key_dim * value_dim + 2 * held * kv_heads * max(key_dim, value_dim)) * FLOAT_BYTES


def _bytes(scan: SiteScan, tokens: int) -> dict[int, tuple[float, float]]:
    """Site -> bytes behind so many tokens as softmax and as Gated DeltaNet."""
    costs: dict[int, tuple[float, float]] = {}
    for s in scan.sites:
        dims = {"kv_heads": s.num_kv_heads, "key_dim": s.key_dim, "value_dim": s.value_dim}
        cache = cache_bytes(tokens, window=s.window, first=s.first, **dims)
        costs[s.index] = cache, state_bytes(heads=s.num_heads, held=local_held(s.local, s.local_first), **dims)
    return costs


def total(costs: Costs, keep: Iterable[int]) -> float:
    """Of all sites, of which some are kept."""
    kept = set(keep)
    return sum(softmax if i in kept else converted for i, (softmax, converted) in costs.items())


def memory(scan: SiteScan, keep: Iterable[int], tokens: int) -> int:
    """Bytes of states and caches of all convertible sites behind so many tokens of one sequence."""
    return int(total(_bytes(scan, tokens), keep))


@dataclass(frozen=True)
class Budget:
    """One of: count sites; at most `most` of costs; a KL of at most `nats` per token.

    timed: the costs are seconds of the step behind `tokens` tokens, and were not given: nothing can be picked.
    """

    policy: str
    count: int | None = None
    most: float | None = None
    costs: Costs | None = None
    tokens: int = 0
    nats: float | None = None

    @property
    def timed(self) -> bool:
        return self.most is not None and self.costs is None

    def pick(self, scan: SiteScan, sets: KeptSets) -> list[tuple[tuple[int, ...], float]]:
        """The sets up to the one that the budget asks for.

        sets: kept sites and the KL of that student, from none to all, one more at a time; no more of them are taken
        than it needs. By count the set of that many sites, by costs the last one that fits, by nats the first one.

        Raises ConfigError when no set fits, or the costs are not known.
        """
        if self.timed:
            what = "needs the decode step of every site measured"
            raise ConfigError(f"--policy {self.policy}", what, "tcal plan, which measures them; or SIZE@TOKENS")
        taken: list[tuple[tuple[int, ...], float]] = []
        fits = False
        for keep, kl in sets:
            if self.most is not None and self.costs is not None:
                if total(self.costs, keep) <= self.most:
                    fits = True
                elif fits:
                    break
            taken.append((tuple(keep), kl))
            if len(keep) == self.count or (self.nats is not None and kl <= self.nats):
                return taken
        if not fits:
            raise ConfigError(f"--policy {self.policy}", "no set of sites that it ranks fits", "another budget")
        return taken


def _timed_budget(policy: str, found: re.Match[str], seconds: Costs | None) -> Budget:
    most, tokens = float(found[1]) * _UNIT[found[2]], int(found[3])
    if seconds is not None and (least := sum(map(min, seconds.values()))) > most:
        what = f"{found[1]}{found[2]} behind {tokens} tokens are too few: on this machine these sites need at least "
        raise ConfigError(
            f"--policy {policy}", f"{what}{1e3 * least:.3g} ms", f"{1.1e3 * least:.3g}ms@{tokens} or more"
        )
    return Budget(policy, most=most, costs=seconds, tokens=tokens)


def parse_budget(scan: SiteScan, policy: str, text: str, *, hint: str, seconds: Costs | None = None) -> Budget:
    """The budget behind a policy's colon. Raises ConfigError when it is none, or none that these sites can keep.

    seconds: of every site's decode step, for a budget of time; without them it cannot pick.
    """
    where, sites = f"--policy {policy}", len(scan.sites)
    if found := _SIZE.fullmatch(text):
        try:
            size, tokens = int(float(found[1]) * _PREFIX[found[2]]), int(found[3])
        except (ValueError, OverflowError):
            raise ConfigError(where, f"'{text}' is no size", hint) from None
        costs = _bytes(scan, tokens)
        least = sum(map(min, costs.values()))
        if least > size:
            what = f"{size} bytes behind {tokens} tokens are too few: these sites need at least {least}"
            raise ConfigError(where, what, f"{least}B@{tokens} or more")
        return Budget(policy, most=size, costs=costs, tokens=tokens)
    if found := _TIME.fullmatch(text):
        try:
            return _timed_budget(policy, found, seconds)
        except (ValueError, OverflowError):
            raise ConfigError(where, f"'{text}' is no time", hint) from None
    if found := _NATS.fullmatch(text):
        return Budget(policy, nats=float(found[1]))
    try:
        percent = float(text[:-1]) if text.endswith("%") else None
        count = int(text) if percent is None else round(sites * percent / 100)
    except (ValueError, OverflowError):
        raise ConfigError(where, f"'{text}' is no number", hint) from None
    if (percent is not None and not 0 <= percent <= 100) or not 0 <= count <= sites:
        what = f"asks to keep {text} of {sites} sites"
        raise ConfigError(where, what, f"a number from 0 to {sites}, or a percentage from 0% to 100%")
    return Budget(policy, count=count)


def prefixes(ranking: Sequence[int]) -> KeptSets:
    """The sets that keep the first 0, 1, ... sites of a ranking, without a KL."""
    return ((tuple(ranking[:n]), math.nan) for n in range(len(ranking) + 1))
