"""Measures variants of what replaces a site: aligned, then distilled, each beside the product's own.

    python examples/site_variants.py TEACHER --policy keep=0,4,8 --calib calib.jsonl --sequences 2400 \
        --variants base,conv,window,conv+window --steps 300 --distill-steps 61 --distill-batch 32 \
        --eval heldout=heldout.jsonl --json out.json

variant_mixer.PARTS lists the variants; A+B is both. Alignment and distillation are the product's, and all variants
share the teacher, the sequences and what is scored. The errors of sites are of held-out calibration sequences, plain
(mean squared error over mean square) whatever was trained on.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from conversion_bench import Arms, Bench
from conversion_schedule import Schedule, Start
from measure_conversion import (
    measured_with,
    scoring_arguments,
    text_arguments,
    training_arguments,
    without_folders,
)
from torch import Tensor
from torch.fx import GraphModule, Node
from variant_mixer import Variant, VariantMixer, start_, with_mixers

from tcal_compiler.errors import UnsupportedModelError
from tcal_compiler.passes.graph import aten, by_name, move_to
from tcal_compiler.passes.rewrite_gdn import mixer_path
from tcal_compiler.passes.site_program import cut_program, tap_graph
from tcal_compiler.passes.types import AttentionSite
from tcal_compiler.runtime import align as align_module
from tcal_compiler.runtime.align import GroupTrainer
from tcal_compiler.runtime.calibrate import SiteCalibrator
from tcal_compiler.runtime.config import AlignConfig
from tcal_compiler.runtime.student import Student, make_student
from tcal_compiler.runtime.taps import LivePairs, Pairs, SiteGroup


def variants(text: str) -> dict[str, Variant]:
    return {name: Variant.of(name) for name in text.split(",")}


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--policy", default="uniform:25%")
    p.add_argument("--variants", type=variants, default=variants("base"))
    text_arguments(p)
    p.add_argument("--steps", type=int, default=300, help="of alignment")
    p.add_argument("--distill-steps", type=int, default=0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--json", type=Path)
    training_arguments(p)
    scoring_arguments(p)
    return p.parse_args()


def residual_stream(gm: GraphModule, site: AttentionSite) -> str:
    """The node where y joins the residual stream. Raises UnsupportedModelError when nothing is added to it."""
    node: Node = by_name(gm)[site.y]
    while node.target is not aten.add.Tensor:
        if len(node.users) != 1:
            where = site.layer or site.anchor
            raise UnsupportedModelError(where, f"{node.name} is not added to a residual stream", "another loss")
        node = next(iter(node.users))
    return node.name


def weighted(y: Tensor, stream: Tensor) -> Tensor:
    """y [..., C] over the root mean square of the stream, then 1 over that: [..., C + 1]."""
    factor = stream.float().square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt().to(y.dtype)
    return torch.cat([y * factor, factor], -1)


class WeightedPairs(LivePairs):
    """LivePairs whose y are `weighted`."""

    def __init__(self, student: Student, groups: list[SiteGroup], ids: Tensor) -> None:
        super().__init__(student, groups, ids)
        gm = student.capture.gm
        names = [(s.x, s.y, residual_stream(gm, s)) for g in groups for s in g.sites]
        self.taps = tap_graph(gm, [n for site in names for n in site])

    @torch.no_grad()
    def __call__(self, index: Tensor) -> Pairs:
        values = iter(self.taps(*self.inputs(self.ids[index].to(self.device))))
        sites = iter([(x, weighted(y, r)) for x, y, r in zip(values, values, values, strict=True)])
        parts = [[next(sites) for _ in range(size)] for size in self.sizes]
        return [(torch.stack([x for x, _ in part]), torch.stack([y for _, y in part])) for part in parts]


class ResidualTrainer(GroupTrainer):
    """Each token's error over the mean square of the residual stream there; y are `weighted`."""

    def __init__(self, student: Student, group: SiteGroup, train: int, config: AlignConfig) -> None:
        super().__init__(student, group, train, config)
        self.power = self._mean_squares(group.y[..., :-1])

    def losses(self, x: Tensor, y: Tensor, noise_seed: int | None = None) -> Tensor:
        x, y = x.to(self.device).float(), y.to(self.device).float()
        wrong = self._forward(x) * y[..., -1:] - y[..., :-1]
        return wrong.square().mean((1, 2, 3)) / self.power.clamp_min(1e-30)


class SiteWeightedTrainer(GroupTrainer):
    """Each site's loss times a constant."""

    def __init__(self, *given: Any, weights: dict[int, float]) -> None:
        super().__init__(*given)
        self.weights = torch.tensor([weights[s.index] for s in self.group.sites], device=self.device)

    def losses(self, x: Tensor, y: Tensor, noise_seed: int | None = None) -> Tensor:
        return super().losses(x, y, noise_seed) * self.weights


