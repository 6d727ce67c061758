"""Measures a conversion: naive, initialised, aligned and distilled students against their teacher.

    python examples/measure_conversion.py TEACHER --policy keep=0,4,8 --calib calib.jsonl --eval heldout=heldout.jsonl \
        --sequences 384 --steps 300 --steps 1000 --json out.json

Perplexity and KL on every --eval text, cut into consecutive sequences; with --needle, --recall and --tasks also
retrieval and zero-shot tasks. Every student of one call shares the teacher, the calibration sequences and what is
scored; what was calibrated on is refused. Several --policy and --seeds give every schedule for each of them. None has
attention over the last tokens beside its states (local_window = 0): the naive and published recipes know none.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from conversion_bench import Arms, Bench
from conversion_schedule import RECIPES, Schedule, Start, Trial, with_ablations

from tcal_compiler.runtime.config import check_parts
from tcal_compiler.runtime.student import Student, without_linear


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--policy", action="append", default=[], help="default uniform:25%%; repeat")
    text_arguments(p)
    p.add_argument(
        "--score-align-steps", type=int, default=200, help="of every site, before kl and forward measure sets of sites"
    )
    p.add_argument(
        "--score-distill-steps",
        type=Trial.list_of,
        default=[],
        help="of each candidate set of kl; of several, as in 20,40/20 (40, of which 20 are warm-up), the first decides",
    )
    p.add_argument(
        "--init", type=Start.of, action="append", default=[], help="inits to score without a gradient step; repeat"
    )
    p.add_argument(
        "--steps",
        type=Schedule.of,
        action="append",
        default=[],
        metavar="[INIT:]A[+D]",
        help="A alignment steps from INIT (closed-form), then D steps of distillation on the same sequences; INIT may "
        "be published or mended, whose A steps are those of published_recipe.py (there 300); repeat",
    )
    p.add_argument(
        "--without",
        type=lambda text: tuple(text.split(",")),
        action="append",
        default=[],
        metavar="PART[,PART]",
        help="every --init and --steps that has these parts of init_without also without them; repeat",
    )
    p.add_argument("--seeds", type=numbers, default=[0], help="as in 0,1,2: every student once for each")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--json", type=Path)
    training_arguments(p)
    scoring_arguments(p)
    args = p.parse_args()
    for parts in args.without:
        check_parts("closed-form", parts)
    args.init, args.steps = (with_ablations(arms, args.without) for arms in (args.init, args.steps))
    return args


def text_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("teacher")
    p.add_argument("--tokenizer", help='folder with tokenizer files, or "bytes"; default: the teacher\'s own')
    p.add_argument("--calib", required=True, help="calibration text")
    p.add_argument("--sequences", type=int, default=64)
    p.add_argument("--init-sequences", type=int, help="those of them that the initialisation uses; default: all")
    p.add_argument("--holdout", type=int, default=8, help="further calibration sequences that choose the weights")
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--repeats", type=float, default=0.0, help="as calib.repeats of tcal-compile")


def training_arguments(p: argparse.ArgumentParser) -> None:
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
    p.add_argument("--weight-decay", type=float, help="of the teacher's projections; default as in tcal-compile")
    p.add_argument("--noise", type=float, help="on the sites' inputs; default as in tcal-compile")
    p.add_argument("--distill-batch", type=int, help="sequences in a step of distillation; default: --batch")
    p.add_argument("--distill-lr-gdn", type=float, help="default as in tcal-compile")
    p.add_argument("--distill-lr-other", type=float, help="default as in tcal-compile")
    p.add_argument("--distill-dtype", choices=["captured", "bfloat16"], default="captured", help="of products")
    p.add_argument("--distill-compile", action="store_true", help="distill.compile = true")
    p.add_argument("--distill-recompute", action="store_true", help="distill.checkpoint_activations = true")


def scoring_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--eval", action="append", default=[], metavar="NAME=FILE[:LENGTH]", help="text; repeat")
    p.add_argument("--eval-length", type=int, default=2048)
    p.add_argument("--eval-sequences", type=int, help="at most so many sequences of each text")
    p.add_argument("--needle", type=numbers, default=[], help="as in 1024,2048: find one fact in so many tokens")
    p.add_argument("--recall", type=numbers, default=[], help="find one of eight facts in so many tokens")
    p.add_argument("--filler", type=Path, help="text of these; default: the first --eval")
    p.add_argument("--tasks", type=lambda text: text.split(","), default=[], help="as in arc_easy,piqa")
    p.add_argument("--task-files", type=Path, help="folder with their files")
    p.add_argument("--limit", type=int, help="examples of a task at most; default all, 100 of needle and recall")
    p.add_argument("--without-linear", action="store_true", help="each student also with its converted sites giving 0")


def environment(device: torch.device) -> dict[str, Any]:
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    commit = os.environ.get("TCAL_COMMIT", head)  # set it for a copy of the tree without its history
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    return {"device": name, "torch": torch.__version__, "python": platform.python_version(), "commit": commit}


def without_folders(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as they are written: names of files without their folders."""
    given = {
        k: Path(v).name if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("json", "task_files")
    }
    given |= {k: Path(given[k]).name for k in ("calib", "teacher", "tokenizer") if given[k]}
    return given | {"eval": [f"{e.split('=')[0]}={Path(e.split('=')[1]).name}" for e in args.eval]}


