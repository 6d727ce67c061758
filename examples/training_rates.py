"""Measures the rates of alignment and of distillation, each student from the same start.

    python examples/training_rates.py TEACHER --policy keep=0,4,8 --calib calib.jsonl --sequences 2400 \
        --local-window 64 --near-errors 0,0.3,1,3 --steps 300 \
        --distill-rates 1e-3/1e-4,3e-4/1e-4 --distill-steps 61 --distill-batch 32 \
        --eval heldout=heldout.jsonl --json out.json

--near-errors: values of align.near_error. The aligned student with the least KL on the held-out calibration sequences
is then distilled with each of --distill-rates, lr_gdn/lr_other. Nothing is chosen on what is scored.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from conversion_bench import Arms, Bench, set_weights, weights_of
from conversion_schedule import Start, align_config, distill_config
from measure_conversion import (
    measured_with,
    scoring_arguments,
    text_arguments,
    training_arguments,
    without_folders,
)
from pydantic import ValidationError
from torch import Tensor

from tcal_compiler.errors import TcalError
from tcal_compiler.passes.local_windows import with_local_windows
from tcal_compiler.runtime.align import align
from tcal_compiler.runtime.config import AlignConfig, CalibConfig, DistillConfig
from tcal_compiler.runtime.distill import distill
from tcal_compiler.runtime.durable import write_atomic
from tcal_compiler.runtime.evaluate import evaluate
from tcal_compiler.runtime.student import Student
from tcal_compiler.runtime.taps import LivePairs, SiteGroup


def rates(text: str) -> list[tuple[float, float]]:
    """ "1e-3/1e-4,3e-4/1e-4": pairs of lr_gdn and lr_other."""
    try:
        return [(float(gdn), float(other)) for gdn, other in (part.split("/") for part in text.split(","))]
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form lr_gdn/lr_other,...") from e


def numbers(text: str) -> list[float]:
    try:
        return [float(v) for v in text.split(",")]
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers, as in 0,0.3,1") from e


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--policy", default="uniform:25%")
    p.add_argument("--local-window", type=int, default=64, help="as local_window of tcal-compile")
    text_arguments(p)
    p.add_argument("--near-errors", type=numbers, default=[1.0])
    p.add_argument("--steps", type=int, default=300, help="of alignment")
    p.add_argument("--distill-rates", type=rates, default=[], metavar="GDN/OTHER,...")
    p.add_argument("--distill-steps", type=int, default=61)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--json", type=Path)
    training_arguments(p)
    scoring_arguments(p)
    args = p.parse_args()
    if what := wrong(args):
        p.error(what)
    return args


def alignment(a: argparse.Namespace, near_error: float) -> AlignConfig:
    """Raises ValidationError for a value out of range."""
    config = align_config(a, a.steps, (a.lr_teacher or [None])[0])
    return AlignConfig.model_validate(config.model_dump() | {"near_error": near_error})


def distillation(a: argparse.Namespace, lr_gdn: float, lr_other: float) -> DistillConfig:
    """Raises ValidationError for a value out of range."""
    config = distill_config(a, a.distill_steps)
    return DistillConfig.model_validate(config.model_dump() | {"lr_gdn": lr_gdn, "lr_other": lr_other})


def wrong(a: argparse.Namespace) -> str:
    """What can be told of the arguments before a teacher is loaded; "" when nothing is."""
    names = "sequences", "init_sequences", "holdout", "length", "repeats", "batch"
    try:
        CalibConfig(**{n: getattr(a, n) for n in names})
        _ = [alignment(a, near) for near in a.near_errors], [distillation(a, *pair) for pair in a.distill_rates]
    except ValidationError as e:
        first = e.errors()[0]
        return f"{'.'.join(map(str, first['loc']))} {first['input']!r}: {first['msg']}"
    if a.steps < 1 or (a.distill_rates and a.distill_steps < 1):
        return f"--steps {a.steps} and --distill-steps {a.distill_steps}: at least one of each, or nothing is trained"
    for text in a.eval:
        name, _, place = text.partition("=")
        file, colon, length = place.partition(":")
        if not (name and file) or (colon and not length.isdecimal()):
            return f"--eval {text!r} is not of the form NAME=FILE[:LENGTH]"
        if not Path(file).is_file():
            return f"--eval {text}: no such file"
    if not Path(a.calib).is_file():
        return f"--calib {a.calib}: no such file"
    if a.json and (a.json.is_dir() or not a.json.parent.is_dir()):
        return f"--json {a.json}: is a folder, or its folder is not there"
    return ""


class RateBench(Bench):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.scan = with_local_windows(self.scan, args.local_window)

    def held_out(self, student: Student) -> float:
        """KL from the teacher on the held-out calibration sequences, nats per token."""
        ids = self.ids[self.args.sequences :].to(self.device)
        return evaluate(ids, teacher=self.teacher, students={"student": student.logits})["student"].kl


class Rates:
    """Students from one start, one after another in the same memory."""

    def __init__(self, bench: RateBench) -> None:
        self.bench, self.args = bench, bench.args
        self.arms = Arms(bench, bench.plan(self.args.policy), self.args.seed)
        self.student, self.groups = self.arms.initialised(Start("closed-form"))
        self.initial = weights_of(self.student)

    def row(self, name: str, extra: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Its line of what was trained, and its scores."""
        kl = self.bench.held_out(self.student)
        print(f"{name}: KL {kl:.4f} on held-out calibration sequences", flush=True)
        return {"kl": kl} | extra, self.bench.score({name: self.student})

    def aligned(self, near_error: float) -> dict[str, Any]:
        """Means of the sites' held-out errors, by step."""
        a, bench = self.args, self.bench
        set_weights(self.student, self.initial)
        config = alignment(a, near_error)
        groups: list[SiteGroup] = self.groups
        live = LivePairs(self.student, groups, bench.ids[: a.sequences]) if a.init_sequences else None
        name = f"align, near_error {near_error:g}"
        given = {"train": bench.kept, "config": config, "seed": a.seed, "live": live}
        _, curve = bench.timed(name, lambda: align(self.student, groups, **given))
        means = {p["step"]: sum(p["held_out"].values()) / len(p["held_out"]) for p in curve}
        print("  held-out error: " + ", ".join(f"{s}: {v:.4f}" for s, v in means.items()), flush=True)
        kept = [min(p["held_out"][i] for p in curve) for i in curve[0]["held_out"]]
        return {"errors": means, "error": sum(kept) / len(kept), "seconds": round(bench.took, 2)}

    def distilled(self, lr_gdn: float, lr_other: float) -> dict[str, Any]:
        a, bench = self.args, self.bench
        config = distillation(a, lr_gdn, lr_other)
        given = {"train": a.sequences, "config": config, "seed": a.seed}
        name = f"distil, rates {lr_gdn:g} and {lr_other:g}"
        _, curve = bench.timed(name, lambda: distill(self.student, bench.ids, bench.counts, **given))
        return {"curve": {p["step"]: p["kl"] for p in curve}, "seconds": round(bench.took, 2)}


