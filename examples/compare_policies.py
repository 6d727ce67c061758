"""Compares policies at one budget, and measures what alignment and distillation add to their students.

    python examples/compare_policies.py embedded --budget 25% --eval heldout.txt --out work --json policies.json
    python examples/compare_policies.py embedded --budget 25% --eval heldout.txt --out work --policy uniform \
        --align-steps 180 --distill-steps 50 --json distilled.json

Every site is initialised once, on the same calibration sequences; the students of all policies share these values, as
they would have them in a run of their own. Scores are measured on the held-out calibration sequences. All students are
evaluated on a text that was not calibrated on. What was measured lies in --out, and a second call does not repeat it.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tcal_compiler.api import CALIBRATION_TEXT
from tcal_compiler.passes.choose import JOINT, RANKED, RULES, choose, choose_jointly
from tcal_compiler.passes.types import Plan
from tcal_compiler.progress import Progress
from tcal_compiler.runtime import data
from tcal_compiler.runtime.align import align
from tcal_compiler.runtime.config import AlignConfig, DistillConfig
from tcal_compiler.runtime.distill import distill
from tcal_compiler.runtime.evaluate import evaluate
from tcal_compiler.runtime.score_sites import Trials, initial_student, planned_student, score_sites
from tcal_compiler.runtime.select_sites import SetScores, aligned_student
from tcal_compiler.runtime.student import Student
from tcal_compiler.runtime.taps import collect_taps
from tcal_compiler.source import Source, open_source


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("teacher")
    p.add_argument("--budget", default="25%", help="sites to keep: a number or a percentage")
    p.add_argument("--policy", action="append", help="uniform, kl, ar or greedy; repeat; default: all four")
    p.add_argument("--calib", type=Path, default=CALIBRATION_TEXT)
    p.add_argument("--eval", type=Path, required=True, help="text to evaluate on")
    p.add_argument("--sequences", type=int, default=128, help="to initialise and to train on")
    p.add_argument("--holdout", type=int, default=8, help="further sequences: to rank sites, and to choose weights")
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--eval-length", type=int, default=512)
    p.add_argument("--eval-sequences", type=int, default=32)
    p.add_argument("--score-align-steps", type=int, default=200, help="before kl measures sets of sites")
    p.add_argument("--align-steps", type=int, default=0)
    p.add_argument("--distill-steps", type=int, default=0)
    p.add_argument("--distill-batch", type=int, default=16)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, required=True, help="folder for initial values and scores")
    p.add_argument("--json", type=Path)
    return p.parse_args()


class Comparison:
    """One teacher, its initialised sites, and texts; makes the students of policies."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.progress, self.seconds = args, Progress(), {}
        self.source: Source = open_source(args.teacher)
        tokenizer = self.source.tokenizer
        assert tokenizer is not None
        seen = {args.calib.name: data.text_sha256(args.calib)}, {args.calib.name: data.paragraph_hashes(args.calib)}
        data.check_not_calibrated(args.eval, *seen)
        eos = tokenizer.eos_token_id
        rows, counts = data.encode_rows(data.read_text(args.calib), tokenizer, eos, length=args.length)
        count = args.sequences + args.holdout
        if count > len(rows):
            raise SystemExit(
                f"{args.calib} holds {len(rows)} sequences of {args.length} tokens; {count} were asked for"
            )
        self.ids, self.counts = rows[:count], counts[:count]
        self.text = data.text_rows(args.eval, tokenizer, sequences=args.eval_sequences, length=args.eval_length)
        args.out.mkdir(parents=True, exist_ok=True)
        self.initial = self.timed("init of every site", self._initial)

    def timed(self, what: str, call: Any) -> Any:
        start = time.perf_counter()
        out = call()
        self.seconds[what] = round(time.perf_counter() - start, 1)
        print(f"{what}: {self.seconds[what]} s", flush=True)
        return out

    def _initial(self) -> Student:
        return initial_student(
            self.source.capture,
            self.source.scan,
            self.ids[: self.args.sequences],
            init="closed-form",
            seed=self.args.seed,
            batch=8,
            cache=self.args.out / "initial.safetensors",
            progress=self.progress.bar,
        )

    def plan(self, policy: str) -> Plan:
        asked = f"{policy}:{self.args.budget}"
        if policy == JOINT:
            ranks = {rule: self._scores(rule) for rule in RULES}
            return self.timed(
                "scores of candidate sets",
                lambda: choose_jointly(self.source.scan, asked, ranks, self._sets().kl),
            )
        return choose(self.source.scan, asked, self._scores(policy) if policy in RANKED else None)

    def _scores(self, policy: str) -> dict[int, float]:
        """Of each site on its own."""
        trials = Trials(self.source.capture, self.source.scan, policy, None if policy == "ar" else self.initial)
        held, cache = self.ids[self.args.sequences :], self.args.out / f"{policy}.json"
        found = self.timed(f"scores for {policy}", lambda: score_sites(trials, held, batch=8, cache=cache))
        return {s.index: s.value for s in found}

    def _sets(self) -> SetScores:
        """Scores of sets of sites that were all aligned for --score-align-steps."""
        steps, held = self.args.score_align_steps, self.ids[self.args.sequences :]
        cache = self.args.out / f"sets-{steps}.json"
        return SetScores(
            self.source.capture, self.source.scan, held, initial=lambda: self._aligned(steps), batch=8, cache=cache
        )

    def _aligned(self, steps: int) -> Student:
        if not steps:
            return self.initial
        a = self.args
        return aligned_student(
            self._initial(),
            self.ids[: a.sequences],
            self.ids[a.sequences :],
            kept=a.sequences,
            config=AlignConfig(steps=steps),
            seed=a.seed,
            batch=8,
            cache=a.out / f"aligned-{steps}.safetensors",
            progress=self.progress.bar,
        )

    def students(self, policy: str) -> tuple[Plan, dict[str, Student]]:
        """The initialised student, and the aligned and the distilled one where steps are asked for."""
        a, plan = self.args, self.plan(policy)
        student = planned_student(self.initial, self.source.scan, plan)
        made = {"initialised": replace(student, gm=copy.deepcopy(student.gm))}
        if a.align_steps:
            groups = collect_taps(student, self.source.capture.gm, self.ids, batch=8)
            config, bar = AlignConfig(steps=a.align_steps), self.progress.bar("alignment")
            options = {"train": a.sequences, "config": config, "seed": a.seed, "progress": bar}
            self.timed(f"alignment of {policy}", lambda: align(student, groups, **options))
            made[f"aligned, {a.align_steps} steps"] = replace(student, gm=copy.deepcopy(student.gm))
        if a.distill_steps:
            config = DistillConfig(steps=a.distill_steps, batch=a.distill_batch, score_every=25)
            bar = self.progress.bar("distillation", tokens=a.distill_batch * a.length, loss_name="KL")
            options = {"train": a.sequences, "config": config, "seed": a.seed, "progress": bar}
            _, curve = self.timed(
                f"distillation of {policy}", lambda: distill(student, self.ids, self.counts, **options)
            )
            print("  held-out calibration KL: " + ", ".join(f"{p['step']}: {p['kl']:.4f}" for p in curve), flush=True)
            made[f"distilled, {a.distill_steps} steps"] = student
        return plan, made


def main() -> None:
    args = arguments()
    comparison = Comparison(args)
    capture = comparison.source.capture
    plans, students = {}, {}
    for policy in args.policy or ["uniform", JOINT, *RANKED]:
        plan, made = comparison.students(policy)
        plans[policy] = {"keep": list(plan.keep), "scores": plan.scores}
        students |= {f"{policy}, {name}": s for name, s in made.items()}
    results = comparison.timed(
        "evaluation",
        lambda: evaluate(
            comparison.text,
            teacher=lambda ids: capture.gm(*capture.inputs(ids)),
            students={n: s.logits for n, s in students.items()},
        ),
    )
    base = results["teacher"].perplexity
    for name, r in results.items():
        kept = plans[name.split(",")[0]]["keep"] if name != "teacher" else "all"
        print(f"{name:32} kept {kept}: perplexity {r.perplexity:.2f}, x{r.perplexity / base:.3f}, KL {r.kl:.4f}")
    if args.json:
        given = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("json", "out")}
        environment = {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
        body = {"arguments": given, "environment": environment, "seconds": comparison.seconds, "plans": plans}
        body["results"] = {n: asdict(r) for n, r in results.items()}
        args.json.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