def measured_with(bench: Bench, given: dict[str, Any], kept: dict[str, list[int]]) -> dict[str, Any]:
    """What stands beside measurements."""
    return {"arguments": given, "kept": kept, "environment": environment(bench.device), "seconds": bench.seconds}


def students_of(arms: Arms, args: argparse.Namespace) -> tuple[dict[str, Student], float | None, dict[str, float]]:
    """Every student that was asked for, by its name; the rate that was used; seconds until each one was aligned."""
    seconds = {}
    found = {start.name: arms.initialised(start)[0] for start in args.init}
    rates: list[float | None] = args.lr_teacher or [None]
    for i, schedule in enumerate(args.steps):
        if i == 0 and len(rates) > 1:
            rates = [min(rates, key=lambda rate: arms.aligned(args.steps[0], rate)[1])]
        student, _ = arms.aligned(schedule, rates[0])
        if schedule.align and schedule.init not in RECIPES:
            seconds[schedule.name] = arms.seconds_to_aligned(schedule, rates[0])
        student = arms.distilled(student, schedule) if schedule.distill else student
        found[schedule.name] = replace(student, gm=copy.deepcopy(student.gm))
    if args.without_linear:
        found |= {f"{n}, no linear": without_linear(s) for n, s in found.items()}
    return found, rates[0], seconds


def main() -> None:
    args = arguments()
    args.policy = args.policy or ["uniform:25%"]
    bench, scores, tasks, kept, rate, seconds = Bench(args), {}, {}, {}, None, {}

    def write() -> None:
        if args.json:
            args.json.write_text(json.dumps(result(bench, scores, tasks, kept, rate, seconds), indent=1) + "\n")

    bench.on_candidate = write
    for policy in args.policy:
        plan = bench.plan(policy)
        kept[policy] = list(plan.keep)
        for seed in args.seeds:
            students, rate, took = students_of(Arms(bench, plan, seed), args)
            before = f"{policy}, " if len(args.policy) > 1 else ""
            behind = f", seed {seed}" if len(args.seeds) > 1 else ""
            students = {f"{before}{n}{behind}": s for n, s in students.items()}
            seconds |= {f"{before}{n}{behind}": s for n, s in took.items()}
            scores |= bench.timed("evaluation", lambda s=students: bench.score(s))
            tasks |= bench.timed("task evaluation", lambda s=students: bench.score_tasks(s))
            write()


def result(
    bench: Bench, scores: Any, tasks: Any, kept: dict[str, list[int]], rate: float | None, aligned: dict[str, float]
) -> dict[str, Any]:
    """What is written. aligned: seconds from loaded teacher to student."""
    args = bench.args
    given = without_folders(args)
    given["steps"] = [s.spelled for s in args.steps if not s.start.without]
    given["init"] = [s.name for s in args.init if not s.without]
    given["score_distill_steps"] = [t.name for t in args.score_distill_steps]
    given["lr_teacher_used"] = rate
    body = measured_with(bench, given, kept)
    body |= {"seconds_to_aligned": aligned} if aligned else {}
    body |= {"candidates": bench.candidates} if bench.candidates else {}
    return body | {"scores": scores} | ({"tasks": tasks} if tasks else {})


if __name__ == "__main__":
    main()
