"""Stops training at random steps: `python tests/fuzz/stops.py --tries 12 --seed 0`.

A try is one run folder, made by tcal align and tcal distill --no-export. Each command is stopped at up to three random
steps of its training, wherever its last checkpoint was: by SIGKILL, SIGTERM or SIGINT in turn, or by an exception. Each
time the same command is given again. Then weights, loss curves and all other files have the bytes of the run that was
never stopped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import crash
import small_run

NAMES = "align,distill-only"
STEPS = 60  # of either, as small_run says
WAYS = ("SIGKILL", "SIGTERM", "SIGINT", "exception")


def stop_at(step: int, way: str) -> None:
    """Makes this process stop itself when it draws the sequences of a step."""
    from tcal_compiler.runtime import align, distill, training

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

    def drawn(now: int, **options: Any) -> Any:
        if now == step and way == "exception":
            raise MemoryError("a stop")
        if now == step:
            os.kill(os.getpid(), getattr(signal, way))
        return training.batch_indices(now, **options)

    real: Callable[..., Any] = drawn
    align.batch_indices = distill.batch_indices = real  # type: ignore[assignment]


def stops(work: Path, *, tries: int, seed: int) -> tuple[Counter[str], int, list[str]]:
    """How often each command was stopped in which way, how often one went on from a checkpoint, and faults."""
    small_run.prepare(work)
    steps, rng = crash.undisturbed(work, NAMES), Random(seed)
    hits, faults, resumed = Counter[str](), list[str](), 0
    for number in range(tries):
        out, log = work / f"run{number}", work / f"run{number}.log"
        for step, words in zip(steps, small_run.commands(work, out, NAMES).values(), strict=True):
            for at in sorted(rng.sample(range(STEPS), rng.randint(1, 3))):
                way = WAYS[sum(hits.values()) % len(WAYS)]
                _, status = os.waitpid(small_run.start(words, log, partial(stop_at, at, way)), 0)
                hits[f"{step.name}, {way}"] += 1
                if status == 0:
                    faults.append(f"run {number}: {step.name} was not stopped at step {at} by {way}")
            if said := small_run.finish(words, work / "end.log"):
                faults.append(f"run {number}: {said}")
            resumed += sum(f.read_text().count(" goes on from step ") for f in (log, work / "end.log"))
            log.unlink()
            if wrong := small_run.difference(small_run.made(out), step.made):
                faults.append(f"run {number}: {step.name}: not as without stops: {wrong}")
        shutil.rmtree(out)
    return hits, resumed, faults


def main() -> None:
    """Prints how often training was stopped and every fault; exit 1 when there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="JSON file of the figures of all seeds")
    args = parser.parse_args()
    sys.path.insert(0, str(small_run.ROOT))
    with tempfile.TemporaryDirectory(prefix="stops-") as work:
        hits, resumed, faults = stops(Path(work), tries=args.tries, seed=args.seed)
    print(
        f"{sum(hits.values())} stops: {dict(sorted(hits.items()))}; {resumed} times training went on from a checkpoint"
    )
    print("\n".join([f"{len(faults)} faults", *faults]))
    if args.record:
        figures = {"stops": dict(sorted(hits.items())), "resumed": resumed, "faults": faults}
        small_run.record(args.record, "stops", f"seed {args.seed}", figures)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
