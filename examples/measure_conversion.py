"""Measures a conversion: perplexity and KL of naive, initialised and aligned students against their teacher.

    python examples/measure_conversion.py TEACHER --policy keep=0,4,8 --calib calib.jsonl --eval heldout=heldout.jsonl \
        --sequences 384 --steps 300 --steps 1000 --json out.json

Every student of one call shares the teacher, the calibration sequences, the seed and the evaluation sequences. Texts
given to --eval are scored as consecutive sequences of --eval-length tokens; a text that was calibrated on is refused.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from tcal_compiler.passes.choose import choose
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.passes.graph import move_to
from tcal_compiler.passes.site_program import cut_program
from tcal_compiler.passes.types import Capture, Plan, SiteScan
from tcal_compiler.runtime.align import align
from tcal_compiler.runtime.calibrate import initialise
from tcal_compiler.runtime.capture_teacher import capture_teacher
from tcal_compiler.runtime.config import AlignConfig, DistillConfig, InitName
from tcal_compiler.runtime.data import (
    check_not_calibrated,
    encode_documents,
    pack,
    paragraph_hashes,
    read_text,
    text_sha256,
)
from tcal_compiler.runtime.distill import distill
from tcal_compiler.runtime.evaluate import evaluate
from tcal_compiler.runtime.student import Student, make_student
from tcal_compiler.runtime.taps import LivePairs, SiteGroup, collect_taps
from tcal_compiler.runtime.teacher import load_teacher, load_tokenizer


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("teacher")
    p.add_argument("--policy", default="uniform:25%")
    p.add_argument("--calib", required=True, help="calibration text")
    p.add_argument("--eval", action="append", default=[], metavar="NAME=FILE[:LENGTH]", help="text; repeat")
    p.add_argument("--sequences", type=int, default=64)
    p.add_argument("--init-sequences", type=int, help="those of them that the initialisation uses; default: all")
    p.add_argument("--holdout", type=int, default=8, help="further calibration sequences that choose the weights")
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--eval-length", type=int, default=2048)
    p.add_argument("--eval-sequences", type=int, help="at most so many sequences of each text")
    p.add_argument("--init", action="append", default=[], help="inits to score without a gradient step; repeat")
    p.add_argument(
        "--steps",
        type=schedule,
        action="append",
        default=[],
        metavar="[INIT:]A[+D]",
        help="A alignment steps from INIT (closed-form), then D steps of distillation on the same sequences; repeat",
    )
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--lr-new", type=float, help="peak rate of gates and norms; default as in tcal-compile")
    p.add_argument(
        "--lr-teacher",
        type=float,
        action="append",
        default=[],
        help="peak rate of the teacher's projections; of several, the one with the least error on the held-out "
        "calibration sequences after the first --steps is used",
    )
    p.add_argument("--distill-batch", type=int, help="sequences in a step of distillation; default: --batch")
    p.add_argument("--distill-lr-gdn", type=float, help="default as in tcal-compile")
    p.add_argument("--distill-lr-other", type=float, help="default as in tcal-compile")
    p.add_argument("--distill-dtype", choices=["captured", "bfloat16"], default="captured", help="of products")
    p.add_argument("--distill-compile", action="store_true", help="distill.compile = true")
    p.add_argument("--weight-decay", type=float, help="of the teacher's projections; default as in tcal-compile")
    p.add_argument("--noise", type=float, help="on the sites' inputs; default as in tcal-compile")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--json", type=Path)
    return p.parse_args()


@dataclass(frozen=True)
class Schedule:
    """Where a student starts, and how many steps it is trained."""

    init: InitName
    align: int
    distill: int

    @property
    def name(self) -> str:
        parts = [] if self.init == "closed-form" else [self.init]
        parts += [f"aligned-{self.align}"] if self.align or not parts else []
        return "-".join([*parts, f"distilled-{self.distill}"] if self.distill else parts)

    @property
    def spelled(self) -> str:
        return f"{self.init}:{self.align}+{self.distill}"


def schedule(text: str) -> Schedule:
    """ "300": closed-form, 300 steps of alignment; "880+120" and 120 of distillation; "naive:0+120" no alignment."""
    init, _, steps = text.rpartition(":")
    aligned, _, distilled = steps.partition("+")
    return Schedule(TypeAdapter(InitName).validate_python(init or "closed-form"), int(aligned), int(distilled or 0))


def environment(device: torch.device) -> dict[str, Any]:
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    commit = os.environ.get("TCAL_COMMIT", head)  # set it for a copy of the tree without its history
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    return {"device": name, "torch": torch.__version__, "python": platform.python_version(), "commit": commit}


class Bench:
    """Teacher, calibration taps and evaluation sequences, shared by all students."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.seconds: dict[str, float] = {}
        self.taps: list[SiteGroup] = []
        self.starts: dict[InitName, tuple[Student, list[SiteGroup], dict[str, torch.Tensor]]] = {}
        self.found: dict[tuple[InitName, int, float | None], tuple[dict[str, torch.Tensor], float]] = {}
        teacher = self.timed("load", lambda: load_teacher(args.teacher))
        tokenizer = load_tokenizer(teacher)
        self.capture: Capture = self.timed("capture", lambda: capture_teacher(teacher))
        self.scan: SiteScan = self.timed("match", lambda: find_attention(self.capture))
        self.plan: Plan = choose(self.scan, args.policy)
        move_to(self.capture.gm, self.device)
        eos = tokenizer.eos_token_id
        rows = args.sequences + args.holdout
        tokens = encode_documents(read_text(args.calib), tokenizer, eos, most=rows * args.length)
        self.ids = pack(tokens, sequences=rows, length=args.length, what=args.calib)
        self.kept = args.init_sequences or args.sequences
        seen = {args.calib: text_sha256(args.calib)}, {args.calib: paragraph_hashes(args.calib)}
        self.texts = {}
        for item in args.eval:
            name, _, place = item.partition("=")
            path, _, own = place.partition(":")
            check_not_calibrated(path, *seen)
            ids = encode_documents(read_text(path), tokenizer, eos)
            length = int(own) if own else args.eval_length
            count = min(len(ids), (args.eval_sequences or len(ids)) * args.eval_length) // length
            self.texts[f"{name} ({length})"] = pack(ids, sequences=count, length=length, what=path)

    def timed(self, what: str, call: Any) -> Any:
        start = time.perf_counter()
        out = call()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[what] = round(time.perf_counter() - start, 2)
        print(f"{what}: {self.seconds[what]} s", flush=True)
        return out

    def fresh(self) -> Student:
        student = make_student(self.capture, self.scan, self.plan)
        move_to(student.gm, self.device)
        return student

    def groups(self, student: Student) -> list[SiteGroup]:
        """Taps with this student's programs; the teacher runs over the text once for all students."""
        if not self.taps:
            self.taps = self.timed(
                "teacher over the calibration text",
                lambda: collect_taps(
                    student,
                    self.capture.gm,
                    torch.cat([self.ids[: self.kept], self.ids[self.args.sequences :]]),
                    batch=self.args.batch,
                    dtype=tap_dtype(self.device),
                ),
            )
        ends = [(g, g.sites[0]) for g in self.taps]
        return [replace(g, program=cut_program(student.gm, inputs_from=[s.x], outputs=[s.y])) for g, s in ends]

    def initialised(self, init: InitName) -> tuple[Student, list[SiteGroup]]:
        student, a = self.fresh(), self.args
        groups = self.groups(student)
        train = [replace(g, x=g.x[:, : self.kept], y=g.y[:, : self.kept]) for g in groups]
        student, _ = self.timed(
            f"init {init}", lambda: initialise(student, train, init=init, seed=a.seed, batch=a.batch)
        )
        return student, groups

    def aligned(self, plan: Schedule, lr_teacher: float | None) -> tuple[Student, float]:
        """A student after alignment and its error on the held-out calibration sequences, NaN without a step."""
        if plan.init not in self.starts:
            student, groups = self.initialised(plan.init)
            values = {n: p.detach().clone() for n, p in student.gm.named_parameters()}
            self.starts[plan.init] = student, groups, values
        student, groups, values = self.starts[plan.init]
        key, steps = (plan.init, plan.align, lr_teacher), plan.align
        set_weights(student, self.found[key][0] if key in self.found else values)
        if key in self.found:
            return student, self.found[key][1]
        if not steps:
            return student, math.nan
        given = {"lr_new": self.args.lr_new, "lr_teacher": lr_teacher, "weight_decay": self.args.weight_decay}
        given["noise"] = self.args.noise
        config = AlignConfig(steps=steps, batch=self.args.batch, **{k: v for k, v in given.items() if v is not None})
        live = LivePairs(student, groups, self.ids[: self.args.sequences]) if self.args.init_sequences else None
        student, curve = self.timed(
            f"align from {plan.init} {steps} steps, lr {config.lr_new:g} and {config.lr_teacher:g}",
            lambda: align(student, groups, train=self.kept, config=config, seed=self.args.seed, live=live),
        )
        means = [[sum(p[k].values()) / len(p[k]) for k in ("train", "held_out")] for p in curve]
        print("  error on trained, held-out: " + ", ".join(f"{t:.4f} {h:.4f}" for t, h in means), flush=True)
        best = min(h for _, h in means)
        self.found[key] = {n: p.detach().clone() for n, p in student.gm.named_parameters()}, best
        return student, best

    def distilled(self, student: Student, plan: Schedule) -> Student:
        """The student after distillation on the sequences that it was aligned on; every prediction counts."""
        steps = plan.distill
        rates = {"lr_gdn": self.args.distill_lr_gdn, "lr_other": self.args.distill_lr_other}
        config = DistillConfig(
            steps=steps,
            batch=self.args.distill_batch or self.args.batch,
            score_every=max(1, steps // 4),
            teacher_dtype=self.args.distill_dtype,
            student_dtype=self.args.distill_dtype,
            compile=self.args.distill_compile,
            **{k: v for k, v in rates.items() if v is not None},
        )
        counts = torch.ones(len(self.ids), self.args.length - 1, dtype=torch.bool)
        student, curve = self.timed(
            f"distil {plan.name}",
            lambda: distill(student, self.ids, counts, train=self.args.sequences, config=config, seed=self.args.seed),
        )
        print("  held-out KL: " + ", ".join(f"{p['kl']:.4f}" for p in curve), flush=True)
        return student

    @torch.no_grad()
    def score(self, students: dict[str, Student]) -> dict[str, dict[str, Any]]:
        """All students on all texts; the teacher's logits are computed once."""
        out: dict[str, dict[str, Any]] = {n: {} for n in students}
        for text, ids in self.texts.items():
            batch = max(1, 8192 // ids.shape[1]) if self.device.type == "cuda" else 1
            results = evaluate(
                ids.to(self.device),
                teacher=lambda part: self.capture.gm(*self.capture.inputs(part)),
                students={n: s.logits for n, s in students.items()},
                batch=batch,
            )
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


def set_weights(student: Student, values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for n, v in values.items():
            student.gm.get_parameter(n).copy_(v)


def tap_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def main() -> None:
    args = arguments()
    bench = Bench(args)
    students = {init: bench.initialised(init)[0] for init in args.init}
    rates: list[float | None] = args.lr_teacher or [None]
    for i, plan in enumerate(args.steps):
        if i == 0 and len(rates) > 1:
            rates = [min(rates, key=lambda rate: bench.aligned(args.steps[0], rate)[1])]
        student, _ = bench.aligned(plan, rates[0])
        student = bench.distilled(student, plan) if plan.distill else student
        students[plan.name] = replace(student, gm=copy.deepcopy(student.gm))
    scores = bench.timed("evaluation", lambda: bench.score(students))
    if args.json:
        given = {k: Path(v).name if k in ("calib", "teacher") else v for k, v in vars(args).items() if k != "json"}
        given["eval"] = [f"{e.split('=')[0]}={Path(e.split('=')[1]).name}" for e in args.eval]
        given["steps"] = [plan.spelled for plan in args.steps]
        given["lr_teacher_used"] = rates[0]
        body = {
            "arguments": given,
            "environment": environment(bench.device),
            "seconds": bench.seconds,
            "scores": scores,
        }
        args.json.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
