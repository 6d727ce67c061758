"""One pass of the teacher over the calibration text: what enters and leaves every converted site.

L sites of a group, N sequences, T tokens, C width. Sites of a group run one program with stacked parameters.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from tcal_compiler.errors import StageError
from tcal_compiler.passes.site_program import SiteProgram, cut_program, outside_values, tap_graph
from tcal_compiler.passes.types import AttentionSite

from .student import Student

Progress = Callable[[int, int], None]
# Tokens of a pass at least, of the teacher or of a site: small ones leave a GPU waiting for the next launch.
PASS_TOKENS = {"cuda": 16384}


@dataclass(frozen=True)
class SiteGroup:
    """Sites whose x -> y programs are the same code with parameters of the same shapes.

    program: the first site's, run with every site's parameters. names: per site, program parameter -> path in gm.
    x, y: [L, N, T, C], the teacher's values. outside: the program's further arguments for a batch of n sequences.
    """

    sites: tuple[AttentionSite, ...]
    program: SiteProgram
    names: tuple[dict[str, str], ...]
    x: Tensor
    y: Tensor
    outside: Callable[[int], tuple[object, ...]]


Pairs = list[tuple[Tensor, Tensor]]  # x and y [L, n, T, C] of each group


def stored_pairs(groups: list[SiteGroup]) -> Callable[[Tensor], Pairs]:
    """The groups' values of the sequences that are asked for."""
    return lambda index: [(g.x[:, index.to(g.x.device)], g.y[:, index.to(g.y.device)]) for g in groups]


class LivePairs:
    """The groups' values of any of the sequences ids [N, T], by a pass of the teacher each time: nothing is stored."""

    def __init__(self, student: Student, groups: list[SiteGroup], ids: Tensor) -> None:
        self.ids, self.inputs = ids, student.capture.inputs
        self.sizes = [len(g.sites) for g in groups]
        self.device = next(student.capture.gm.parameters()).device
        self.taps = tap_graph(student.capture.gm, [n for g in groups for s in g.sites for n in (s.x, s.y)])

    @torch.no_grad()
    def __call__(self, index: Tensor) -> Pairs:
        values = iter(self.taps(*self.inputs(self.ids[index].to(self.device))))
        sites = iter(list(zip(values, values, strict=True)))
        parts = [[next(sites) for _ in range(size)] for size in self.sizes]
        return [(torch.stack([x for x, _ in part]), torch.stack([y for _, y in part])) for part in parts]


def _same_outside(a: tuple[object, ...], b: tuple[object, ...]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(p, q) if isinstance(p, Tensor) and isinstance(q, Tensor) else p == q
        for p, q in zip(a, b, strict=True)
    )


def _outside_for(student: Student, names: tuple[str, ...], length: int, device: torch.device) -> Callable:
    cache: dict[int, tuple[object, ...]] = {}

    def values(batch: int) -> tuple[object, ...]:
        if batch not in cache:
            ids = torch.zeros(batch, length, dtype=torch.long, device=device)
            cache[batch] = outside_values(student.gm, names, student.capture.inputs(ids))
        return cache[batch]

    return values


def group_programs(
    student: Student, length: int, device: torch.device
) -> list[tuple[list[AttentionSite], list[SiteProgram]]]:
    """Converted sites grouped by code, parameter shapes and outside values."""
    groups: list[tuple[list[AttentionSite], list[SiteProgram], tuple[object, ...]]] = []
    for s in student.converted:
        program = cut_program(student.gm, inputs_from=[s.x], outputs=[s.y])
        outside = _outside_for(student, program.outside, length, device)(1)
        for sites, programs, values in groups:
            alike = programs[0].same_as(program) and _same_outside(values, outside)
            alike = alike and (sites[0].window, sites[0].first) == (s.window, s.first)
            if alike and (not s.local or sites[0].scale == s.scale):  # the first one's mixer runs for all of them
                sites.append(s)
                programs.append(program)
                break
        else:
            groups.append(([s], [program], outside))
    return [(sites, programs) for sites, programs, _ in groups]


