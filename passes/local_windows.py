"""Converted sites with softmax attention over their last tokens beside the state."""

from __future__ import annotations

from dataclasses import replace

from .types import AttentionSite, SiteScan


def local_tokens(site: AttentionSite, window: int) -> int:
    """Tokens of the window beside the state: no more than the teacher's own sees; 0 where scores are not plain.

    A soft cap, alibi or sinks would have to be learnt anew beside the state: such a site has its state alone.
    """
    return min(window, site.window or window) if site.scores == "plain" else 0


def with_local_windows(scan: SiteScan, window: int) -> SiteScan:
    """The scan whose sites, once converted, have softmax attention over so many tokens beside their state; 0: none."""
    return replace(scan, sites=tuple(replace(s, local=local_tokens(s, window)) for s in scan.sites))
