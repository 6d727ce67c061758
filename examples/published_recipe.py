"""Taylor-Calibrate (arXiv:2606.16429) as its authors' code converts a layer, as an arm of measure_conversion.py.

`published` has the faults of that code: K/V weights are expanded to query heads row by row instead of head by head,
RoPE is dropped, q, k and v pass a SiLU, W_a and W_b are random, sigma scales v in front of the norm that undoes it, and
the output gate starts at 0.01 of the size that would let the values through. `mended` is runtime/initialize.py's
taylor: whole heads, the teacher's own q, k and v, calibrated decay and write gate, sigma behind the norm, an open gate.

Both are then trained like there: each layer on its own, 300 full-batch steps on 4 x 256 tokens of AdamW, 1e-4 on the
projections of q, k and v and 1e-3 on the gates, weight decay 0.01, clip 1, squared error to the teacher's attention
output; W_o and the norm frozen.

B sequences, T tokens, H query heads, K key/value heads, D head dim, C width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from tcal_compiler.errors import UnsupportedModelError
from tcal_compiler.passes.base import run_passes
from tcal_compiler.passes.graph import copy_module, fresh, move_to
from tcal_compiler.passes.rewrite_gdn import RewriteToGdn, mixer_path
from tcal_compiler.passes.site_program import cut_program, outside_values
from tcal_compiler.passes.types import AttentionSite
from tcal_compiler.runtime.calibrate import SiteCalibrator, output_projection
from tcal_compiler.runtime.initialize import inverse_softplus, naive_
from tcal_compiler.runtime.mixer import GdnMixer
from tcal_compiler.runtime.statistics import OutputSums, SiteStats, half_life_rate, output_sums
from tcal_compiler.runtime.student import Student
from tcal_compiler.runtime.taps import SiteGroup
from tcal_compiler.runtime.training import products_for

SEQUENCES, LENGTH, STEPS = 4, 256, 300
LR_PROJECTION, LR_NEW, WEIGHT_DECAY, CLIP = 1e-4, 1e-3, 0.01, 1.0
MUTED = 0.01


class PublishedMixer(GdnMixer):
    """A GdnMixer that makes q, k and v [B, H, T, D] from x itself: SiLU of a linear map, without biases or RoPE."""

    def __init__(self, site: AttentionSite) -> None:
        super().__init__(site)
        self.q_proj = nn.Linear(site.hidden, site.num_heads * site.key_dim, bias=False)
        self.k_proj = nn.Linear(site.hidden, site.num_heads * site.key_dim, bias=False)
        self.v_proj = nn.Linear(site.hidden, site.num_heads * site.value_dim, bias=False)

    def core(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        maps = (self.q_proj, self.k_proj, self.v_proj)
        own = (F.silu(p(x)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in maps)
        return super().core(*own, x)


def published_student(plain: Student, groups: list[SiteGroup], *, seed: int, batch: int) -> Student:
    """The student before training. plain: a student of the same plan with GdnMixers; groups: its taps.

    Raises UnsupportedModelError where q, k or v are no linear maps of x at the first position.
    """
    gm = copy_module(plain.capture.gm)
    run_passes(gm, [RewriteToGdn(plain.plan, plain.sites, PublishedMixer)])
    for site in plain.converted:
        (call,) = (n for n in gm.graph.nodes if n.op == "call_module" and n.target == mixer_path(site.index))
        call.args = (call.args[3],) * 4  # the mixer looks at x alone
    student = replace(plain, gm=fresh(gm, gm.graph))
    move_to(student.gm, next(plain.gm.parameters()).device)
    generator = torch.Generator().manual_seed(seed)
    for group in groups:
        for i, site in enumerate(group.sites):
            job = SiteCalibrator(plain, group, i, batch)
            mixer = student.gm.get_submodule(mixer_path(site.index))
            assert isinstance(mixer, PublishedMixer)
            naive_(mixer, generator)
            copy_projections(mixer, plain, site)
            calibrate(mixer, job)
    return student


@torch.no_grad()
def copy_projections(mixer: PublishedMixer, plain: Student, site: AttentionSite) -> None:
    """W_q, and W_k and W_v with every row repeated H / K times, read off the teacher's graph at position 0."""
    program = cut_program(plain.gm, inputs_from=[site.x], outputs=[site.q, site.k, site.v])
    device = next(plain.gm.parameters()).device
    probe = torch.cat([torch.zeros(1, site.hidden), torch.eye(site.hidden), torch.randn(4, site.hidden)])[:, None]
    ids = torch.zeros(len(probe), 1, dtype=torch.long, device=device)
    outside = outside_values(plain.gm, program.outside, plain.capture.inputs(ids))
    for target, value in zip(
        (mixer.q_proj, mixer.k_proj, mixer.v_proj), program.gm(probe.to(device), *outside), strict=True
    ):
        rows = value.flatten(1)  # [C + 5, heads * D]
        weight = rows[1 : 1 + site.hidden] - rows[0]
        error = (rows[-4:] - rows[0] - probe[-4:, 0].to(device) @ weight).abs().max()
        if not error < 1e-3 * rows[-4:].abs().max():
            what = "its q, k or v are no linear map of the hidden state, which the published recipe needs"
            raise UnsupportedModelError(site.layer or site.anchor, what, "the other arms")
        weight = weight.T.repeat_interleave(target.out_features // weight.shape[1], 0)
        target.weight.copy_(weight)


@torch.no_grad()
def calibrate(mixer: PublishedMixer, job: SiteCalibrator) -> None:
    """Decay from the look-back distance, W_v <- sigma W_v per head, W_g = alpha W_v with
    alpha = 0.01 rms(ctx) / rms(silu(W_v x)).
    """
    stats: SiteStats = job.measure()
    mixer.A_log.zero_()
    mixer.dt_bias.copy_(inverse_softplus(half_life_rate(stats.distance)))
    total: OutputSums | None = None
    for x, (q, k, v), _ in job.rows():
        sums = output_sums(q, k, v, mixer.core(q, k, v, x), site=job.site)
        total = sums if total is None else total.merge(sums)
    assert total is not None
    sigma = (total.co / total.oo.clamp_min(1e-30)).clamp(0.1, 10)
    mixer.v_proj.weight.mul_(sigma.to(mixer.v_proj.weight).repeat_interleave(mixer.value_dim)[:, None])
    x, (q, k, v), _ = next(job.rows())
    group = job.site.num_heads // job.site.num_kv_heads
    context = F.scaled_dot_product_attention(
        q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), is_causal=True, scale=job.site.scale
    )
    rms = [t.square().mean().sqrt() for t in (context, F.silu(mixer.v_proj(x)))]
    mixer.g_proj.weight.copy_(MUTED * rms[0] / rms[1].clamp_min(1e-12) * mixer.v_proj.weight)