class VariantArms(Arms):
    """One variant after the other, from the same taps."""

    def student(self, variant: Variant) -> tuple[Student, list[SiteGroup]]:
        """Initialised on the kept calibration sequences, and its groups of sites."""
        student = with_mixers(make_student(self.bench.capture, self.bench.scan, self.plan), variant)
        move_to(student.gm, self.bench.device)
        groups = []
        for group in self.groups(student):
            programs = [cut_program(student.gm, inputs_from=[s.x], outputs=[s.y]) for s in group.sites]
            groups.append(replace(group, program=programs[0], names=tuple(p.params for p in programs)))
        start_(student, self.few(groups, self.bench.kept), variant, self.args.batch)
        return student, groups

    def with_stream(self, student: Student, groups: list[SiteGroup]) -> list[SiteGroup]:
        """The groups with `weighted` y, by another pass of the teacher."""
        ids = torch.cat([self.bench.ids[: self.bench.kept], self.bench.ids[self.args.sequences :]])
        pairs = WeightedPairs(student, groups, ids)
        found: list[list[Tensor]] = [[] for _ in groups]
        for index in torch.arange(len(ids)).split(self.args.batch):
            for parts, (_, y), group in zip(found, pairs(index), groups, strict=True):
                parts.append(y.to(group.y))
        return [replace(g, y=torch.cat(parts, 1)) for g, parts in zip(groups, found, strict=True)]

    @contextmanager
    def loss(self, student: Student, groups: list[SiteGroup], kind: str) -> Iterator[tuple[list[SiteGroup], Any]]:
        """What alignment trains on, and its live pairs; inside, its loss is of this kind."""
        trainer: Any = GroupTrainer
        live = LivePairs
        if kind == "residual":
            trainer, live, groups = ResidualTrainer, WeightedPairs, self.with_stream(student, groups)
        if kind == "site-kl":
            scores = self.bench._scores("kl")
            trainer = partial(SiteWeightedTrainer, weights={i: max(v, 1e-6) for i, v in scores.items()})
        ids = self.bench.ids[: self.args.sequences]
        with mock.patch.object(align_module, "GroupTrainer", trainer):
            yield groups, live(student, groups, ids) if self.args.init_sequences else None

    def align(self, student: Student, groups: list[SiteGroup], variant: Variant) -> Student:
        a, usual = self.args, AlignConfig()
        batch = variant.batch or a.batch
        rates = {"lr_new": a.lr_new or usual.lr_new, "lr_teacher": (a.lr_teacher or [usual.lr_teacher])[0]}
        config = AlignConfig(
            steps=-(-a.steps * a.batch // batch),
            batch=batch,
            weight_decay=usual.weight_decay if a.weight_decay is None else a.weight_decay,
            noise=a.noise or 0.0,
            **{k: variant.rate * v for k, v in rates.items()},
        )
        with self.loss(student, groups, variant.loss) as (given, live):
            aligned, _ = align_module.align(
                student, given, train=self.bench.kept, config=config, seed=self.seed, live=live
            )
        return aligned

    def errors(self, student: Student, groups: list[SiteGroup]) -> dict[str, float]:
        """Of each site on the held-out calibration sequences."""
        held = [replace(g, x=g.x[:, self.bench.kept :], y=g.y[:, self.bench.kept :]) for g in groups]
        jobs = [SiteCalibrator(student, g, i, self.args.batch) for g in held for i in range(len(g.sites))]
        return {str(job.site.index): job.error() for job in sorted(jobs, key=lambda job: job.site.index)}


def cost(student: Student, variant: Variant) -> dict[str, int]:
    """Bytes of state in float32 and parameters of the first site, beyond those of the product's."""
    site = student.converted[0]
    mine, base = VariantMixer(site, variant), VariantMixer(site, Variant())
    counted = sum(p.numel() for p in student.gm.get_submodule(mixer_path(site.index)).parameters())
    return {
        "extra_state_bytes": mine.state_bytes() - base.state_bytes(),
        "extra_parameters": counted - base.parameter_count(),
    }


def measure(arms: VariantArms, name: str, variant: Variant) -> tuple[dict[str, Any], dict[str, Student]]:
    """Errors and seconds of one variant, and its students by name."""
    bench, a = arms.bench, arms.args
    student, groups = bench.timed(f"init {name}", lambda: arms.student(variant))
    row: dict[str, Any] = cost(student, variant) | {"start": arms.errors(student, groups)}
    student = bench.timed(f"align {name}", lambda: arms.align(student, groups, variant))
    row |= {"align_seconds": round(bench.took, 2), "aligned": arms.errors(student, groups)}
    for stage in ("start", "aligned"):
        row[f"mean_{stage}"] = sum(row[stage].values()) / len(row[stage])
    print(f"{name}: mean error {row['mean_start']:.4f}, aligned {row['mean_aligned']:.4f}", flush=True)
    found = {f"{name}, aligned": replace(student, gm=copy.deepcopy(student.gm))}
    if a.distill_steps:
        student = arms.distilled(student, Schedule(Start("closed-form"), a.steps, a.distill_steps))
        row |= {"distill_seconds": round(bench.took, 2)}
        found[f"{name}, distilled"] = student
    return row, found


def main() -> None:
    args = arguments()
    bench = Bench(args)
    plan = bench.plan(args.policy)
    arms, body = VariantArms(bench, plan, args.seed), {"site_variants": {}, "scores": {}, "tasks": {}}
    for name, variant in args.variants.items():
        row, students = measure(arms, name, variant)
        body["site_variants"][name] = row
        body["scores"] |= bench.timed("evaluation", lambda s=students: bench.score(s))
        body["tasks"] |= bench.timed("task evaluation", lambda s=students: bench.score_tasks(s))
        if args.json:
            args.json.write_text(json.dumps(result(bench, list(plan.keep)) | body, indent=1) + "\n")


def result(bench: Bench, kept: list[int]) -> dict[str, Any]:
    """What is written beside the measurements."""
    args = bench.args
    given = without_folders(args) | {"variants": list(args.variants), "init": []}
    given |= {"steps": [f"{args.steps}+{args.distill_steps}"], "lr_teacher_used": (args.lr_teacher or [None])[0]}
    return measured_with(bench, given, {args.policy: kept})


if __name__ == "__main__":
    main()
