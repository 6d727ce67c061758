"""What each stage of a conversion will cost: its own code on one batch of the teacher's own text, counted up.

Nothing is written. Times are counted up by sequences, sites, steps and scores; memory is what the trial held at most,
and what the whole text will hold beyond that.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .config import Config
from .passes.capture import capture_program, program_shapes
from .passes.choose import FORWARD, JOINT, RULES, scored_by
from .passes.make_stateful import make_stateful
from .passes.types import Plan
from .report import can_plot
from .runtime.align import GroupTrainer
from .runtime.calibrate import half_lives, initialise
from .runtime.config import AlignConfig, DistillConfig, TrainConfig
from .runtime.distill import Distiller
from .runtime.held_out import score_held_out
from .runtime.logits import split_model
from .runtime.memory import give_back
from .runtime.meter import Meter, Time
from .runtime.onnx_export import context_length
from .runtime.parallel import SOLO, Group
from .runtime.score_sites import sum_losses
from .runtime.student import Student, make_student
from .runtime.taps import LivePairs, SiteGroup, collect_taps, stored_pairs
from .runtime.weights import changed_names, unique_state
from .source import Source

# What the trial does not run of the export stage, by what it does run: fitted on the embedded teacher and SmolLM2-135M.
# torch.onnx.export takes so many times what torch.export takes for a node, and torch.export begins with a fixed part.
ONNX_NODE = 9.2
EXPORT_START = 300  # nodes
SAVED_PROGRAM = 0.45  # torch.export.save, in torch.export of the same graph
# ONNX Runtime against PyTorch takes so many times the comparison of the stateful graph in float64 with the whole one.
PARITY = 1.9
EXPORTER = 80_000_000  # bytes of torch.onnx, ONNX and ONNX Runtime
PLOTS, REPORT_BYTES = 7, 120_000  # of a report
SAMPLE = 32 * 2**20  # bytes that are hashed to measure how fast that is


@dataclass(frozen=True)
class StageCost:
    """peak: bytes of resident memory. files: bytes that stay in the run folder; scratch: those there for a while."""

    stage: str
    time: Time
    peak: int
    files: int = 0
    scratch: int = 0


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def counts(config: TrainConfig) -> tuple[int, int]:
    """Scores, the one before the first step included, and checkpoints of a training stage."""
    scores = 1 + config.steps // config.score_every + bool(config.steps % config.score_every)
    return scores, max(config.steps - 1, 0) // config.checkpoint_every


class Trial:
    """Runs a piece of every stage, in the order of the stages; each method is asked for once, in that order."""

    def __init__(
        self,
        source: Source,
        plan: Plan,
        ids: Tensor,
        config: Config,
        *,
        meter: Callable[[], Meter] = Meter,
        timed: bool = True,
        group: Group = SOLO,
    ) -> None:
        """ids [N, T]: the calibration sequences, the held-out ones last.

        meter: of time and memory. timed: False runs nothing again for the sake of its time. group: distillation is that
        of its process.
        """
        calib, self.meter, self.timed, self.group = config.calib, meter, timed, group
        self.source, self.chosen, self.ids, self.config = source, plan, ids, config
        self.take, self.held = min(calib.batch, calib.kept), min(calib.batch, calib.holdout)
        self.sample = torch.cat([ids[: self.take], ids[calib.sequences : calib.sequences + self.held]])
        self.text: Meter  # of the taps
        self.groups: list[SiteGroup] = []
        self.peak = 0  # of calibrate's pieces
        self.left = 0  # bytes that export leaves behind

    @cached_property
    def writing(self) -> Time:
        """Of one byte: it is written, and read again for its sha256."""
        block = bytes(SAMPLE)
        with self.meter() as m:
            hashlib.sha256(block).hexdigest()
        return m.time * (2 / SAMPLE)

    @cached_property
    def weights(self) -> int:
        return _bytes(unique_state(self.student))

    def stage(self, name: str) -> StageCost:
        """Of a stage of api.STAGES."""
        cost: StageCost = getattr(self, name)()
        return cost

    def plan(self) -> StageCost:
        with self.meter() as m:
            pass
        return StageCost("plan", m.time, m.peak)

    def _teacher_pass(self, rows: int) -> Time:
        """Of collect_taps over so many sequences."""
        size, first = len(self.sample), min(self.config.calib.batch, len(self.sample))
        if len(self._marks) == 1:
            return self.text.time * (rows / size)
        each = (self._marks[-1] - self._marks[0]) * (1 / (size - first))
        return (self.text.time + each * (rows - size)).at_least(self.text.time * (min(rows, size) / size))

    def _first_site(self, group: SiteGroup, rows: int) -> Time:
        part = replace(group, sites=group.sites[:1], names=group.names[:1], x=group.x[:1, :rows], y=group.y[:1, :rows])
        with self.meter() as m:
            given = {"init": self.config.init, "without": self.config.init_without}
            initialise(self.student, [part], seed=0, batch=self.config.calib.batch, **given)  # type: ignore[arg-type]
        self.peak = max(self.peak, m.peak)
        return m.time

    def _initialisation(self, group: SiteGroup, rows: int) -> Time:
        """Of one site on so many sequences: a line through two measurements, the first run being a warm-up."""
        if not self.timed:
            return self._first_site(group, self.take)
        _, more, less = (self._first_site(group, n) for n in (self.take, self.take + self.held, self.take))
        each = (more - less) * (1 / self.held)
        return (less + each * (rows - self.take)).at_least(less * (min(rows, self.take) / self.take))

    def calibrate(self) -> StageCost:
        calib, self._marks = self.config.calib, list[Time]()
        with self.meter() as self.text:
            self.student = make_student(self.source.capture, self.source.scan, self.chosen)
            if self.chosen.convert:
                self.groups = collect_taps(
                    self.student,
                    self.source.capture.gm,
                    self.sample,
                    batch=calib.batch,
                    progress=lambda *_: self._marks.append(Time.now()),
                )
        time, self.peak = self.text.time, self.text.peak
        if self.groups:
            time = self._teacher_pass(calib.kept + calib.holdout)
            self.sites = [(len(g.sites), self._initialisation(g, calib.kept)) for g in self.groups]
            for number, each in self.sites:
                time += each * number
        changed = changed_names(self.student)
        files = _bytes({n: t for n, t in unique_state(self.student).items() if n in changed})
        return StageCost("calibrate", time + self.writing * files, self.peak + self._beyond, files)

    @property
    def _values(self) -> int:
        """Bytes of the teacher's values that the trial holds."""
        return sum((t.numel() * t.element_size() for g in self.groups for t in (g.x, g.y)), 0)

    @property
    def values_in_all(self) -> int:
        """Bytes of the teacher's values of the whole text."""
        return self._values + self._beyond

    @property
    def _beyond(self) -> int:
        """Bytes of the teacher's values that the whole text has beyond the trial's."""
        return round(self._values * ((self.config.calib.kept + self.config.calib.holdout) / len(self.sample) - 1))

    def score(self, models: int) -> StageCost:
        """Of the plan's policy, which measures so many trial models, those of sets after alignment of every site."""
        calib, sites = self.config.calib, len(self.source.scan.sites)
        time = self._teacher_pass(calib.kept)
        number = sum(n for n, _ in self.sites)
        for n, each in self.sites:
            time += each * (n * sites / number)
        teacher, args = split_model(self.source.capture.gm), self.source.capture.inputs(self.sample)
        with self.meter() as m, torch.no_grad():
            student = make_student(self.source.capture, self.source.scan, self.chosen)
        with self.meter() as one, torch.no_grad():
            sum_losses(split_model(student.gm), teacher, [args], [teacher.hidden(args)])
        share = self.config.score.sequences / len(self.sample)
        beyond = round(self._values * (calib.kept * sites / number / len(self.sample) - 1))
        peak, scratch = max(self.peak, one.peak), 0
        measure, score = scored_by(self.chosen.policy), self.config.score
        if measure in (JOINT, FORWARD) and score.align_steps:
            config = self.config.align.model_copy(update={"steps": score.align_steps})
            aligned = self._alignment(config)
            time += self._teacher_pass(calib.kept + calib.holdout) + aligned.time * (sites / number)
            peak, scratch = max(peak, aligned.peak), aligned.scratch
        peak += beyond
        if measure == JOINT and score.distill_steps:  # when the teacher's values are given back
            trained = self._distillation(self.config.distill.trial(score.distill_steps), student)
            time += trained.time * (models - len(RULES) * sites)
            peak = max(peak, trained.peak)
            del student
            gc.collect()  # a graph refers to itself
        return StageCost("score", time + (m.time + one.time * share) * models, peak, scratch=scratch)

    def _alignment(self, config: AlignConfig) -> StageCost:
        """Of the steps alone, on the sites of the plan."""
        live = self.config.calib.init_sequences is not None
        pairs = LivePairs(self.student, self.groups, self.ids) if live else stored_pairs(self.groups)
        index = torch.arange(min(config.batch, self.config.calib.sequences)) % (len(self.ids) if live else self.take)
        with self.meter() as setup:
            trainers = [GroupTrainer(self.student, g, self.take, config) for g in self.groups]

        def step(number: int) -> None:
            for t, (x, y) in zip(trainers, pairs(index), strict=True):
                t.step(number, x, y, 0)

        trained = _training(config, step, lambda: [t.score() for t in trainers], self)
        time = setup.time + trained.whole(config, self.config.calib.holdout / self.held)
        scratch, saves = 0, counts(config)[1]
        if saves:
            scratch = sum(_bytes(t.state("")) for t in trainers)
            time += self.writing * (scratch * saves)
        return StageCost("align", time, max(setup.peak, trained.peak), scratch=scratch)

    def align(self) -> StageCost:
        config, files = self.config.align, self.weights
        time = self.writing * files
        if not (config.steps and self.groups):
            with self.meter() as m:
                pass
            return StageCost("align", time + m.time, m.peak + self._beyond + files, files)
        steps = self._alignment(config)
        with self.meter() as last:
            half_lives(self.student, self.groups, batch=self.config.calib.batch)
        time += steps.time + last.time
        return StageCost("align", time, max(steps.peak, last.peak + files) + self._beyond, files, steps.scratch)

    def distill(self) -> StageCost:
        with self.meter() as before:  # what alignment trained on is given back only after the stage has begun
            after = self._beyond
        self.groups = []
        give_back()
        config = self.config.distill.in_steps(self.config.calib.length)
        if not (config.active and self.chosen.convert):
            with self.meter() as m:
                pass
            return StageCost("distill", m.time, before.peak + after)
        steps = self._distillation(config, self.student, self.group)
        time = steps.time + self.writing * (self.weights + steps.scratch * counts(config)[1])
        return StageCost("distill", time, max(before.peak + after, steps.peak), self.weights, steps.scratch)

    def _distillation(self, config: DistillConfig, student: Student, group: Group = SOLO) -> StageCost:
        """Of the steps alone, of the first process of a group."""
        config = config.model_copy(update={"compile": False, "short_length": None})
        train = max(self.take, group.size)  # every process has a sequence
        rows = torch.cat([self.sample[torch.arange(train) % self.take], self.sample[self.take :]])
        counted = torch.ones(len(rows), rows.shape[1] - 1, dtype=torch.bool)
        with self.meter() as setup:
            trainer = Distiller(student, rows, counted, train=train, config=config, group=group)
        index = torch.arange(config.batch) % train
        trained = _training(config, lambda n: trainer.step(n, index), trainer.score, self)
        time = setup.time + trained.whole(config, self.config.calib.holdout / self.held)
        with self.meter() as last:  # of sharded weights both are put together
            scratch = _bytes(trainer.state()) if counts(config)[1] else 0
            trainer.restore()
        return StageCost("distill", time, max(setup.peak, trained.peak, last.peak), scratch=scratch)

    def export(self) -> StageCost:
        config = self.config.export
        give_back()
        with self.meter() as held:
            score_held_out(self.student.gm, self.source.capture, self.sample[self.take :])
        with self.meter() as program:
            exported = self.student.export()
        longest, bounded = context_length(config, self.source.teacher.info), config.bounded_windows
        with self.meter() as graph:
            run = exported.module()
            flat = capture_program(exported, teacher=run, implementation="student", shapes=program_shapes(longest))
        with self.meter() as plain:
            unchecked = make_stateful(flat, verify=False, max_length=longest, bounded=bounded)
        with self.meter() as checked:
            make_stateful(flat, max_length=longest, bounded=bounded)
        each = program.time * (1 / (EXPORT_START + len(exported.graph.nodes)))
        onnx = each * (ONNX_NODE * len(unchecked.gm.graph.nodes))
        parity = (checked.time - plain.time) * PARITY
        time = program.time * (1 + SAVED_PROGRAM) + graph.time + checked.time + onnx + parity
        time += held.time * (self.config.calib.holdout / self.held)
        peak = max(m.peak for m in (held, program, graph, checked)) + EXPORTER + self.weights  # ONNX Runtime's own
        self.left = self.weights
        return StageCost("export", time + self.writing * (3 * self.weights), peak, 2 * self.weights)

    def report(self) -> StageCost:
        """Two plots are drawn, the first of which loads matplotlib; what export made is still held."""
        with self.meter() as first:
            _draw()
        with self.meter() as second:
            _draw()
        peak = max(first.peak, second.peak) + self.left
        return StageCost("report", first.time + second.time * (PLOTS - 1), peak, REPORT_BYTES)