def _mapped(size: int, dtype: torch.dtype, folder: Path) -> Tensor:
    """A tensor of so many bytes on the disk of folder; its file has no name, so that nothing stays when we are done."""
    with tempfile.TemporaryDirectory(prefix=".tmp-taps-", dir=folder) as place:
        file = Path(place) / "taps.bin"
        with file.open("wb") as f:
            if hasattr(os, "posix_fallocate"):  # a disk that is full shows here; later it would be a deadly signal
                os.posix_fallocate(f.fileno(), 0, size)
        return torch.from_file(str(file), shared=True, size=size // dtype.itemsize, dtype=dtype)


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, spill: Path | None) -> Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    takes_memory = device.type == "cpu" and detect_fake_mode() is None
    if takes_memory and size > 0.2 * psutil.virtual_memory().available:
        if spill is None or psutil.disk_usage(str(spill)).free < 1.1 * size:
            raise StageError(
                "calibrate",
                f"the taps of {shape[0]} sites need {size / 1e9:.1f} GB, more than a fifth of the free memory, "
                "and the disk has no room either",
                "fewer --calib-sequences, or free memory or disk",
            )
        return _mapped(size, dtype, spill).view(shape)
    return torch.empty(shape, dtype=dtype, device=device)


@torch.no_grad()
def collect_taps(
    student: Student,
    teacher_gm: torch.fx.GraphModule,
    ids: Tensor,
    *,
    batch: int,
    dtype: torch.dtype = torch.float32,
    spill: Path | None = None,
    progress: Progress | None = None,
) -> list[SiteGroup]:
    """Runs the teacher over ids [N, T] and keeps x and y of every converted site in `dtype`.

    Tensors that would take more than a fifth of the free memory are files under `spill`. Raises StageError when neither
    memory nor disk suffices, or when a site's output is not finite.
    """
    device = next(teacher_gm.parameters()).device
    groups = group_programs(student, ids.shape[1], device)
    sites = [s for group, _ in groups for s in group]
    taps = tap_graph(teacher_gm, [n for s in sites for n in (s.x, s.y)])
    shape = (ids.shape[0], ids.shape[1], -1)
    stores: list[tuple[Tensor, Tensor]] = []
    for group, _ in groups:
        widths = [int(taps_width) for taps_width in (group[0].hidden, _output_width(teacher_gm, group[0]))]
        full = [(len(group), *shape[:2], w) for w in widths]
        stores.append(tuple(_allocate(f, dtype, device, spill) for f in full))  # type: ignore[arg-type]
    for start in range(0, len(ids), batch):
        part = ids[start : start + batch].to(device)
        try:
            values = iter(taps(*student.capture.inputs(part)))
        except (IndexError, RuntimeError) as e:
            if isinstance(e, torch.OutOfMemoryError) or "allocate memory" in str(e):
                raise
            what = f"the teacher fails on {len(part)} x {ids.shape[1]} tokens: {str(e).splitlines()[0]}"
            raise StageError("calibrate", what, "a shorter --calib-length") from e
        for (group, _), (xs, ys) in zip(groups, stores, strict=True):
            for i in range(len(group)):
                xs[i, start : start + len(part)] = next(values).to(dtype)
                ys[i, start : start + len(part)] = next(values).to(dtype)
        if progress:
            progress(min(start + batch, len(ids)), len(ids))
    for (group, _), (_, ys) in zip(groups, stores, strict=True):
        for s, y in zip(group, ys, strict=True):
            if not bool(torch.isfinite(y.sum(dtype=torch.float64))):
                raise StageError(s.layer or s.anchor, "the teacher's attention output is not finite on this text")
    return [
        SiteGroup(
            tuple(group),
            programs[0],
            tuple(p.params for p in programs),
            xs,
            ys,
            _outside_for(student, programs[0].outside, ids.shape[1], device),
        )
        for (group, programs), (xs, ys) in zip(groups, stores, strict=True)
    ]


def _output_width(gm: torch.fx.GraphModule, site: AttentionSite) -> int:
    node = next(n for n in gm.graph.nodes if n.name == site.y)
    return int(node.meta["val"].shape[-1])
