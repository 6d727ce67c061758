"""The calibration stage: statistics of every converted site, then its initial values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor
from torch.fx import GraphModule

from tcal_compiler.errors import StageError
from tcal_compiler.passes.graph import argument, aten, by_name
from tcal_compiler.passes.rewrite_gdn import mixer_path
from tcal_compiler.passes.site_program import cut_program
from tcal_compiler.passes.types import AttentionSite

from .config import InitName, InitPart
from .initialize import (
    closed_form_output_,
    left_alone,
    local_scale_,
    naive_,
    ridge_update,
    set_memory_,
    taylor_output_,
    zero_gate_,
)
from .mixer import GdnMixer
from .statistics import (
    LocalSums,
    NormalSums,
    OutputSums,
    SiteStats,
    attention_statistics,
    local_sums,
    normal_sums,
    output_sums,
)
from .student import Student
from .taps import PASS_TOKENS, Progress, SiteGroup

RIDGE = 1e-3


@dataclass(frozen=True)
class SiteReport:
    """What was measured and set at one site; heads' values as lists, errors relative to the teacher's mean square.

    half_life: tokens per head, of the initial values, see GdnMixer.half_life.
    """

    index: int
    distance: list[float]
    entropy: list[float]
    mass: list[list[float]]
    half_life: list[float]
    error: float


@dataclass(frozen=True)
class OutputProjection:
    """y = z W^T + b inside the graph: node names of z and y, path of the weight, and whether it is stored [Z, R]."""

    z: str
    weight: str
    bias: str | None
    transposed: bool


def output_projection(gm: GraphModule, site: AttentionSite) -> OutputProjection:
    """Finds the linear map behind the attention core: the node y or the product above y's view."""
    node = by_name(gm)[site.y]
    while node.target not in (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default):
        node = node.args[0]  # type: ignore[assignment]
    names = {
        aten.linear.default: ("input", "weight", "bias", False),
        aten.addmm.default: ("mat1", "mat2", "self", True),
        aten.mm.default: ("self", "mat2", None, True),
        aten.matmul.default: ("self", "other", None, True),
    }[node.target]
    z, weight = argument(node, names[0]), argument(node, names[1])
    bias = argument(node, names[2]) if names[2] else None
    while weight.op != "get_attr":  # a transposed view of the parameter
        weight = weight.args[0]
    return OutputProjection(z.name, str(weight.target), str(bias.target) if bias is not None else None, names[3])


def _batches(x: Tensor, y: Tensor, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(x), size):
        yield x[start : start + size].to(device).float(), y[start : start + size].to(device).float()


