"""What examples/measure_conversion.py measures with: one teacher with its texts, and the arms of one plan and seed."""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import published_recipe
import torch
from conversion_schedule import NO_TRIAL, RECIPES, Schedule, Start, Trial, align_config, distill_config
from torch import Tensor

from tcal_compiler.passes.choose import FORWARD, JOINT, RULES, candidates, choose, choose_jointly, scored_by
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.passes.graph import move_to
from tcal_compiler.passes.site_program import cut_program
from tcal_compiler.passes.types import Capture, Plan, SiteScan
from tcal_compiler.runtime.align import align
from tcal_compiler.runtime.calibrate import initialise
from tcal_compiler.runtime.capture_teacher import capture_teacher
from tcal_compiler.runtime.data import (
    check_not_calibrated,
    count_rows,
    encode_documents,
    pack,
    paragraph_hashes,
    read_text,
    text_sha256,
)
from tcal_compiler.runtime.distill import distill
from tcal_compiler.runtime.evaluate import evaluate
from tcal_compiler.runtime.retrieval import NUM_EXAMPLES, retrieval_tasks
from tcal_compiler.runtime.score_sites import Trials, initial_student, score_sites
from tcal_compiler.runtime.select_sites import SetScores, aligned_student, forward_path
from tcal_compiler.runtime.sources import CalibrationText, TextSource
from tcal_compiler.runtime.student import Student, make_student
from tcal_compiler.runtime.taps import LivePairs, SiteGroup, collect_taps
from tcal_compiler.runtime.tasks import BATCH_TOKENS, Task, score_tasks
from tcal_compiler.runtime.teacher import load_teacher, load_tokenizer
from tcal_compiler.runtime.tokenizer import TokenizerLike, prompt_start
from tcal_compiler.runtime.zero_shot import with_average, zero_shot_tasks

RANKED_ON = 8  # held-out calibration sequences that a policy measures on, as in tcal-compile


