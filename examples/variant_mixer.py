"""Variants of what replaces a site, for site_variants.py: mixers with further parameters, and how they start.

B sequences, T tokens, H query heads, K key/value heads, G = H / K, Dk and Dv key and value dim, C width.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcal_compiler.errors import UnsupportedModelError
from tcal_compiler.kernels.attention_stats import EPS
from tcal_compiler.kernels.gated_delta_rule import gated_delta_rule
from tcal_compiler.kernels.gated_rms_norm import gated_rms_norm
from tcal_compiler.kernels.gates import decay_gate, l2_normalize
from tcal_compiler.passes.graph import set_module
from tcal_compiler.passes.rewrite_gdn import mixer_path
from tcal_compiler.passes.types import AttentionSite
from tcal_compiler.runtime.calibrate import SiteCalibrator
from tcal_compiler.runtime.initialize import closed_form_output_, set_memory_
from tcal_compiler.runtime.mixer import GdnMixer
from tcal_compiler.runtime.statistics import SiteStats, attention_statistics
from tcal_compiler.runtime.student import Student
from tcal_compiler.runtime.taps import SiteGroup

BYTES = 4  # of a number in a state


@dataclass(frozen=True)
class Variant:
    """What differs from the product.

    Attributes:
        taps: of a causal depthwise convolution on q, k and v, the identity at first; 1: none.
        window: tokens of a softmax window beside the state, its output times a scale per head behind the gate; 0: none.
        window_fit: that scale by least squares together with the gate, instead of 0.
        sinks: first tokens that the window always sees too.
        alone: the window without the recurrence.
        far: the half-life from the distances beyond the window alone.
        beta_range: beta in (0, beta_range), with the same start.
        shared: one state per key/value head; its decay and write gate are the means over the query heads of the group.
        wide: q and k of a group mapped to G Dk by matrices with orthonormal columns at first.
        from_x: to these a linear map of x is added, 0 at first.
        entropy: the write gate's start from E_t / ln(t + 1) instead of E_t.
        loss: residual: a token's error over the mean square of the residual stream there; site-kl: each site's loss
            times a constant, the KL that the site causes.
        batch: sequences in a step of alignment, with as many tokens in all; None: as given. rate: factor of the rates.
    """

    taps: int = 1
    window: int = 0
    window_fit: bool = False
    sinks: int = 0
    alone: bool = False
    far: bool = False
    beta_range: float = 1.0
    shared: bool = False
    wide: bool = False
    from_x: bool = False
    entropy: bool = False
    loss: Literal["plain", "residual", "site-kl"] = "plain"
    batch: int | None = None
    rate: float = 1.0

    @classmethod
    def of(cls, name: str) -> Variant:
        """ "conv+window": the settings of both; "window-16" and "window-fit-16" have another size.

        Raises ValueError for a name that is not in PARTS.
        """
        settings: dict[str, Any] = {}
        for part in name.split("+"):
            if sized := re.fullmatch("(window|window-fit|window-only)-([1-9][0-9]*)", part):
                settings |= PARTS[sized[1]] | {"window": int(sized[2])}
                continue
            if part not in PARTS:
                raise ValueError(f"no variant {part}; there are {', '.join(PARTS)}")
            settings |= PARTS[part]
        return cls(**settings)

    @property
    def plain(self) -> bool:
        """Whether the sites are the product's."""
        return replace(self, entropy=False, loss="plain", batch=None, rate=1.0) == Variant()


PARTS: dict[str, dict[str, Any]] = {
    "base": {},
    "conv": {"taps": 4},
    "window": {"window": 64},
    "window-fit": {"window": 64, "window_fit": True},
    "window-only": {"window": 64, "alone": True},
    "sink1": {"sinks": 1},
    "sinks": {"sinks": 4},
    "far": {"far": True},
    "beta2": {"beta_range": 2.0},
    "kvstate": {"shared": True},
    "kvstate-wide": {"shared": True, "wide": True},
    "kvstate-wide-x": {"shared": True, "wide": True, "from_x": True},
    "entropy": {"entropy": True},
    "residual-loss": {"loss": "residual"},
    "site-weights": {"loss": "site-kl"},
    "batch2": {"batch": 2},
    "batch32": {"batch": 32},
    "rate0.5": {"rate": 0.5},
    "rate2": {"rate": 2.0},
}


