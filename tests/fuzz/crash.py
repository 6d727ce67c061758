"""Kills a small conversion at random moments of every stage: `python tests/fuzz/crash.py --rounds 12`.

A round is one run folder. Its process gets SIGKILL once while the teacher loads and once in each stage, at a random
moment of it; each time the same command goes on. Then the run has to be the one that was never killed: the same bytes
in every file, no other file, and no complete stage run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
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

ROOT = Path(__file__).parents[2]
OPTIONS = {
    "policy": "keep=0",
    "calib": {"sequences": 4, "length": 32, "holdout": 2, "batch": 2},
    "align": {"steps": 60, "batch": 2, "checkpoint_every": 5, "score_every": 10},
}


@dataclass
class Story:
    """What happened. kills: by the stage that was running. late: moments at which everything was already done."""

    kills: Counter[str] = field(default_factory=Counter)
    late: int = 0
    resumed: int = 0
    faults: list[str] = field(default_factory=list)


def _start(teacher: Path, out: Path, until: str) -> int:
    """The process id of a child that converts."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        from tcal_compiler import Config, convert
        from tcal_compiler.progress import Progress

        os.dup2(os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        config = Config.model_validate(OPTIONS)
        convert(str(teacher), out=out, config=config, tokenizer="bytes", until=until, progress=Progress(quiet=False))
        code = 0
    finally:
        os._exit(code)


def records(out: Path) -> dict[str, Any]:
    """The manifest's stages; none where there is no manifest yet."""
    file = out / "tcal.json"
    return json.loads(file.read_text())["stages"] if file.exists() else {}


def made(out: Path) -> dict[str, str]:
    """sha256 of every file of the run folder but the manifest, the lock and the report, which tell times."""
    files = [
        p for p in out.rglob("*") if p.is_file() and p.name not in ("tcal.json", ".lock", "report.md", "report.html")
    ]
    return {p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def finish(teacher: Path, out: Path, until: str) -> str:
    """Converts without a kill; what the child said when it failed."""
    _, status = os.waitpid(_start(teacher, out, until), 0)
    return out.with_suffix(".log").read_text()[-2000:] if status else ""


def _kill_once(teacher: Path, out: Path, until: str, after: str | None, delay: float) -> bool:
    """Kills the child `delay` seconds after the stage `after` is complete; False when the child ended before."""
    pid = _start(teacher, out, until)
    since = time.monotonic() if after is None or after in records(out) else None
    while since is None or time.monotonic() - since < delay:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        if since is None and after in records(out):
            since = time.monotonic()
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def one_round(
    teacher: Path,
    out: Path,
    until: str,
    rng: Random,
    *,
    reference: dict[str, str],
    seconds: dict[str, float],
    story: Story,
) -> None:
    """One run folder: a kill in each part of `seconds`, then the end."""
    known: dict[str, Any] = {}
    before: str | None = None
    for part, longest in seconds.items():
        delay = rng.uniform(0, longest)
        if before in known:  # the teacher has to load again
            delay += seconds["start"]
        killed = _kill_once(teacher, out, until, before, delay)
        now = records(out)
        story.kills[next((s for s in seconds if s != "start" and s not in now), "done") if now else "start"] += killed
        story.late += not killed
        story.resumed += any((out / ".scratch").rglob("align.safetensors"))
        story.faults += [f"{out.name}: stage {s} was run again" for s, r in known.items() if now.get(s) != r]
        known, before = now, part if part != "start" else None
    said = finish(teacher, out, until)
    now, files = records(out), made(out)
    story.faults += [f"{out.name}: {said}"] if said else []
    story.faults += [f"{out.name}: stage {s} was run again" for s, r in known.items() if now.get(s) != r]
    wrong = sorted(n for n in reference.keys() | files.keys() if reference.get(n) != files.get(n))
    story.faults += [f"{out.name}: other files than without kills: {wrong}"] if wrong else []


def crash(work: Path, *, rounds: int, seed: int, until: str) -> Story:
    """Converts once without a kill, then `rounds` times with kills, below the folder work."""
    from tiny_models import TinyModel, program_of

    from tcal_compiler.runtime.program_file import save_program

    teacher, story = work / "teacher.pt2", Story()
    save_program(program_of(TinyModel(layers=2, vocab=256), 256), teacher)
    started = time.monotonic()
    if said := finish(teacher, work / "reference", until):
        raise RuntimeError(said)
    whole = time.monotonic() - started
    took = {name: r["seconds"] for name, r in records(work / "reference").items() if name != "report"}
    seconds = {"start": max(0.1, whole - sum(took.values())), **took}
    for number in range(rounds):
        out = work / f"run{number}"
        rng = Random(seed * 1000 + number)
        one_round(teacher, out, until, rng, reference=made(work / "reference"), seconds=seconds, story=story)
        shutil.rmtree(out)
    return story


def main() -> None:
    """Prints how many moments hit which stage, and every fault; exit 1 when there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="crash-") as work:
        story = crash(Path(work), rounds=args.rounds, seed=args.seed, until="export")
    print(f"{sum(story.kills.values())} kills in {args.rounds} conversions: {dict(story.kills)}")
    print(
        f"{story.late} moments too late, {story.resumed} times with an alignment checkpoint, {len(story.faults)} faults"
    )
    print("\n".join(story.faults))
    sys.exit(bool(story.faults))


if __name__ == "__main__":
    main()
