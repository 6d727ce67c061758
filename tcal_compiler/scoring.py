"""The stages score-kl, score-ar, score-greedy, score-forward and score-decode of a run folder, for the policies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import DEFAULT_POLICY, Config
from .distillation import distillation_rows
from .errors import ConfigError
from .passes.budget import Costs
from .passes.choose import FORWARD, JOINT, RULES, budget_of, candidates, choose, choose_jointly, scored_by
from .passes.graph import move_to
from .passes.types import Plan, SiteScan
from .progress import Progress
from .recorded import reading
from .resume import resuming
from .runtime.distill import distill
from .runtime.distill_checks import check_short, check_train
from .runtime.manifest import hash_json
from .runtime.run_folder import RunFolder, Stage
from .runtime.score_sites import SiteScore, Trials, initial_student, score_sites
from .runtime.select_sites import Sets, SetScores, aligned_student, forward_path, sets_from_rows
from .runtime.sources import CalibrationText
from .runtime.step_seconds import step_seconds
from .runtime.student import Student
from .runtime.taps import Progress as Steps
from .runtime.tokenizer import prompt_start

if TYPE_CHECKING:
    from .source import Source


def check_distilled_sets(config: Config, scan: SiteScan) -> None:
    """Raises ConfigError when the sets of kl cannot be distilled for score.distill_steps, or would be on the test."""
    score, calib, policy = config.score, config.calib, config.policy or DEFAULT_POLICY
    if scored_by(policy) != JOINT or not score.distill_steps:
        return
    if score.sequences > calib.holdout:
        what = f"is {score.distill_steps}, on {score.sequences - calib.holdout} of the {score.sequences} sequences too "
        what += f"that sets are measured on (score.sequences): {calib.holdout} are held out"
        raise ConfigError("score.distill_steps", what, f"calib.holdout = {score.sequences}, or 0 steps")
    trial = config.distill.trial(score.distill_steps)
    check_short(trial, calib.length)
    if budget_of(scan, policy).count == 0:
        check_train(trial, Plan((), tuple(s.index for s in scan.sites), policy))


class Scoring:
    """What the policies measure: a teacher and its text, on the last config.score.sequences of its calibration ids."""

    def __init__(
        self,
        run: RunFolder,
        source: Source,
        text: CalibrationText,
        ids: Tensor,
        config: Config,
        device: torch.device,
        progress: Progress,
    ) -> None:
        """ids: calibration sequences, with which text begins, the held-out ones last."""
        self.run, self.source, self.text, self.ids, self.config = run, source, text, ids, config
        self.device, self.progress = device, progress
        self.policy = DEFAULT_POLICY if config.policy is None else config.policy
        self.seconds = self._step_seconds()
        tokens = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
        self.inputs: dict[str, Any] = {"teacher": source.capture.fingerprint, "tokens": tokens}
        self.settings: dict[str, Any] = {"sequences": config.score.sequences}
        self.aligning = config.align.model_copy(update={"steps": config.score.align_steps, "patience": None})
        self.distilling = config.distill.trial(config.score.distill_steps)
        measure = scored_by(self.policy)
        if measure != "ar":
            self.settings |= config.initial_values() | {"calib": config.calib.kept}
        if measure in (JOINT, FORWARD):
            self.settings["policy"] = self.policy
            if config.score.align_steps:
                self.settings |= {"align": self.aligning.settings(), "train": config.calib.sequences}
            if measure == JOINT and config.score.distill_steps:
                self.settings |= {"distill": self.distilling.settings(), "holdout": config.calib.holdout}
                self.inputs["text"] = text.identity()
            if self.seconds is not None:
                self.settings["seconds"] = sorted(self.seconds.items())
        self.measured_on = ids[-config.score.sequences :]

    def _step_seconds(self) -> Costs | None:
        """Of every site, for a policy with a budget of time: measured once for a teacher and a number of tokens."""
        scan, budget = self.source.scan, budget_of(self.source.scan, self.policy)
        if not budget.timed:
            return None
        settings, inputs = {"tokens": budget.tokens}, {"teacher": self.source.capture.fingerprint}
        with self.run.stage("score-decode", config=settings, inputs=inputs) as stage:
            if not stage.done:
                self.progress.say(f"scores: the step behind {budget.tokens} tokens is timed at every kind of site")
                found = step_seconds(scan, budget.tokens)
                stage.evidence = {"seconds": [[i, *pair] for i, pair in found.items()]}
            with reading(self.run.path):
                rows: Any = stage.evidence["seconds"]
                found = {int(i): (float(softmax), float(converted)) for i, softmax, converted in rows}
                return {s.index: found[s.index] for s in scan.sites}

    def plan(self, *, reuse: bool = True) -> Plan:
        """Of the policy. reuse: what was measured for another budget is not measured again."""
        measure = scored_by(self.policy)
        if measure == JOINT:
            return self.joint_plan(reuse=reuse)
        return self.forward_plan(reuse=reuse) if measure == FORWARD else self.ranked_plan()

    def initial(self, scratch: Path) -> Student:
        """Every site converted and initialised, kept in scratch while the stage runs."""
        return initial_student(
            self.source.capture,
            self.source.scan,
            self.ids[: self.config.calib.kept],
            init=self.config.init,
            without=self.config.init_without,
            seed=self.config.seed,
            batch=self.config.calib.batch,
            cache=scratch / "initial.safetensors",
            progress=self.progress.bar,
        )

    def aligned(self, stage: Stage) -> Student:
        """Every site converted, initialised and aligned for score.align_steps, kept while the stage runs."""
        student = self.initial(stage.scratch)
        if not self.aligning.steps:
            return student
        train = self.config.calib.sequences
        with resuming(stage, self.progress, self.aligning.steps) as (resume, save):
            return aligned_student(
                student,
                self.ids[:train],
                self.ids[train:],
                kept=self.config.calib.kept,
                config=self.aligning,
                seed=self.config.seed,
                batch=self.config.calib.batch,
                cache=stage.scratch / "aligned.safetensors",
                resume=resume,
                save=save,
                progress=self.progress.bar,
            )

    def scores(self, measure: str, scratch: Path) -> list[SiteScore]:
        """Of each site on its own, of one of RULES or of RANKED."""
        initial = None if measure == "ar" else self.initial(scratch)
        return score_sites(
            Trials(self.source.capture, self.source.scan, measure, initial),
            self.measured_on,
            batch=self.config.calib.batch,
            cache=scratch / f"{measure}.json",
            progress=self.progress.bar(f"scores for {measure}: one model a site"),
        )

    @cached_property
    def _rows(self) -> tuple[Tensor, Tensor, int]:
        return distillation_rows(self)

    def distilled(self, student: Student, progress: Steps) -> None:
        """In place, as the run will be, for score.distill_steps; progress: is told how many are done."""
        assert self.source.tokenizer is not None
        ids, counts, train = self._rows
        distill(
            student,
            ids,
            counts,
            train=train,
            config=self.distilling,
            seed=self.config.seed,
            progress=lambda done, total, _: progress(done, total),
            start=prompt_start(self.source.tokenizer),
        )

    def sets(self, stage: Stage, known: Sets, train: Callable[[Student], None] | None = None) -> SetScores:
        """Scores of sets, of which some may be known. train: what a set's student goes through first."""
        return SetScores(
            self.source.capture,
            self.source.scan,
            self.measured_on,
            initial=lambda: self.aligned(stage),
            batch=self.config.calib.batch,
            cache=stage.scratch / "sets.json",
            known=known,
            train=train,
        )

    def ranked_plan(self) -> Plan:
        """One model a site, measured once for a teacher, text and initialisation, whatever the budget."""
        policy = scored_by(self.policy)
        assert policy is not None
        with self.run.stage(f"score-{policy}", config=self.settings, inputs=self.inputs) as stage:
            if not stage.done:
                move_to(self.source.capture.gm, self.device)
                stage.evidence = {"sites": [asdict(s) for s in self.scores(policy, stage.scratch)]}
                _write(stage.dir, policy, stage.evidence["sites"])
        with reading(self.run.path):
            return choose(self.source.scan, self.policy, _values(stage.evidence["sites"]), seconds=self.seconds)

    def joint_plan(self, *, reuse: bool) -> Plan:
        """Single sites, then candidate sets; with reuse, what another budget had measured is not measured again."""
        scan, old = self.source.scan, self._earlier() if reuse else {}
        with self.run.stage(f"score-{JOINT}", config=self.settings, inputs=self.inputs) as stage:
            if stage.done:
                with reading(self.run.path):
                    found = sets_from_rows(stage.evidence["sets"])
                    return choose_jointly(scan, self.policy, _ranks(stage.evidence), found.__getitem__, self.seconds)
            move_to(self.source.capture.gm, self.device)
            rows = old or {rule: [asdict(s) for s in self.scores(rule, stage.scratch)] for rule in RULES}
            ranks = _ranks(rows)
            rules, asked = candidates(scan, self.policy, ranks, self.seconds), set[tuple[int, ...]]()
            steps = self.distilling.steps
            units = (steps + 1) * len(set(rules.values()))  # measuring a set counts as a step

            def train(student: Student) -> None:
                before = (len(asked) - 1) * (steps + 1)
                self.distilled(student, lambda done, _: bar(before + done, units))

            known = sets_from_rows(old["sets"]) if old else {}
            sets = self.sets(stage, known, train if steps else None)
            if sets.prepare(rules.values()) and steps:
                _ = self._rows  # now, so that the bar times the sets alone
            bar = self.progress.bar(
                "scores: candidate sets" + (f", {steps} steps of distillation each" if steps else "")
            )

            def kl(keep: tuple[int, ...]) -> float:
                asked.add(keep)
                found = sets.kl(keep)
                bar(len(asked) * (steps + 1), units)
                return found

            plan = choose_jointly(scan, self.policy, ranks, kl, self.seconds)
            stage.evidence = {rule: rows[rule] for rule in RULES} | {
                "made_from": self._made_from,
                "candidates": [{"rule": r, "keep": list(keep), "kl": sets.kl(keep)} for r, keep in rules.items()],
                "sets": sets.rows(),
            }
            _write(stage.dir, JOINT, {k: stage.evidence[k] for k in (*RULES, "candidates")})
        return plan

    def forward_plan(self, *, reuse: bool) -> Plan:
        """Forward selection; with reuse, sets that another budget had measured are not measured again."""
        scan, old = self.source.scan, self._earlier() if reuse else {}
        with self.run.stage(f"score-{FORWARD}", config=self.settings, inputs=self.inputs) as stage:
            if stage.done:
                with reading(self.run.path):
                    path = _path(stage.evidence["path"], {s.index for s in scan.sites})
                    return choose(scan, self.policy, path=path, seconds=self.seconds)
            move_to(self.source.capture.gm, self.device)
            scores = self.sets(stage, sets_from_rows(old["sets"]) if old else {})
            path = []
            walk = _noted(forward_path(scores, self.progress.bar), path.append)
            plan = choose(scan, self.policy, path=walk, seconds=self.seconds)
            stage.evidence = {
                "made_from": self._made_from,
                "sets": scores.rows(),
                "path": [{"keep": list(keep), "kl": kl} for keep, kl in path],
            }
            _write(stage.dir, FORWARD, stage.evidence["sets"])
        return plan

    @property
    def _made_from(self) -> str:
        """What sets were measured with, whatever the budget."""
        return hash_json([{k: v for k, v in self.settings.items() if k not in ("policy", "seconds")}, self.inputs])

    def _earlier(self) -> Any:
        """The evidence of this policy for another budget; empty when there is none that was made from the same."""
        record = self.run.manifest.stages.get(f"score-{scored_by(self.policy)}")
        if record is None or record.evidence.get("made_from") != self._made_from:
            return {}
        with reading(self.run.path):
            sets_from_rows(record.evidence["sets"])  # type: ignore[arg-type]
            if scored_by(self.policy) == JOINT:
                _ranks(record.evidence)
        return record.evidence


def _values(sites: Any) -> dict[int, float]:
    return {int(s["index"]): float(s["value"]) for s in sites}


def _ranks(evidence: Any) -> dict[str, dict[int, float]]:
    return {rule: _values(evidence[rule]) for rule in RULES}


def _path(rows: Any, sites: set[int]) -> list[tuple[tuple[int, ...], float]]:
    found = list(sets_from_rows(rows).items())
    if unknown := {i for keep, _ in found for i in keep} - sites:
        raise ValueError(f"sites {sorted(unknown)} are not the teacher's")
    return found


def _noted(path: Any, note: Callable[[Any], None]) -> Any:
    for item in path:
        note(item)
        yield item


def _write(folder: Path, policy: str, rows: Any) -> None:
    file = folder / "scores" / f"{policy}.json"
    file.parent.mkdir()
    file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