class Bench:
    """Teacher, calibration sequences, and what is scored, shared by all students of a call."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.seconds: dict[str, float] = {}
        self.took = 0.0  # of what was timed last
        teacher = self.timed("load", lambda: load_teacher(args.teacher, tokenizer=args.tokenizer))
        self.context: int | None = teacher.info.get("context_length")
        tokenizer = load_tokenizer(teacher)
        self.capture: Capture = self.timed("capture", lambda: capture_teacher(teacher))
        self.scan: SiteScan = self.timed("match", lambda: find_attention(self.capture))
        move_to(self.capture.gm, self.device)
        calib = CalibrationText((TextSource(Path(args.calib)),), args.repeats)
        self.ids = calib.sequences(tokenizer, count=args.sequences + args.holdout, length=args.length)
        self.counts = torch.ones(len(self.ids), args.length - 1, dtype=torch.bool)
        self.kept = args.init_sequences or args.sequences
        self.seen = {args.calib: text_sha256(args.calib)}, {args.calib: paragraph_hashes(args.calib)}
        self.texts = dict(self._text(item, tokenizer) for item in args.eval)
        self.tasks: list[Task] = self.timed("tasks", lambda: self._tasks(tokenizer))
        self._ranks: dict[str, dict[int, float]] = {}
        self._set_scores: dict[tuple[int, Trial], SetScores] = {}
        self.candidates: dict[str, list[dict[str, Any]]] = {}
        self.on_candidate: Callable[[], None] = lambda: None  # when one of these was measured
        self._scratch = tempfile.TemporaryDirectory()

    def timed(self, what: str, call: Any) -> Any:
        """What call returns; how long it took is kept and printed. The same name again adds up."""
        start = time.perf_counter()
        out = call()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.took = time.perf_counter() - start
        self.seconds[what] = round(self.seconds.get(what, 0.0) + self.took, 2)
        print(f"{what}: {self.took:.2f} s", flush=True)
        return out

    def _text(self, item: str, tokenizer: TokenizerLike) -> tuple[str, Tensor]:
        name, _, place = item.partition("=")
        path, _, own = place.partition(":")
        check_not_calibrated(path, *self.seen)
        ids = encode_documents(read_text(path), tokenizer, tokenizer.eos_token_id)
        length = int(own) if own else self.args.eval_length
        start, most = prompt_start(tokenizer), self.args.eval_sequences or len(ids)
        count = min(count_rows(ids, length=length, start=start), most * self.args.eval_length // length)
        return f"{name} ({length})", pack(ids, sequences=count, length=length, what=path, start=start)

    def _tasks(self, tokenizer: TokenizerLike) -> list[Task]:
        a, tasks = self.args, []
        for kind, lengths in (("needle", a.needle), ("recall", a.recall)):
            if lengths:
                path = a.filler or a.eval[0].partition("=")[2].partition(":")[0]
                check_not_calibrated(path, *self.seen)
                given = {"lengths": lengths, "examples": a.limit or NUM_EXAMPLES}
                tasks += retrieval_tasks(read_text(path), tokenizer, kind=kind, **given)
        if a.tasks:
            tasks += zero_shot_tasks(a.tasks, a.task_files, tokenizer, limit=a.limit, calibrated=self.seen)
        return tasks

    def plan(self, policy: str) -> Plan:
        """Policies that measure do so once for all budgets, on the last RANKED_ON calibration sequences."""
        name = scored_by(policy)
        if name is None:
            return choose(self.scan, policy)
        if name == FORWARD:
            sets = self._sets(self.args.score_align_steps)
            return self.timed("scores for forward", lambda: choose(self.scan, policy, path=forward_path(sets)))
        if name == JOINT:
            return self._joint_plan(policy)
        return choose(self.scan, policy, self._scores(name))

    def _scores(self, name: str) -> dict[int, float]:
        """Of each site on its own."""
        if name not in self._ranks:
            trials = Trials(self.capture, self.scan, name, None if name == "ar" else self._initial())
            given = {"batch": self.args.batch, "cache": Path(self._scratch.name) / f"{name}.json"}
            found = self.timed(f"scores for {name}", lambda: score_sites(trials, self.ids[-RANKED_ON:], **given))
            self._ranks[name] = {s.index: s.value for s in found}
        return self._ranks[name]

    def _joint_plan(self, policy: str) -> Plan:
        """Of every candidate the KL is kept that it has after each of --score-distill-steps, of which the first counts;
        without any, after those of alignment, of which there are none or four times as many too.
        """
        ranks, steps = {rule: self._scores(rule) for rule in RULES}, self.args.score_align_steps
        asked = self.args.score_distill_steps
        sets = {str(n): self._sets(n) for n in ((steps,) if asked else (0, steps, 4 * steps))}
        sets |= {f"{steps}+{t.name}": self._sets(steps, t) for t in asked}
        decides = self._sets(steps, *asked[:1])
        rows = self.candidates[policy] = [
            {"rule": rule, "keep": list(keep), "kl": {}} for rule, keep in candidates(self.scan, policy, ranks).items()
        ]

        def measured() -> Plan:
            for name, scores in sets.items():
                for row in rows:
                    row["kl"][name] = scores.kl(tuple(row["keep"]))
                    self.on_candidate()
            return choose_jointly(self.scan, policy, ranks, decides.kl)

        return self.timed("scores of candidate sets", measured)

    def _sets(self, align_steps: int, trial: Trial = NO_TRIAL) -> SetScores:
        """Scores of sets of sites that were aligned and then distilled for so many steps."""
        key = align_steps, trial

        def train(student: Student) -> None:
            config = trial.config(self.args)
            distill(student, self.ids, self.counts, train=self.args.sequences, config=config, seed=0)

        if key not in self._set_scores:
            self._set_scores[key] = SetScores(
                self.capture,
                self.scan,
                self.ids[-RANKED_ON:],
                initial=lambda: self._aligned(align_steps) if align_steps else self._initial(),
                batch=self.args.batch,
                cache=Path(self._scratch.name) / f"sets-{align_steps}-{trial.steps}-{trial.warmup}.json",
                train=train if trial.steps else None,
            )
        return self._set_scores[key]

    def _aligned(self, steps: int) -> Student:
        student = self._initial()
        return self.timed(
            f"alignment of every site, {steps} steps",
            lambda: aligned_student(
                student,
                self.ids[: self.args.sequences],
                self.ids[self.args.sequences :],
                kept=self.kept,
                config=align_config(self.args, steps, (self.args.lr_teacher or [None])[0]),
                seed=0,
                batch=self.args.batch,
                cache=Path(self._scratch.name) / f"aligned-{steps}.safetensors",
                progress=lambda what: lambda *_: None,
            ),
        )

    def _initial(self) -> Student:
        """Every site converted and initialised; made once."""
        return self.timed(
            "init of every site",
            lambda: initial_student(
                self.capture,
                self.scan,
                self.ids[: self.kept],
                init="closed-form",
                seed=0,
                batch=self.args.batch,
                cache=Path(self._scratch.name) / "initial.safetensors",
                progress=lambda what: lambda *_: None,
            ),
        )

    @torch.no_grad()
    def score(self, students: dict[str, Student]) -> dict[str, dict[str, Any]]:
        """All students on all texts; the teacher's logits are computed once."""
        out: dict[str, dict[str, Any]] = {n: {} for n in students}
        for text, ids in self.texts.items():
            batch = max(1, BATCH_TOKENS["cuda"] // ids.shape[1]) if self.device.type == "cuda" else 1
            models = {n: s.logits for n, s in students.items()}
            results = evaluate(ids.to(self.device), teacher=self.teacher, students=models, batch=batch)
            teacher = results.pop("teacher").perplexity
            for name, r in results.items():
                ratio = r.perplexity / teacher
                out[name][text] = asdict(r) | {"teacher": teacher, "ratio": ratio}
                print(
                    f"{name} on {text}: perplexity {r.perplexity:.2f}, teacher {teacher:.2f}, ratio {ratio:.4f}, "
                    f"KL {r.kl:.4f} +- {r.kl_stderr:.4f}",
                    flush=True,
                )
        return out

    def score_tasks(self, students: dict[str, Student]) -> dict[str, list[dict[str, Any]]]:
        """The teacher and all students on all tasks."""
        if not self.tasks:
            return {}
        models = {"teacher": self.teacher, **{n: s.logits for n, s in students.items()}}
        found = score_tasks(self.tasks, models, device=self.device, context_length=self.context)
        scores = {name: with_average(rows) for name, rows in found.items()}
        for name, rows in scores.items():
            for s in rows:
                print(
                    f"{name} on {s.task}: {s.metric} {s.value:.4f} +- {s.stderr:.4f}, "
                    f"against the teacher {s.change:+.4f} +- {s.change_stderr:.4f}",
                    flush=True,
                )
        return {name: [asdict(s) for s in rows] for name, rows in scores.items()}

    def teacher(self, ids: Tensor) -> Tensor:
        return self.capture.gm(*self.capture.inputs(ids))


class Arms:
    """The students of one plan and one seed."""

    def __init__(self, bench: Bench, plan: Plan, seed: int) -> None:
        self.bench, self.args, self.plan, self.seed = bench, bench.args, plan, seed
        self.taps: list[SiteGroup] = []
        self.spent: dict[object, float] = {}  # seconds of the taps, of each start and of each alignment
        self.starts: dict[Start, tuple[Student, list[SiteGroup], dict[str, Tensor]]] = {}
        self.recipes: dict[tuple[str, int], tuple[Student, dict[str, Tensor]]] = {}
        self.found: dict[tuple[Start, int, float | None], tuple[dict[str, Tensor], float]] = {}

    def fresh(self) -> Student:
        student = make_student(self.bench.capture, self.bench.scan, self.plan)
        move_to(student.gm, self.bench.device)
        return student

    def groups(self, student: Student) -> list[SiteGroup]:
        """Taps with this student's programs; the teacher runs over the text once for all students."""
        if not self.taps:
            ids = self.bench.ids
            self.taps = self.bench.timed(
                "teacher over the calibration text",
                lambda: collect_taps(
                    student,
                    self.bench.capture.gm,
                    torch.cat([ids[: self.bench.kept], ids[self.args.sequences :]]),
                    batch=self.args.batch,
                    dtype=torch.bfloat16 if self.bench.device.type == "cuda" else torch.float32,
                ),
            )
            self.spent["taps"] = self.bench.took
        ends = [(g, g.sites[0]) for g in self.taps]
        return [replace(g, program=cut_program(student.gm, inputs_from=[s.x], outputs=[s.y])) for g, s in ends]

    @staticmethod
    def few(groups: list[SiteGroup], sequences: int) -> list[SiteGroup]:
        return [replace(g, x=g.x[:, :sequences], y=g.y[:, :sequences]) for g in groups]

    def initialised(self, start: Start, sequences: int | None = None) -> tuple[Student, list[SiteGroup]]:
        """From so many of the sequences, by default all that the initialisation may use."""
        student = self.fresh()
        groups = self.groups(student)
        train = self.few(groups, sequences or self.bench.kept)
        given = {"init": start.init, "without": start.without, "seed": self.seed, "batch": self.args.batch}
        student, _ = self.bench.timed(f"init {start.name}", lambda: initialise(student, train, **given))
        return student, groups

    def aligned(self, schedule: Schedule, lr_teacher: float | None) -> tuple[Student, float]:
        """A student after alignment and its error on the held-out calibration sequences, NaN without a step."""
        start, steps = schedule.start, schedule.align
        if schedule.init in RECIPES:
            return self.by_recipe(schedule), math.nan
        if start not in self.starts:
            student, groups = self.initialised(start)
            self.spent[start] = self.bench.took
            self.starts[start] = student, groups, weights_of(student)
        student, groups, values = self.starts[start]
        key = (start, steps, lr_teacher)
        set_weights(student, self.found[key][0] if key in self.found else values)
        if key in self.found:
            return student, self.found[key][1]
        if not steps:
            return student, math.nan
        config = align_config(self.args, steps, lr_teacher)
        live = LivePairs(student, groups, self.bench.ids[: self.args.sequences]) if self.args.init_sequences else None
        student, curve = self.bench.timed(
            f"align from {start.name} {steps} steps, lr {config.lr_new:g} and {config.lr_teacher:g}",
            lambda: align(student, groups, train=self.bench.kept, config=config, seed=self.seed, live=live),
        )
        self.spent[key] = self.bench.took
        means = [[sum(p[k].values()) / len(p[k]) for k in ("train", "held_out")] for p in curve]
        print("  error on trained, held-out: " + ", ".join(f"{t:.4f} {h:.4f}" for t, h in means), flush=True)
        best = min(h for _, h in means)
        self.found[key] = weights_of(student), best
        return student, best

    def seconds_to_aligned(self, schedule: Schedule, lr_teacher: float | None) -> float:
        """From the loaded teacher to the aligned student: its values on the text, initial values, alignment."""
        parts = ("taps", schedule.start, (schedule.start, schedule.align, lr_teacher))
        return round(sum(self.spent[part] for part in parts), 2)

    def by_recipe(self, schedule: Schedule) -> Student:
        """The published recipe or its mended form, on its own few sequences; trained once for all distillations."""
        key = schedule.init, schedule.align
        if key not in self.recipes:
            student = self._by_recipe(schedule)
            self.recipes[key] = student, weights_of(student)
        student, values = self.recipes[key]
        set_weights(student, values)
        return student

    def _by_recipe(self, schedule: Schedule) -> Student:
        student, groups = self.initialised(Start("taylor"), sequences=published_recipe.SEQUENCES)
        if schedule.init == "published":
            given = {"seed": self.seed, "batch": self.args.batch}
            plain, few = student, self.few(groups, published_recipe.SEQUENCES)
            student = self.bench.timed(
                "init published", lambda: published_recipe.published_student(plain, few, **given)
            )
        if schedule.align:
            errors = self.bench.timed(
                f"align {schedule.init} {schedule.align} steps",
                lambda: published_recipe.train_layers(student, groups, steps=schedule.align),
            )
            first, last = (sum(e) / len(errors) for e in zip(*errors.values(), strict=True))
            print(f"  error of the first and last step: {first:.4f} {last:.4f}", flush=True)
        return student

    def distilled(self, student: Student, schedule: Schedule) -> Student:
        """The student after distillation on the sequences that it was aligned on; every prediction counts."""
        ids = self.bench.ids
        config, train = distill_config(self.args, schedule.distill), self.args.sequences
        student, curve = self.bench.timed(
            f"distil {schedule.name}",
            lambda: distill(student, ids, self.bench.counts, train=train, config=config, seed=self.seed),
        )
        print("  held-out KL: " + ", ".join(f"{p['kl']:.4f}" for p in curve), flush=True)
        return student


def weights_of(student: Student) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in student.gm.named_parameters()}


def set_weights(student: Student, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for n, v in values.items():
            student.gm.get_parameter(n).copy_(v)
