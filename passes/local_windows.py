"""Converted sites with softmax attention over their last tokens, and the first, beside the state."""

from __future__ import annotations

from dataclasses import replace

from tcal_compiler.kernels.cached_attention import held_positions

from .types import AttentionSite, SiteScan


def local_tokens(site: AttentionSite, window: int) -> int:
    """Tokens of the window beside the state: no more than the teacher's own sees; 0 where scores are not plain.

    A soft cap, alibi or sinks would have to be learnt anew beside the state: such a site has its state alone.
    """
    return min(window, site.window or window) if site.scores == "plain" else 0


def with_local_windows(scan: SiteScan, window: int) -> SiteScan:
    """The scan whose sites, once converted, have softmax attention over so many tokens beside their state; 0: none.

    It also sees the first token where the teacher does: what heads give it when nothing else concerns them
    (arXiv:2309.17453) would fall on the window otherwise.
    """
    return replace(scan, sites=tuple(_with_local_window(s, local_tokens(s, window)) for s in scan.sites))


def _with_local_window(site: AttentionSite, window: int) -> AttentionSite:
    return replace(site, local=window, local_first=window > 0 and (site.window is None or site.first > 0))


def local_held(local: int, local_first: bool) -> int:
    """Tokens whose keys and values a converted site holds beside its state."""
    return held_positions(local) + local_first if local else 0