def convolve(x: Tensor, taps: Tensor) -> Tensor:
    """y_t = sum_j taps_j x_{t-j}, per channel: x [B, N, T, D], taps [J, N, D] -> [B, N, T, D]."""
    length = x.shape[2]
    return sum(w[:, None] * F.pad(x, (0, 0, j, 0))[:, :, :length] for j, w in enumerate(taps.unbind(0)))  # type: ignore[return-value]


def window_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int, sinks: int = 0) -> Tensor:
    """softmax(scale q k^T) v over the last `window` tokens, oneself among them, and the first `sinks` of all.

    q [B, H, T, Dk], k [B, K, T, Dk], v [B, K, T, Dv] -> [B, H, T, Dv]. Blocks of `window` queries see their own block
    and the one before.
    """
    length, heads = q.shape[2], k.shape[1]
    blocks, first = -(-length // window), min(sinks, length)
    behind = blocks * window - length
    qb = F.pad(q, (0, 0, 0, behind)).unflatten(2, (blocks, window)).unflatten(1, (heads, -1))

    def seen_by(x: Tensor) -> Tensor:
        parts = F.pad(x, (0, 0, window, behind)).unflatten(2, (blocks + 1, window))
        start = x[:, :, None, :first].expand(-1, -1, blocks, -1, -1)
        return torch.cat([start, parts[:, :, :-1], parts[:, :, 1:]], 3)[:, :, None]

    here = torch.arange(blocks * window, device=q.device).view(blocks, window, 1)
    key = torch.arange(-window, window, device=q.device) + here[:, :1]
    near = (key >= 0) & (key <= here) & (key > here - window)
    far = torch.arange(first, device=q.device) <= here - window
    scores = scale * qb @ seen_by(k).transpose(-1, -2)
    weights = scores.masked_fill(~torch.cat([far, near], -1), float("-inf")).softmax(-1)
    return (weights @ seen_by(v)).flatten(1, 2).flatten(2, 3)[:, :, :length]


class VariantMixer(GdnMixer):
    """GdnMixer with what a Variant adds; new parameters start so that nothing changes, but for shared states."""

    def __init__(self, site: AttentionSite, variant: Variant) -> None:
        super().__init__(site)
        if site.softcap or site.slopes or site.sinks:
            raise UnsupportedModelError(site.layer or site.anchor, f"scores with {site.scores}", "another teacher")
        self.site, self.variant = site, variant
        heads, groups, width = site.num_heads, site.num_kv_heads, self.key_width
        if variant.wide and heads == groups:
            raise UnsupportedModelError(site.layer or site.anchor, "has no shared key heads", "kvstate without -wide")
        if (variant.alone or variant.far or variant.sinks) and not variant.window:
            raise UnsupportedModelError(
                site.layer or site.anchor, "gets no window", "window+ before the variant's name"
            )
        if variant.taps > 1:
            for name, count, dim in (
                ("q", heads, site.key_dim),
                ("k", groups, site.key_dim),
                ("v", groups, site.value_dim),
            ):
                taps = torch.zeros(variant.taps, count, dim)
                taps[0] = 1
                self.register_parameter(f"{name}_taps", nn.Parameter(taps))
        if variant.window:
            self.window_scale = nn.Parameter(torch.zeros(heads))
        if variant.wide:  # entries of mean square 1, so that the rates of gates and norms fit them
            start = torch.linalg.qr(
                torch.randn(groups, width, site.key_dim, generator=torch.Generator().manual_seed(0))
            )
            for name in ("q_map", "k_map"):
                self.register_parameter(name, nn.Parameter(start.Q.mT.contiguous() * width**0.5))
        if variant.from_x:
            for name, count in (("q_wide_proj", heads), ("k_wide_proj", groups)):
                self.add_module(name, nn.Linear(site.hidden, count * width, bias=False))
                nn.init.zeros_(self.get_submodule(name).weight)  # type: ignore[arg-type]

    @property
    def key_width(self) -> int:
        """Rows of a state."""
        return self.site.key_dim * (self.site.num_heads // self.site.num_kv_heads if self.variant.wide else 1)

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        g = decay_gate(self.a_proj(x), self.A_log, self.dt_bias)
        beta = self.variant.beta_range * self.b_proj(x).to(g.dtype).sigmoid()
        if self.variant.shared:
            groups = self.site.num_kv_heads
            g, beta = (t.unflatten(-1, (groups, -1)).mean(-1, keepdim=True) for t in (g, beta))
            g, beta = (t.expand(*t.shape[:-1], self.num_heads // groups).flatten(-2) for t in (g, beta))
        return g, beta

    def _widened(self, t: Tensor, x: Tensor, name: str) -> Tensor:
        """t [B, T, N, Dk], of unit norm -> [B, T, N, G Dk]: times its group's matrix, and with from_x what x adds."""
        groups, width = self.site.num_kv_heads, self.key_width
        matrix = getattr(self, f"{name}_map") * width**-0.5
        wide = (t.unflatten(2, (groups, -1)) @ matrix).flatten(2, 3)
        if self.variant.from_x:
            wide = wide + getattr(self, f"{name}_wide_proj")(x).unflatten(-1, (-1, width))
        return l2_normalize(wide)

    def core(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        g, beta = self._gates(x)
        if self.variant.taps > 1:
            q, k, v = (convolve(t, getattr(self, f"{n}_taps")) for n, t in (("q", q), ("k", k), ("v", v)))
        qn, kn = l2_normalize(q.transpose(1, 2)), l2_normalize(k.transpose(1, 2))
        if self.variant.wide:
            qn, kn = self._widened(qn, x, "q"), self._widened(kn, x, "k")
        scale = self.site.key_dim**-0.5
        out, _ = gated_delta_rule(qn, kn, v.transpose(1, 2).to(qn.dtype), g=g, beta=beta, scale=scale)
        return out

    def window_output(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, T, H, Dv], before its scale."""
        most = min(self.variant.window, self.site.window or self.variant.window)
        given = {"scale": self.site.scale, "window": most, "sinks": self.variant.sinks}
        return window_attention(q, k, v, **given).transpose(1, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        window = self.window_scale[:, None] * self.window_output(q, k, v) if self.variant.window else 0.0
        if self.variant.alone:
            return window.transpose(1, 2).to(x.dtype)  # type: ignore[union-attr]
        gate = self.g_proj(x).unflatten(-1, (self.num_heads, self.value_dim))
        y = gated_rms_norm(self.core(q, k, v, x), gate, self.norm) + window
        return y.transpose(1, 2).to(x.dtype)

    def state_bytes(self) -> int:
        """Of one sequence, in float32."""
        s, v = self.site, self.variant
        keys = s.num_kv_heads * s.key_dim
        values = s.num_kv_heads * s.value_dim
        states = 0 if v.alone else s.num_kv_heads if v.shared else s.num_heads
        count = states * self.key_width * s.value_dim + (v.window + v.sinks) * (keys + values)
        count += (v.taps - 1) * (s.num_heads * s.key_dim + keys + values)
        return BYTES * count

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())


def with_mixers(student: Student, variant: Variant) -> Student:
    """The same student, whose mixers are of the variant; called before it is moved to a device."""
    if not variant.plain:
        for site in student.converted:
            set_module(student.gm, mixer_path(site.index), VariantMixer(site, variant))
        student.gm.recompile()
    return student


@torch.no_grad()
def start_(student: Student, groups: list[SiteGroup], variant: Variant, batch: int) -> None:
    """closed-form of runtime/calibrate.py, with the variant's own write gate and window scale."""
    for group in groups:
        for position in range(len(group.sites)):
            job = SiteCalibrator(student, group, position, batch)
            stats = job.measure()
            if variant.entropy:
                stats = replace(stats, sums=stats.sums | {"entropy": stats.tokens * relative_entropy(job)})
            if variant.far:
                stats = replace(
                    stats, sums=stats.sums | {"distance": stats.tokens * far_distance(stats, variant.window)}
                )
            set_memory_(job.mixer, stats)
            bias = job.mixer.b_proj.bias
            bias.copy_((bias.sigmoid() / variant.beta_range).logit())
            if variant.alone:
                job.mixer.window_scale.fill_(1.0)
            else:
                sums = job.outputs()
                if variant.window_fit:
                    sums = replace(sums, cn=sums.cn - _fit_window_scale_(job, sums.cn, sums.nn))
                closed_form_output_(job.mixer, sums)
            job.refit()


def far_distance(stats: SiteStats, window: int) -> Tensor:
    """Mean look-back distance [H] of the mass whose distance octave lies beyond the window; octaves by their middle."""
    octave = torch.arange(stats.mass.shape[1], device=stats.mass.device)
    middle = 1.5 * 2.0 ** (octave - 1)
    far = stats.mass * (middle > window)
    return (far * middle).sum(1) / far.sum(1).clamp_min(1e-12)


def relative_entropy(job: SiteCalibrator) -> Tensor:
    """Mean over tokens of E_t / ln(tokens visible at t) [H], between 0 and 1; the first token does not count."""
    site, total, count = job.site, torch.zeros(()), 0
    for _, (q, k, _), _ in job.rows():
        seen = torch.arange(q.shape[2], device=q.device)
        distance = seen[:, None] - seen
        visible = (distance >= 0) & (distance < (site.window or q.shape[2]))
        scores = site.scale * q.unflatten(1, (site.num_kv_heads, -1)) @ k[:, :, None].transpose(-1, -2)
        rows = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        entropy = torch.special.entr(rows).sum(-1).flatten(1, 2)[:, :, 1:]
        part = (entropy / visible.sum(-1)[1:].log()).sum((0, 2), dtype=torch.float64)
        total, count = total.to(part) + part, count + q.shape[0] * (q.shape[2] - 1)
    return total / count


def _fit_window_scale_(job: SiteCalibrator, cn: Tensor, nn_: Tensor) -> Tensor:
    """Least squares of the context on n = o / rms(o), a factor per channel, and the window's output w, one per head.

    Sets the scale s [H] of w, found with the best factors of n put in: with <., .> summed over tokens, per channel d,
    s = sum_d (<ctx, w> - <ctx, n> <n, w> / <n, n>) / sum_d (<w, w> - <n, w>^2 / <n, n>). Returns s <n, w> [H, Dv].
    """
    mixer = job.mixer
    assert isinstance(mixer, VariantMixer)
    sums = [torch.zeros_like(cn) for _ in range(3)]
    for x, (q, k, v), _ in job.rows():
        _, context = attention_statistics(q, k, v, site=job.site)
        o, w = mixer.core(q, k, v, x), mixer.window_output(q, k, v)
        n = o * (o.square().mean(-1, keepdim=True) + EPS).rsqrt()
        for total, (a, b) in zip(sums, ((n, w), (w, w), (context, w)), strict=True):
            total += (a * b).sum((0, 1), dtype=torch.float64)
    nw, ww, cw = sums
    scale = (cw - cn * nw / nn_).sum(-1) / (ww - nw.square() / nn_).sum(-1)
    mixer.window_scale.copy_(scale)
    return scale[:, None] * nw
