"""How well the KL of a set of kept sites after few steps of alignment tells its KL after many.

    python examples/rank_sets.py embedded --sizes 1,2,3 --steps 0,25,50,200 --out work --json docs/results/sets.json

All sites are aligned together for each number of steps, and every set of so many kept sites is measured on the held-out
calibration sequences. What was measured lies in --out, and a second call does not repeat it.
"""

from __future__ import annotations

import argparse
import json
import platform
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from tcal_compiler.api import CALIBRATION_TEXT
from tcal_compiler.progress import Progress
from tcal_compiler.runtime import data
from tcal_compiler.runtime.config import AlignConfig
from tcal_compiler.runtime.score_sites import initial_student
from tcal_compiler.runtime.select_sites import SetScores, aligned_student
from tcal_compiler.runtime.student import Student
from tcal_compiler.source import open_source


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("teacher")
    p.add_argument("--calib", type=Path, default=CALIBRATION_TEXT)
    p.add_argument("--sizes", type=numbers, default=[1, 2], help="how many sites are kept")
    p.add_argument("--steps", type=numbers, default=[0, 25, 50, 200], help="of alignment; the last one is what counts")
    p.add_argument("--sequences", type=int, default=64)
    p.add_argument("--holdout", type=int, default=8)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--json", type=Path)
    return p.parse_args()


def measured(args: argparse.Namespace) -> dict[int, dict[tuple[int, ...], float]]:
    """The KL of every set, by steps of alignment."""
    source, progress, found = open_source(args.teacher), Progress(), {}
    assert source.tokenizer is not None
    args.out.mkdir(parents=True, exist_ok=True)
    rows, _ = data.encode_rows(
        data.read_text(args.calib), source.tokenizer, source.tokenizer.eos_token_id, length=args.length
    )
    train, held = rows[: args.sequences], rows[args.sequences : args.sequences + args.holdout]
    given: dict[str, Any] = {"seed": args.seed, "batch": 8, "progress": progress.bar}

    def student(steps: int) -> Student:
        cache = args.out / "initial.safetensors"
        initial = initial_student(source.capture, source.scan, train, init="closed-form", cache=cache, **given)
        config, cache = AlignConfig(steps=steps), args.out / f"aligned-{steps}.safetensors"
        return aligned_student(initial, train, held, kept=len(train), config=config, cache=cache, **given)

    for steps in args.steps:
        make = lambda steps=steps: student(steps)  # noqa: E731
        cache = args.out / f"sets-{steps}.json"
        scores = SetScores(source.capture, source.scan, held, initial=make, batch=8, cache=cache)
        sets = [keep for n in args.sizes for keep in combinations([s.index for s in source.scan.sites], n)]
        bar = progress.bar(f"sets after {steps} steps")
        found[steps] = {keep: scores.kl(keep) for i, keep in enumerate(sets, 1) if bar(i, len(sets)) is None}
    return found


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's, without ties."""
    ranks = [torch.tensor(x).argsort().argsort().double() for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def main() -> None:
    args = arguments()
    found, rows = measured(args), []
    *few, last = args.steps
    for size in args.sizes:
        sets = [keep for keep in found[last] if len(keep) == size]
        best = min(sets, key=found[last].__getitem__)
        for steps in few:
            chosen = min(sets, key=found[steps].__getitem__)
            row = {"kept": size, "sets": len(sets), "steps": steps, "chosen": list(chosen)}
            row["rank_correlation"] = rank_correlation(*([found[n][s] for s in sets] for n in (steps, last)))
            row |= {"chosen_kl": found[last][chosen], "best": list(best), "best_kl": found[last][best]}
            rows.append(row)
            print(row)
    if args.json:
        given = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("json", "out")}
        environment = {"machine": platform.machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}
        body = {"set_ranks": rows, "arguments": given, "environment": environment}
        args.json.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
