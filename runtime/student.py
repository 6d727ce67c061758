"""The student: the teacher's graph with mixers, and what is needed to run and to save it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from tcal_compiler.errors import UnsupportedModelError
from tcal_compiler.passes.base import run_passes
from tcal_compiler.passes.capture import export_module
from tcal_compiler.passes.graph import copy_module
from tcal_compiler.passes.rewrite_gdn import RewriteToGdn
from tcal_compiler.passes.to_sdpa import WrittenToSdpa
from tcal_compiler.passes.types import AttentionSite, Capture, Plan, SiteScan

from .mixer import GdnMixer

Stage = Literal["rewritten", "initialised", "aligned", "distilled"]


@dataclass(frozen=True)
class Student:
    """gm(input_ids[, position_ids]) -> logits [B, T, V]; everything is frozen except the parameters of gm."""

    gm: GraphModule
    capture: Capture
    sites: tuple[AttentionSite, ...]
    plan: Plan
    stage: Stage = "rewritten"

    @property
    def converted(self) -> tuple[AttentionSite, ...]:
        return tuple(s for s in self.sites if s.index in self.plan.convert)

    @property
    def kept(self) -> tuple[AttentionSite, ...]:
        return tuple(s for s in self.sites if s.index in self.plan.keep)

    def logits(self, ids: Tensor) -> Tensor:
        """ids [B, T] int64, unpadded -> logits [B, T, V]."""
        return self.gm(*self.capture.inputs(ids))

    def state_dict(self) -> dict[str, Tensor]:
        """Every parameter and buffer once under each of its names (tied ones under all)."""
        named = [*self.gm.named_parameters(remove_duplicate=False), *self.gm.named_buffers(remove_duplicate=False)]
        return {n: t.detach() for n, t in named}

    def export(self) -> torch.export.ExportedProgram:
        """The student as a program with dynamic batch and length."""
        for p in self.gm.parameters():
            p.requires_grad_(False)
        return export_module(self.gm, has_positions=self.capture.has_positions, vocab_size=self.capture.vocab_size)


def require_sites(scan: SiteScan) -> None:
    """Raises UnsupportedModelError, with the reasons, when there is no attention core that can be converted."""
    if not scan.sites:
        reasons = "; ".join(f"{r.layer or r.node}: {r.reason}" for r in scan.rejected[:4])
        what = f"has no attention core that can be converted ({reasons or 'no softmax attention found'})"
        raise UnsupportedModelError("teacher", what, "tcal inspect TEACHER lists every core with its reason")


def make_student(capture: Capture, scan: SiteScan, plan: Plan) -> Student:
    """Copies the teacher's graph and puts a GdnMixer in each planned site.

    Raises UnsupportedModelError when the teacher has no attention core that can be converted.
    """
    require_sites(scan)
    gm = copy_module(capture.gm)
    if plan.convert:  # cores that stay keep the teacher's spelling, and so its bits
        written = {s.written for s in scan.sites if s.index in plan.convert and s.written}
        run_passes(gm, [WrittenToSdpa(capture, only=written), RewriteToGdn(plan, scan.sites, GdnMixer)])
    gm.recompile()
    return Student(gm, capture, scan.sites, plan)


@torch.no_grad()
def without_linear(student: Student) -> Student:
    """A copy whose converted sites give 0 before their output projection: what is left without the linear layers."""
    gm = copy_module(student.gm)
    for m in gm.modules():
        if isinstance(m, GdnMixer):
            m.norm.zero_()
            if m.local:
                m.local_scale.zero_()
    return replace(student, gm=gm)