def _draw() -> None:
    if can_plot():
        from .report.blocks import Plot
        from .report.svg import draw

        def fill(axes: Any) -> None:
            mesh = axes.pcolormesh([[1.0, 20.0]] * 8, norm="log")
            axes.figure.colorbar(mesh, ax=axes)

        draw(Plot("trial", fill))


@dataclass(frozen=True)
class _Trained:
    first: Time
    step: Time
    score: Time
    peak: int

    def whole(self, config: TrainConfig, share: float) -> Time:
        """Of the stage; share: held-out sequences over those that the trial scored."""
        return self.first + self.step * (config.steps - 1) + self.score * (counts(config)[0] * share)


def _training(
    config: TrainConfig, step: Callable[[int], object], score: Callable[[], object], trial: Trial
) -> _Trained:
    """A score as before the first step, the first step, which makes the optimiser's state, and some more."""
    with trial.meter() as scored:
        score()
    with trial.meter() as first:
        step(0)
    more: list[Time] = []
    peak = max(scored.peak, first.peak)
    least, most = (2, 9) if trial.timed else (1, 1) if config.steps > 1 else (0, 0)
    while len(more) < least or (len(more) < most and sum(t.seconds for t in more) < 8):
        with trial.meter() as m:
            step(1)
        more, peak = [*more, m.time], max(peak, m.peak)
    if not trial.timed:  # as after the last step, when a better score keeps another copy of the weights
        with trial.meter() as m:
            score()
        peak = max(peak, m.peak)
    times = more or [first.time]
    middle = Time(median(t.seconds for t in times), median(t.cpu_seconds for t in times))
    return _Trained(first.time, middle, scored.time, peak)
