"""Which sites to keep softmax, measured as sets: what the policies kl and forward choose by."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from tcal_compiler.errors import RunFolderError, StageError
from tcal_compiler.passes.files import read_small
from tcal_compiler.passes.json_text import read_json
from tcal_compiler.passes.types import Capture, Plan, SiteScan

from .align import align
from .config import AlignConfig
from .durable import write_atomic
from .logits import SplitModel, split_model
from .score_sites import planned_student, sum_losses
from .student import Student
from .taps import LivePairs, Progress, collect_taps
from .training import Save, TrainState
from .weights import changed_names, load_weights, save_weights

Sets = dict[tuple[int, ...], float]


def aligned_student(
    initial: Student,
    ids: Tensor,
    held: Tensor,
    *,
    kept: int,
    config: AlignConfig,
    seed: int,
    batch: int,
    cache: Path,
    resume: TrainState | None = None,
    save: Save | None = None,
    progress: Callable[[str], Progress],
) -> Student:
    """`initial`, where every site is converted, aligned in place, or as `cache` has it; then it is written there.

    A site is aligned on the teacher's x and y alone, so it comes to the same values in any plan.

    ids [N, T]: what is trained on; the teacher's values of the first `kept` are stored, and where there are more, those
    of a step's sequences are computed in the step. held [M, T]: what chooses the weights. batch: of the teacher.
    """
    device = next(initial.gm.parameters()).device
    if cache.is_file():
        load_weights(initial, cache)
        return replace(initial, stage="aligned")
    groups = collect_taps(
        initial,
        initial.capture.gm,
        torch.cat([ids[:kept], held]),
        batch=batch,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        spill=cache.parent,
        progress=progress("scores: teacher over the text to align on"),
    )
    bar = progress(f"scores: alignment of all {len(initial.sites)} sites")
    live = LivePairs(initial, groups, ids) if kept < len(ids) else None
    given = {"config": config, "seed": seed, "live": live, "resume": resume, "save": save, "progress": bar}
    student, _ = align(initial, groups, train=kept, **given)  # type: ignore[arg-type]
    unfinished = cache.with_suffix(".new")
    save_weights(student, unfinished, only=changed_names(student))
    unfinished.replace(cache)
    return student


class SetScores:
    """Mean KL(teacher || student) in nats per token of the students of sets of kept sites, one in memory at a time.

    Each set is measured once: `known` and the file `cache` hold those that were measured before.
    """

    def __init__(
        self,
        capture: Capture,
        scan: SiteScan,
        ids: Tensor,
        *,
        initial: Callable[[], Student],
        batch: int,
        cache: Path,
        known: Sets | None = None,
        train: Callable[[Student], None] | None = None,
    ) -> None:
        """ids [N, T]: what is measured on. initial: every site converted, with its values; called when first needed.

        train: trains the student of a set in place before it is measured.
        """
        self.capture, self.scan, self.ids, self.batch, self.cache = capture, scan, ids, batch, cache
        self.measured: Sets = (known or {}) | _read(cache)
        self._make_initial, self._train = initial, train

    @cached_property
    def _initial(self) -> Student:
        return self._make_initial()

    @cached_property
    @torch.no_grad()
    def _teacher(self) -> tuple[SplitModel, list[tuple[Tensor, ...]], list[Tensor]]:
        """The teacher, its arguments and its hidden states of each batch."""
        device = next(self.capture.gm.parameters()).device
        teacher = split_model(self.capture.gm)
        parts = [self.capture.inputs(p.to(device)) for p in self.ids.split(self.batch)]
        return teacher, parts, [teacher.hidden(p) for p in parts]

    def prepare(self, sets: Iterable[tuple[int, ...]]) -> bool:
        """Makes what measuring these takes beforehand, where one of them is not known: kl then takes its own time.

        Returns whether one is not known.
        """
        sites = tuple(s.index for s in self.scan.sites)
        unknown = any(keep != sites and keep not in self.measured for keep in sets)
        if unknown:
            _ = self._initial, self._teacher
        return unknown

    def kl(self, keep: tuple[int, ...]) -> float:
        """Of the student that keeps these sites, in ascending order. Raises StageError when it is not finite."""
        sites = tuple(s.index for s in self.scan.sites)
        if keep == sites:
            self.measured[keep] = 0.0  # the teacher itself
        if keep not in self.measured:
            plan = Plan(keep, tuple(i for i in sites if i not in keep), "")
            kl = self._kl_of(plan)
            if self._train:
                gc.collect()  # a graph refers to itself: the weights of this set go before those of the next come
            if not math.isfinite(kl):
                what = f"KL {kl:.4g} of the student that keeps {list(keep)} is not finite"
                raise StageError("score", what, "another --init, or keep=I,J,...")
            self.measured[keep] = kl
            write_atomic(self.cache, json.dumps(self.rows()).encode())
        return self.measured[keep]

    def _kl_of(self, plan: Plan) -> float:
        student = planned_student(self._initial, self.scan, plan)  # which may have to be aligned, with gradients
        if self._train:
            self._train(student)
        with torch.no_grad():
            total = sum_losses(split_model(student.gm), *self._teacher)
        return total.kl.item() / total.count

    def rows(self) -> list[dict[str, object]]:
        """Every measured set as JSON data."""
        return [{"keep": list(keep), "kl": kl} for keep, kl in self.measured.items()]


def sets_from_rows(rows: list[dict[str, object]]) -> Sets:
    """SetScores.rows back. Raises KeyError, TypeError or ValueError for anything else."""
    return {tuple(int(i) for i in row["keep"]): float(row["kl"]) for row in rows}  # type: ignore[attr-defined, arg-type]


def _read(cache: Path) -> Sets:
    if not cache.is_file():
        return {}
    try:
        return sets_from_rows(read_json(read_small(cache)))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as e:
        raise RunFolderError(str(cache), f"cannot be read: {e}", "delete it: the sets are then measured again") from e


def forward_path(
    scores: SetScores, progress: Callable[[str], Progress] | None = None
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Sets of kept sites with their KL: none, then one more at a time, each time the one that leaves the least KL.

    Every set is measured when it is asked for: with n sites the k-th costs n - k + 1 trial models.
    """
    keep: tuple[int, ...] = ()
    yield keep, scores.kl(keep)
    rest = [s.index for s in scores.scan.sites]
    while rest:
        bar = progress(f"forward selection, site {len(keep) + 1} to keep") if progress else None
        found = []
        for number, index in enumerate(rest, start=1):
            found.append((scores.kl(tuple(sorted((*keep, index)))), index))
            if bar:
                bar(number, len(rest))
        kl, best = min(found)
        rest.remove(best)
        keep = tuple(sorted((*keep, best)))
        yield keep, kl
