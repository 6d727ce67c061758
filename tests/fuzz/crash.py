"""Kills a small conversion at random moments of every stage: `python tests/fuzz/crash.py --rounds 1 --seed 0`.

A round is one run folder and five commands on it: tcal-compile, tcal distill, tcal export --dtype fp16, tcal eval.
Each command's process gets SIGKILL once before its first stage and once in each stage that it makes, at a random moment
of it; each time the same command is given again. Then the folder has to be what it is without kills: the same bytes in
every file, no other file, and no stage that was complete made again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import small_run

ALL = "compile,distill,fp16,eval"
START, BETWEEN = "start", "between stages"


@dataclass
class Story:
    """What happened. kills: by the stage that ran, or "start". late: moments at which the command had ended."""

    kills: Counter[str] = field(default_factory=Counter)
    late: int = 0
    resumed: int = 0
    faults: list[str] = field(default_factory=list)


def undisturbed(work: Path, names: str) -> list[small_run.Step]:
    """Runs the commands once, in the folder work/reference."""
    steps, before = [], small_run.records(work / "reference")
    for name, words in small_run.commands(work, work / "reference", names).items():
        started = time.monotonic()
        if said := small_run.finish(words, work / "reference.log"):
            raise RuntimeError(said)
        whole, now = time.monotonic() - started, small_run.records(work / "reference")
        stages = sorted((s for s, r in now.items() if before.get(s) != r), key=lambda s: s == "report")
        seconds = {s: now[s]["seconds"] for s in stages}
        step = small_run.Step(
            name, {START: max(0.1, whole - sum(seconds.values()))} | seconds, small_run.made(work / "reference")
        )
        steps.append(step)
        before = now
    return steps


def _kill_once(words: small_run.Words, out: Path, stage: str, delay: float) -> int:
    """Kills the command `delay` seconds after it began, or began the stage; its process id, 0 when it ended before."""
    pid = small_run.start(words, out.with_suffix(".log"))
    since = time.monotonic() if stage == START else None
    while since is None or time.monotonic() - since < delay:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return 0
        if since is None and (out / f".tmp-{stage}-{pid}").exists():
            since = time.monotonic()
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    return pid if os.WIFSIGNALED(os.waitpid(pid, 0)[1]) else 0


def _where(out: Path, pid: int, step: small_run.Step, before: dict[str, Any]) -> str:
    """What a killed process was doing."""
    running = [s for s in step.seconds if (out / f".tmp-{s}-{pid}").exists()]
    begun = any(before.get(s) != r for s, r in small_run.records(out).items())
    return running[0] if running else BETWEEN if begun else START


def disturb(words: small_run.Words, out: Path, step: small_run.Step, rng: Random, story: Story) -> None:
    """One command: a kill in each of its parts, each time given again; then its end."""
    before = small_run.records(out)
    known, log = before, out.with_suffix(".log")
    for part, seconds in [*step.seconds.items(), ("", 0.0)]:
        log.unlink(missing_ok=True)
        if part:
            pid = _kill_once(words, out, part, rng.uniform(0, seconds))
            story.late += not pid
            if pid:
                story.kills[_where(out, pid, step, before)] += 1
        elif said := small_run.finish(words, log):
            story.faults.append(f"{out.name}: {said}")
        story.resumed += log.exists() and " goes on from step " in log.read_text()
        now = small_run.records(out)
        for stage, then in known.items():
            complete = stage not in step.seconds or before.get(stage) != then
            if complete and now.get(stage) != then:
                story.faults.append(f"{out.name}: {step.name}: stage {stage} was made again")
        known = now
    if wrong := small_run.difference(small_run.made(out), step.made):
        story.faults.append(f"{out.name}: {step.name}: not as without kills: {wrong}")


def crash(work: Path, *, rounds: int, seed: int, names: str = ALL) -> Story:
    """Runs the commands once without a kill, then `rounds` times with kills, below the folder work."""
    small_run.prepare(work)
    story, steps = Story(), undisturbed(work, names)
    for number in range(rounds):
        out, rng = work / f"run{number}", Random(seed * 1000 + number)
        for words, step in zip(small_run.commands(work, out, names).values(), steps, strict=True):
            disturb(words, out, step, rng, story)
        shutil.rmtree(out)
    return story


def main() -> None:
    """Prints how many moments hit which stage, and every fault; exit 1 when there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="JSON file of the figures of all seeds")
    args = parser.parse_args()
    sys.path.insert(0, str(small_run.ROOT))
    with tempfile.TemporaryDirectory(prefix="crash-") as work:
        story = crash(Path(work), rounds=args.rounds, seed=args.seed)
    kills, said = sum(story.kills.values()), dict(sorted(story.kills.items()))
    print(f"{kills} kills in {args.rounds} run folders: {said}")
    print(f"{story.late} moments too late, {story.resumed} times a training went on from a checkpoint")
    print("\n".join([f"{len(story.faults)} faults", *story.faults]))
    if args.record:
        figures = {"rounds": args.rounds, "kills": said, "late": story.late, "resumed": story.resumed}
        small_run.record(args.record, "kills", f"seed {args.seed}", figures | {"faults": story.faults})
    sys.exit(bool(story.faults))


if __name__ == "__main__":
    main()