def frozen(gm: GraphModule, site: AttentionSite, path: str) -> bool:
    """W_o, the norm, and biases of the mixer, which the published layer does not have."""
    mixer = mixer_path(site.index)
    fixed = {output_projection(gm, site).weight, f"{mixer}.norm"}
    if isinstance(gm.get_submodule(mixer), PublishedMixer):
        fixed |= {f"{mixer}.b_proj.bias", f"{mixer}.g_proj.bias"}
    return path in fixed


def train_layers(student: Student, groups: list[SiteGroup], *, steps: int = STEPS) -> dict[int, tuple[float, float]]:
    """Trains each converted layer of the student in place; its first and last error relative to the teacher's power."""
    found = {}
    device = next(student.gm.parameters()).device
    for group in groups:
        for i, site in enumerate(group.sites):
            x, y = (t[i, :SEQUENCES, :LENGTH].to(device).float() for t in (group.x, group.y))
            program = cut_program(student.gm, inputs_from=[site.x], outputs=[site.y])
            ids = torch.zeros(len(x), x.shape[1], dtype=torch.long, device=device)
            outside = outside_values(student.gm, program.outside, student.capture.inputs(ids))
            free = {n: p for n, p in program.params.items() if not frozen(student.gm, site, p)}
            rates = [(student.gm.get_parameter(p), new_part(p)) for p in free.values()]
            optimizer = torch.optim.AdamW(
                [
                    {"params": [p for p, new in rates if not new], "lr": LR_PROJECTION},
                    {"params": [p for p, new in rates if new], "lr": LR_NEW},
                ],
                weight_decay=WEIGHT_DECAY,
            )
            with products_for(device):
                found[site.index] = _fit(program.gm, optimizer, [p for p, _ in rates], x, y, outside, steps)
    return found


def new_part(path: str) -> bool:
    """A gate or rate of a mixer; not a projection of q, k or v."""
    return path.startswith(mixer_path(0).rpartition(".")[0]) and not path.endswith(
        ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    )


def _fit(
    program: GraphModule,
    optimizer: torch.optim.Optimizer,
    params: list[nn.Parameter],
    x: Tensor,
    y: Tensor,
    outside: tuple[object, ...],
    steps: int,
) -> tuple[float, float]:
    power, losses = y.square().mean(), []
    for p in params:
        p.requires_grad_(True)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = (program(x, *outside) - y).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()
        losses.append(loss.detach() / power)
    return (float(losses[0]), float(losses[-1])) if losses else (float("nan"), float("nan"))
