"""The values that travel between passes: frozen, made of names and numbers, never of fx nodes.

Node names survive edits of a graph, pickling and printing; nodes do not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule


@dataclass(frozen=True)
class Check:
    """One comparison that was made: passed when measured <= allowed."""

    name: str
    measured: float
    allowed: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.measured <= self.allowed  # False for NaN


@dataclass(frozen=True)
class Capture:
    """A teacher as one graph: input_ids [B, T] int64, position_ids [B, T] when has_positions -> logits [B, T, V]."""

    gm: GraphModule
    has_positions: bool
    vocab_size: int
    implementation: str
    fingerprint: str
    checks: tuple[Check, ...] = ()

    def inputs(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The graph's arguments for plain, unpadded token ids [B, T]."""
        if not self.has_positions:
            return (ids,)
        return ids, torch.arange(ids.shape[1], device=ids.device).expand(ids.shape[0], -1).contiguous()


@dataclass(frozen=True)
class AttentionSite:
    """One softmax attention core, by node names.

    Attributes:
        index: position among the anchors of the model, from 0.
        layer: module path such as model.layers.3.self_attn, or "" when the exporter kept none.
        anchor: the scaled_dot_product_attention node; its output is [B, H, T, Dv]. Where the teacher writes attention
            out, this node and q, k, v are those that to_sdpa.WrittenToSdpa makes.
        q, k, v: [B, H, T, Dk], [B, K, T, Dk], [B, K, T, Dv], before K/V heads are repeated.
        x: the hidden state [B, T, C] that q, k and v are all computed from.
        y: the output projection's node [B, T, C].
        scale: factor of q k^T. window: number of visible tokens including oneself, None for all. first: tokens at the
            start that are visible whatever the window.
        softcap: c where scores are c tanh(scale q k^T / c), else 0. slopes: per head, what a score loses with each
            token of distance (alibi), or (). sinks: per head, the logit of an attention sink, or ().
        rope: q and k depend on the position. proof: how causality was established.
        written: where the teacher writes attention out, the node of its last product; else "".
        local: tokens that softmax attention beside the state sees once the site is converted (local_windows.py), or 0.
            local_first: it also sees the first token.
    """

    index: int
    layer: str
    anchor: str
    q: str
    k: str
    v: str
    x: str
    y: str
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    hidden: int
    scale: float
    window: int | None
    rope: bool
    proof: str
    written: str = ""
    softcap: float = 0.0
    slopes: tuple[float, ...] = ()
    sinks: tuple[float, ...] = ()
    first: int = 0
    local: int = 0
    local_first: bool = False

    @property
    def scores(self) -> str:
        """In words, what is done to the scores beside scale, mask and softmax."""
        parts = [f"soft cap {self.softcap:.6g}"] * bool(self.softcap)
        parts += ["alibi"] * bool(self.slopes) + ["sinks"] * bool(self.sinks)
        return ", ".join(parts) or "plain"

    def summary(self) -> dict[str, Any]:
        """The facts that a user sees, as plain JSON values."""
        where_set = {"first": self.first, "local_window": self.local, "local_first": self.local_first}
        return {
            "layer": self.index,
            "module": self.layer,
            "heads": self.num_heads,
            "kv_heads": self.num_kv_heads,
            "head_dim": self.key_dim,
            "value_dim": self.value_dim,
            "scale": self.scale,
            "window": self.window,
            "scores": self.scores,
            "rope": self.rope,
            "causal": self.proof,
        } | {name: value for name, value in where_set.items() if value}


@dataclass(frozen=True)
class Rejection:
    """An attention core that stays as it is, with the node and the reason."""

    node: str
    layer: str
    reason: str


@dataclass(frozen=True)
class SiteScan:
    sites: tuple[AttentionSite, ...]
    rejected: tuple[Rejection, ...]


@dataclass(frozen=True)
class Plan:
    """Which sites stay softmax and which become Gated DeltaNet, by site index; scores: what a policy ranked by."""

    keep: tuple[int, ...]
    convert: tuple[int, ...]
    policy: str
    scores: dict[int, float] = field(default_factory=dict)