class SiteCalibrator:
    """Measures and initialises one site from the teacher's x and y."""

    def __init__(self, student: Student, group: SiteGroup, position: int, batch: int) -> None:
        self.gm, self.site, self.batch = student.gm, group.sites[position], batch
        self.x, self.y, self.outside = group.x[position], group.y[position], group.outside
        self.qkv = cut_program(self.gm, inputs_from=[self.site.x], outputs=[self.site.q, self.site.k, self.site.v])
        whole = cut_program(self.gm, inputs_from=[self.site.x], outputs=[self.site.y]).outside
        self._pick = [whole.index(n) for n in self.qkv.outside]
        self._whole = whole
        mixer = self.gm.get_submodule(mixer_path(self.site.index))
        assert isinstance(mixer, GdnMixer)
        self.mixer = mixer
        self.device = next(self.gm.parameters()).device

    def not_finite(self) -> StageError:
        """The error of a site whose initial values give NaN or infinity."""
        where = f"calibrate, {self.site.layer or self.site.anchor}"
        return StageError(where, "its output after initialisation is not finite", "another --init, or keep this layer")

    def rows(self) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor]]:
        for x, y in _batches(self.x, self.y, self.batch, self.device):
            outside = self.outside(len(x))
            yield x, self.qkv.gm(x, *(outside[i] for i in self._pick)), y

    def half_life(self) -> list[float]:
        """Of the mixer as it is, on the first batch."""
        x = self.x[: self.batch].to(self.device).float()
        return self.mixer.half_life(x).tolist()

    @torch.no_grad()
    def measure(self) -> SiteStats:
        parts = (attention_statistics(q, k, v, site=self.site)[0] for _, (q, k, v), _ in self.rows())
        return reduce(SiteStats.merge, parts)

    @torch.no_grad()
    def outputs(self) -> OutputSums:
        """Sums of the context on the rule's output, with the mixer's present decay and write gate."""
        return reduce(
            OutputSums.merge,
            (output_sums(q, k, v, self.mixer.core(q, k, v, x), site=self.site) for x, (q, k, v), _ in self.rows()),
        )

    @torch.no_grad()
    def local_outputs(self) -> LocalSums:
        """Sums of the attention over the last tokens, with the mixer's present decay and write gate."""

        def each() -> Iterator[LocalSums]:
            for x, (q, k, v), _ in self.rows():
                _, context = attention_statistics(q, k, v, site=self.site)
                yield local_sums(context, self.mixer.core(q, k, v, x), self.mixer.local_output(q, k, v))

        return reduce(LocalSums.merge, each())

    def fit(self, stats: SiteStats, init: InitName, without: Sequence[InitPart] = ()) -> None:
        """What taylor or closed-form set, but for some parts; later parts are fitted to what the earlier ones give."""
        with left_alone(self.mixer, without):
            set_memory_(self.mixer, stats)
        sums = self.outputs()
        if init == "closed-form" and self.mixer.local and "local-window" not in without:
            sums = local_scale_(self.mixer, sums, self.local_outputs())
        with left_alone(self.mixer, without):
            (taylor_output_ if init == "taylor" else closed_form_output_)(self.mixer, sums)
        if init == "closed-form" and "ridge" not in without:
            self.refit()

    @torch.no_grad()
    def refit(self, strength: float = RIDGE) -> None:
        """Ridge refit of the output projection to the teacher's y, prior = the present weight."""
        proj = output_projection(self.gm, self.site)
        inner = cut_program(self.gm, inputs_from=[self.site.x], outputs=[proj.z, self.site.y])
        pick = [self._whole.index(n) for n in inner.outside]
        total: NormalSums | None = None
        for x, y in _batches(self.x, self.y, self.batch, self.device):
            outside = self.outside(len(x))
            z, out = inner.gm(x, *(outside[i] for i in pick))
            sums = normal_sums(z.reshape(-1, z.shape[-1]), (y - out).reshape(-1, y.shape[-1]))
            total = sums if total is None else total.merge(sums)
        assert total is not None
        if not bool(total.zz.isfinite().all()):
            raise self.not_finite()
        delta = ridge_update(total, strength).delta
        weight = self.gm.get_parameter(proj.weight)
        weight.add_((delta.T if proj.transposed else delta).to(weight.dtype))

    @torch.no_grad()
    def error(self, limit: int | None = None) -> float:
        """Mean squared error of y over the teacher's mean square."""
        program = cut_program(self.gm, inputs_from=[self.site.x], outputs=[self.site.y]).gm
        wrong = power = 0.0
        for x, y in _batches(self.x[:limit], self.y[:limit], self.batch, self.device):
            wrong += (program(x, *self.outside(len(x))) - y).square().sum(dtype=torch.float64).item()
            power += y.square().sum(dtype=torch.float64).item()
        return wrong / max(power, 1e-30)


def half_lives(student: Student, groups: list[SiteGroup], *, batch: int) -> dict[str, list[float]]:
    """GdnMixer.half_life of every converted site, by index, on the first `batch` sequences of the groups."""
    device = next(student.gm.parameters()).device
    found = {}
    for group in groups:
        for site, x in zip(group.sites, group.x, strict=True):
            mixer = student.gm.get_submodule(mixer_path(site.index))
            assert isinstance(mixer, GdnMixer)
            found[str(site.index)] = mixer.half_life(x[:batch].to(device).float()).tolist()
    return found


def initialise(
    student: Student,
    groups: list[SiteGroup],
    *,
    init: InitName,
    without: Sequence[InitPart] = (),
    seed: int,
    batch: int,
    progress: Progress | None = None,
) -> tuple[Student, list[SiteReport]]:
    """Sets every mixer's parameters in place, for closed-form the output projection too.

    without: parts of taylor and closed-form that stay as naive has them, ridge as the teacher has it (check_parts).
    Statistics are measured for every init, so that the report shows them. batch: sequences at a time, more where a
    device has too little to do with them (PASS_TOKENS). Raises StageError, with the site's name, when its output is not
    finite.
    """
    generator = torch.Generator().manual_seed(seed)
    least = PASS_TOKENS.get(next(student.gm.parameters()).device.type, 0)
    reports, done = [], 0
    total = sum(len(g.sites) for g in groups)
    for group in groups:
        for i, site in enumerate(group.sites):
            job = SiteCalibrator(student, group, i, max(batch, least // group.x.shape[2]))
            stats = job.measure()
            (zero_gate_ if init == "zero-gate" else naive_)(job.mixer, generator)
            if init in ("taylor", "closed-form"):
                job.fit(stats, init, without)
            error = job.error()
            if not math.isfinite(error):
                raise job.not_finite()
            done += 1
            reports.append(
                SiteReport(
                    site.index,
                    stats.distance.tolist(),
                    stats.entropy.tolist(),
                    stats.mass.tolist(),
                    job.half_life(),
                    error,
                )
            )
            if progress:
                progress(done, total)
    return replace(student, stage="initialised"), sorted(reports, key=lambda r: r.index)