def main() -> None:
    args = arguments()
    bench = RateBench(args)
    trained = Rates(bench)
    body: dict[str, Any] = {"alignment": {}, "distillation": {}, "scores": {}}

    def add(stage: str, name: str, key: str, extra: dict[str, Any]) -> None:
        body[stage][key], scores = trained.row(name, extra)
        body["scores"] |= scores
        if args.json:
            kept = {args.policy: list(trained.arms.plan.keep)}
            text = json.dumps(measured_with(bench, without_folders(args), kept) | body, indent=1) + "\n"
            write_atomic(args.json, text.encode())

    add("alignment", "start", "start", {})
    best: tuple[float, dict[str, Tensor]] = float("inf"), {}
    for near in args.near_errors:
        add("alignment", f"aligned, near_error {near:g}", f"{near:g}", trained.aligned(near))
        kl = body["alignment"][f"{near:g}"]["kl"]
        best = (kl, weights_of(trained.student)) if kl < best[0] else best
    for pair in args.distill_rates:
        set_weights(trained.student, best[1])
        name = "{:g}/{:g}".format(*pair)
        add("distillation", f"distilled, rates {name}", name, trained.distilled(*pair))


if __name__ == "__main__":
    try:
        main()
    except TcalError as e:
        sys.exit(f"{type(e).__name__}: {e}")
