"""The module that a rewrite inserts in place of a softmax core."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tcal_compiler.kernels.delta_gates import delta_gates
from tcal_compiler.kernels.gated_delta_rule import gated_delta_rule
from tcal_compiler.kernels.gated_rms_norm import gated_rms_norm
from tcal_compiler.kernels.gates import decay_gate, l2_normalize
from tcal_compiler.kernels.local_attention import local_attention
from tcal_compiler.passes.types import AttentionSite


class GdnMixer(nn.Module):
    """Gated DeltaNet core with the teacher's own q, k, v. Source: arXiv:2412.06464, cut at the attention core.

        g = -exp(A_log) softplus(W_a x + dt_bias)       beta = sigmoid(W_b x + b_b)
        o = gated_delta_rule(q / |q|, k / |k|, v, g, beta),  scale Dk^-1/2
        y = o / rms(o) * norm * silu(W_g x + b_g)

    q [B, H, T, Dk], k [B, K, T, Dk], v [B, K, T, Dv], x [B, T, C] -> y [B, H, T, Dv] in x's dtype: the layout of
    scaled_dot_product_attention. One state per query head. Gates accumulate in float32 at least.

    With site.local > 0, y also has local_scale [H] times the teacher's softmax attention over the last site.local
    tokens and, with site.local_first, the first token.
    """

    def __init__(self, site: AttentionSite) -> None:
        super().__init__()
        self.num_heads, self.value_dim = site.num_heads, site.value_dim
        self.a_proj = nn.Linear(site.hidden, site.num_heads, bias=False)
        self.b_proj = nn.Linear(site.hidden, site.num_heads)
        self.g_proj = nn.Linear(site.hidden, site.num_heads * site.value_dim)
        self.A_log = nn.Parameter(torch.zeros(site.num_heads))
        self.dt_bias = nn.Parameter(torch.zeros(site.num_heads))
        self.norm = nn.Parameter(torch.ones(site.num_heads, site.value_dim))
        self.local, self.local_first, self.scale = site.local, site.local_first, site.scale
        if self.local:
            self.local_scale = nn.Parameter(torch.zeros(site.num_heads))

    def core(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """The recurrence's output o [B, T, H, Dv], before norm and output gate; at least float32."""
        g, beta = delta_gates(self.a_proj(x), self.b_proj(x), self.A_log, self.dt_bias)
        qn, kn = l2_normalize(q.transpose(1, 2)), l2_normalize(k.transpose(1, 2))
        out, _ = gated_delta_rule(qn, kn, v.transpose(1, 2).to(qn.dtype), g=g, beta=beta)
        return out

    def local_output(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax attention over the last and first tokens [B, T, H, Dv], before its scale."""
        out = local_attention(q, k, v, scale=self.scale, window=self.local, first=self.local_first)
        return out.transpose(1, 2)

    @torch.no_grad()
    def half_life(self, x: Tensor) -> Tensor:
        """Tokens [H] in which the state halves, at the mean decay over x [B, T, C]: ln 2 / mean(-g)."""
        g = decay_gate(self.a_proj(x), self.A_log, self.dt_bias)
        return math.log(2) / (-g).mean((0, 1)).clamp_min(1e-30)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        gate = self.g_proj(x).unflatten(-1, (self.num_heads, self.value_dim))
        y = gated_rms_norm(self.core(q, k, v, x), gate, self.norm)
        if self.local:
            y = y + self.local_scale[:, None] * self.local_output(q, k, v)
        return y.transpose(1, 2).to(x.dtype)
