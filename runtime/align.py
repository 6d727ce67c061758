"""Layerwise alignment: every converted site learns the teacher's attention output from the teacher's own input.

All sites of a group take each step together: their x -> y programs are one program with parameters stacked [L, ...].
L sites, N sequences, T tokens, C width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from tcal_compiler.errors import StageError

from .config import AlignConfig
from .optimizer import StackedMuon
from .student import Student
from .taps import PASS_TOKENS, LivePairs, Pairs, SiteGroup, stored_pairs
from .training import Save, TrainState, batch_indices, learning_rate, products_for

NEW = "mixer."  # gates, norms and rates of a mixer
# Short memories: the noise of a step's gradient is small, and a run has few steps.
BETAS = (0.8, 0.9)
MOMENTUM = 0.8
GATE_INPUT = 0.25  # root mean square of x at which gates take steps of lr_new
VECTOR_RATE = 0.2  # biases and norms of the teacher, times lr_teacher
# Of the share of a step (GroupTrainer.start), measured in docs/method.md
TOKENS_PER_NUMBER = 0.0033  # tokens of a step for each trained number of a site, where near_error = 1 was best
FAR = 0.3  # held-out error of a site beyond which the noise of a step no longer counts


class GroupTrainer:
    """Stacked parameters, optimiser and best weights of one group."""

    def __init__(self, student: Student, group: SiteGroup, train: int, config: AlignConfig) -> None:
        self.group, self.train, self.config, self.gm = group, train, config, student.gm
        self.teacher = student.capture.gm
        self.device = next(student.gm.parameters()).device
        source = student.gm
        self.params = {
            name: torch.stack([source.get_parameter(n[name]).detach().float() for n in group.names]).requires_grad_()
            for name in group.names[0]
        }
        self.optimizers = self._make_optimizers()
        # The gates' matrices act on x: the larger it is, the smaller are their steps.
        self.gate_factor = GATE_INPUT / self._mean_squares(group.x).sqrt().clamp_min(1e-6)
        self.share = torch.ones(len(group.sites), device=self.device)
        self.power = self._mean_squares(group.y)
        program = group.program.gm
        names = list(self.params)

        def run(values: dict[str, Tensor], x: Tensor, *outside: object) -> Tensor:
            return functional_call(program, values, (x, *outside))

        self._forward = lambda x: vmap(
            lambda p, xi: run(p, xi, *group.outside(x.shape[1])), in_dims=({n: 0 for n in names}, 0)
        )(self.params, x)
        self.best_error = torch.full((len(group.sites),), float("inf"), device=self.device)
        self.best = {n: p.detach().clone() for n, p in self.params.items()}

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the teacher's matrices, AdamW for gates, norms and biases."""
        c = self.config
        new = [p for n, p in self.params.items() if n.startswith(NEW)]
        teacher = [n for n in self.params if not n.startswith(NEW)]
        matrices = [(self.params[n], self._teacher_size(n)) for n in teacher if self.params[n].dim() == 3]
        vectors = [self.params[n] for n in teacher if self.params[n].dim() != 3]
        adam = [{"params": new, "lr": c.lr_new}, {"params": vectors, "lr": VECTOR_RATE * c.lr_teacher}]
        fused = self.device.type == "cuda"
        found: list[torch.optim.Optimizer] = [torch.optim.AdamW(adam, betas=BETAS, weight_decay=0.0, fused=fused)]
        if matrices:
            found.append(StackedMuon(matrices, lr=c.lr_teacher, momentum=MOMENTUM, weight_decay=c.weight_decay))
        for group in (g for o in found for g in o.param_groups):
            group["peak"] = group["lr"]
        return found

    def _mean_squares(self, values: Tensor) -> Tensor:
        """Of each site's values on the sequences that are trained on [L]."""
        each = [v[: self.train].float().square().mean(dtype=torch.float64).float() for v in values]
        return torch.stack(each).to(self.device)

    def _teacher_size(self, name: str) -> Tensor:
        """Root mean square of a parameter in the teacher [L]; that of an output projection that was refit is larger."""
        values = (self.teacher.get_parameter(n[name]).detach().float() for n in self.group.names)
        return torch.stack([v.square().mean().sqrt() for v in values]).to(self.device)

    def losses(self, x: Tensor, y: Tensor, noise_seed: int | None = None) -> Tensor:
        """Per-site mean squared error over the site's mean square [L], for x, y [L, n, T, C].

        noise_seed: of the noise added to x, whose standard deviation is config.noise times the token's rms.
        """
        x, y = x.to(self.device).float(), y.to(self.device).float()
        if noise_seed is not None and self.config.noise:
            generator = torch.Generator(x.device).manual_seed(noise_seed)
            noise = torch.randn(x.shape, generator=generator, device=x.device)
            x = x + self.config.noise * x.square().mean(-1, keepdim=True).sqrt() * noise
        return (self._forward(x) - y).square().mean((1, 2, 3)) / self.power.clamp_min(1e-30)

    def step(self, step: int, x: Tensor, y: Tensor, seed: int) -> Tensor:
        """One optimiser step with the gradient of each site clipped on its own; returns the losses before it [L]."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * learning_rate(step, self.config)
        losses = self.losses(x, y, noise_seed=seed * 1_000_003 + step)
        losses.sum().backward()
        with torch.no_grad():
            grads = [p.grad for p in self.params.values() if p.grad is not None]
            norm = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0).sqrt()
            factor = (self.config.clip / norm.clamp_min(self.config.clip)).to(norm.dtype)
            for g in grads:
                g.mul_(factor.view(-1, *[1] * (g.dim() - 1)))
        before = {n: p.detach().clone() for n, p in self.params.items()}
        for optimizer in self.optimizers:
            optimizer.step()
        with torch.no_grad():
            for n, p in self.params.items():
                is_gate = n.startswith(NEW) and n.endswith("_proj.weight")
                part = self.share * self.gate_factor if is_gate else self.share
                p.copy_(before[n].lerp(p, part.view(-1, *[1] * (p.dim() - 1))))
        return losses.detach()

    def start(self, sequences: int) -> Tensor:
        """Held-out error E of the weights that training begins with [L], which sets the share of each step that a site
        takes: sqrt(E / near_error) max(m, E / FAR), at most 1, with m = (N / (TOKENS_PER_NUMBER P))^(2/3).

        The nearer a site is to its teacher, the less far its weights have to go; the fewer tokens N a step has for the
        P numbers that are trained, the more of it is noise, unless the error is so large that little of it is.
        """
        error = self.score()
        if self.config.near_error:
            numbers = sum(p[0].numel() for p in self.params.values())
            tokens = min(self.config.batch, sequences) * self.group.x.shape[2]
            exact = error.double()  # of float32 a tiny near_error is 0
            m = (exact / FAR).clamp_min((tokens / (TOKENS_PER_NUMBER * numbers)) ** (2 / 3))
            share = m * (exact / self.config.near_error).sqrt()
            self.share = share.clamp(max=1.0).nan_to_num(nan=1.0).float()
        return error

    @torch.no_grad()
    def score(self) -> Tensor:
        """Held-out error of the present weights [L]; keeps the weights of each site that is better than before."""
        x, y = self.group.x[:, self.train :], self.group.y[:, self.train :]
        batches = zip(x.split(self.config.batch, 1), y.split(self.config.batch, 1), strict=True)
        error = torch.stack([self.losses(a, b) * a.shape[1] for a, b in batches]).sum(0) / x.shape[1]
        better = error < self.best_error  # False for NaN
        self.best_error = torch.where(better, error, self.best_error)
        for n, p in self.params.items():
            mask = better.view(-1, *[1] * (p.dim() - 1))
            self.best[n] = torch.where(mask, p.detach(), self.best[n])
        return error

    @torch.no_grad()
    def largest(self) -> Tensor:
        """Largest parameter of each site [L]; NaN where any is NaN."""
        return torch.stack([p.abs().flatten(1).amax(1) for p in self.params.values()]).amax(0)

    @torch.no_grad()
    def write_back(self) -> None:
        for i, names in enumerate(self.group.names):
            for n, path in names.items():
                target = self.gm.get_parameter(path)
                target.copy_(self.best[n][i].to(target.dtype))

    def state(self, prefix: str) -> dict[str, Tensor]:
        """Everything that decides later steps, as plain tensors."""
        out = {f"{prefix}.param.{n}": p.detach() for n, p in self.params.items()}
        out |= {f"{prefix}.best.{n}": p for n, p in self.best.items()}
        out |= {f"{prefix}.best_error": self.best_error, f"{prefix}.share": self.share}
        for n, p in self.params.items():
            for optimizer in self.optimizers:
                for k, v in optimizer.state.get(p, {}).items():
                    out[f"{prefix}.optimizer.{k}.{n}"] = v
        return out

    def load_state(self, tensors: dict[str, Tensor], prefix: str) -> None:
        """Raises KeyError or ValueError when the tensors are not those of `state` for these sites."""

        def take(name: str, shape: torch.Size) -> Tensor:
            found = tensors[f"{prefix}.{name}"]
            if found.shape != shape:
                raise ValueError(f"{name} is {tuple(found.shape)}, not {tuple(shape)}")
            return found.to(self.device, copy=True)

        with torch.no_grad():
            for n, p in self.params.items():
                p.copy_(take(f"param.{n}", p.shape))
                self.best[n] = take(f"best.{n}", p.shape)
                owner = next(o for o in self.optimizers if any(p is q for g in o.param_groups for q in g["params"]))
                slots = ("momentum",) if isinstance(owner, StackedMuon) else ("step", "exp_avg", "exp_avg_sq")
                # the count of steps too: AdamW is fused, and keeps it on the device, when that is not the CPU
                shapes = {k: torch.Size() if k == "step" else p.shape for k in slots}
                owner.state[p] = {k: take(f"optimizer.{k}.{n}", shape) for k, shape in shapes.items()}
            self.best_error = take("best_error", self.best_error.shape)
            if self.config.near_error:  # without it there was none in checkpoints of before
                self.share = take("share", self.share.shape)


def _curve_point(step: int, groups: list[SiteGroup], train: Tensor, held: Tensor) -> dict[str, object]:
    order = [s.index for g in groups for s in g.sites]
    return {
        "step": step,
        "train": {str(i): v for i, v in zip(order, train.tolist(), strict=True)},
        "held_out": {str(i): v for i, v in zip(order, held.tolist(), strict=True)},
    }


def _require_finite(per_site: Tensor, groups: list[SiteGroup], step: int) -> None:
    if not bool(per_site.isfinite().all()):
        site = [s for g in groups for s in g.sites][int((~per_site.isfinite()).nonzero()[0])]
        raise StageError(
            f"align, {site.layer or site.anchor}",
            f"the loss is not finite at step {step}",
            "lower align.lr_new and align.lr_teacher in --config FILE, or another --init",
        )


def levelled_off(curve: Sequence[Mapping[str, Any]], config: AlignConfig) -> int | None:
    """The step of the curve's last score, if config.patience ended the training there; else None.

    m_j = mean over sites of the least held-out error up to score j, that of the weights that are kept; score n ends
    it when m_n >= (1 - least_gain) m_(n - patience). It is a function of the curve, which a checkpoint holds: a resumed
    run stops where the whole one does.
    """
    step, patience = curve[-1]["step"], config.patience
    if patience is None or step == config.steps or len(curve) <= patience:
        return None
    kept = accumulate((p["held_out"] for p in curve), lambda a, b: {i: min(a[i], b[i]) for i in a})
    means = [math.fsum(errors.values()) / len(errors) for errors in kept]
    return step if means[-1] >= (1 - config.least_gain) * means[-1 - patience] else None


def align(
    student: Student,
    groups: list[SiteGroup],
    *,
    train: int,
    config: AlignConfig,
    seed: int,
    live: LivePairs | None = None,
    resume: TrainState | None = None,
    save: Save | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[Student, list[dict[str, object]]]:
    """Trains on sequences [0, train) of the groups, or on those of `live` instead, scores on the groups' other
    sequences, writes each site's best weights into the student's graph.

    A site's score is taken after a step on the weights that are then kept; the starting weights take part, so no site
    ends worse than it began. The step's sequences depend on seed and step only: a run resumed from `save`'s state
    gives the same numbers. Returns the student and the loss curve, per scored step and site; config.patience may end it
    early (`levelled_off`).

    Raises StageError when a loss is not finite; the state last saved stays usable.
    """
    with products_for(next(student.gm.parameters()).device):
        curve = _run(student, groups, train, config, seed, live, resume, save, progress)
    return replace(student, stage="aligned"), curve


def _pairs_of_step(
    groups: list[SiteGroup], train: int, config: AlignConfig, seed: int, live: LivePairs | None
) -> Callable[[int], Pairs]:
    """x and y of a step's sequences. Of `live` those of several steps come from one pass of the teacher.

    Which steps share a pass does not depend on where a run goes on, so that a resumed one has the same numbers.
    """
    sequences = len(live.ids) if live else train

    def indices(step: int) -> Tensor:
        return batch_indices(step, sequences=sequences, batch=config.batch, seed=seed)

    stored = stored_pairs(groups)
    if live is None:
        return lambda step: stored(indices(step))
    tokens = live.ids.shape[1] * min(config.batch, sequences)
    many = max(1, PASS_TOKENS.get(live.device.type, 0) // tokens)
    held: dict[int, Pairs] = {}

    def pairs(step: int) -> Pairs:
        if step not in held:
            held.clear()
            first = step - step % many
            parts = [indices(s) for s in range(first, min(first + many, config.steps))]
            values = live(torch.cat(parts))
            for i, n in enumerate(map(len, parts)):
                held[first + i] = [(x[:, i * n : (i + 1) * n], y[:, i * n : (i + 1) * n]) for x, y in values]
        return held[step]

    return pairs


def _run(
    student: Student,
    groups: list[SiteGroup],
    train: int,
    config: AlignConfig,
    seed: int,
    live: LivePairs | None,
    resume: TrainState | None,
    save: Save | None,
    progress: Callable[[int, int, float], None] | None,
) -> list[dict[str, object]]:
    trainers = [GroupTrainer(student, g, train, config) for g in groups]
    pairs = _pairs_of_step(groups, train, config, seed, live)
    state = resume or TrainState(0)
    if resume:
        for i, t in enumerate(trainers):
            try:
                t.load_state(resume.tensors, f"group{i}")
            except (KeyError, ValueError) as e:  # of another version of this program, or of other sites
                found = f"it has no {e.args[0]}" if isinstance(e, KeyError) else str(e)
                what = f"the checkpoint of step {resume.step} does not fit: {found}"
                raise StageError("align", what, "--restart, which runs every stage anew") from e
    else:
        held = torch.cat([t.start(len(live.ids) if live else train) for t in trainers])
        state.curve.append(_curve_point(0, groups, held, held))
    for step in range(state.step, config.steps):
        if state.curve[-1]["step"] == step and levelled_off(state.curve, config) is not None:
            break
        values = pairs(step)
        losses = torch.cat([t.step(step, x, y, seed) for t, (x, y) in zip(trainers, values, strict=True)])
        done = step + 1
        if config.scores_after(done):
            held = torch.cat([t.score() for t in trainers])
            state.curve.append(_curve_point(done, groups, losses, held))
            _require_finite(losses + held, groups, done)
        state.step = done
        if save and config.saves_after(done):
            _require_finite(torch.cat([t.largest() for t in trainers]), groups, done)
            state.tensors = {k: v for i, t in enumerate(trainers) for k, v in t.state(f"group{i}").items()}
            save(state)
        if progress:
            progress(done, config.steps, float(losses.mean()) if done % 10 == 0 or done == config.steps else math.nan)
    for t in trainers:
        t.write_back()
    return state.curve
