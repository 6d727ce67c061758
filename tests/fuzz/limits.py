"""Starves a small conversion of disk or memory: `python tests/fuzz/limits.py files --tries 8 --seed 0`.

files: no file may grow beyond a limit (RLIMIT_FSIZE), which any user can set. tmpfs: a file system of that size, for
those who may mount, as with `unshare -rm python tests/fuzz/limits.py tmpfs`. memory: so much more address space than
the process has when the command begins (RLIMIT_AS).

Each try draws a limit and runs tcal-compile and tcal distill --no-export in it, on one run folder. A command may end
well, with a typed error, or, of memory alone, killed by a signal. Whichever it is, stages that are complete have all
their files, nothing half-written lies beside them, and the same command without the limit leaves the folder as it is
without limits.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random

import small_run
from crash import undisturbed

BOTH = "compile,distill-only"
LARGEST = {"files": 4 << 20, "tmpfs": 16 << 20, "memory": 1 << 30}  # bytes; with these, all is well
SMALLEST = {"files": 8 << 10, "tmpfs": 16 << 10, "memory": 1 << 20}
TYPED = re.compile(r"^(\w+Error): ([^:]*): ([^\n]*)\n  Try: ", re.MULTILINE)


@dataclass
class Story:
    """What happened. ends: how commands ended within their limits. faults: what should not have been."""

    ends: Counter[str] = field(default_factory=Counter)
    limits: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@dataclass
class Box:
    """A limit. inside: sets it in the child. around: sets it about the child. may_die: a signal may end the child."""

    inside: Callable[[], None] = lambda: None
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    may_die: bool = False


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def limit_memory(size: int) -> None:
    whole = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + size
    resource.setrlimit(resource.RLIMIT_AS, (whole, whole))


def ended(status: int, said: str) -> tuple[str, str]:
    """How a command ended, in words and as one of "done", "typed", "died" and "fault"."""
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}", "died"
    if os.WEXITSTATUS(status) == 127 and "ABORT" in said:
        return "ended by the C library", "died"
    if status == 0:
        return "done", "done"
    error = TYPED.search(said)
    if os.WEXITSTATUS(status) == 1 and error and "Traceback" not in said and "UNTYPED" not in said:
        kind = next((k for k in ("no space left", "out of memory") if k in error[3]), "another reason")
        where = error[2] if error[2].startswith("stage ") else "outside a stage"
        return f"{error[1]}, {where}: {kind}", "typed"
    return f"exit {os.WEXITSTATUS(status)}", "fault"


def half_written(out: Path, killed: bool) -> list[str]:
    """What lies in a run folder that should not."""
    from tcal_compiler.runtime.run_folder import RunFolder

    if not out.exists():
        return []
    names = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    rest = {
        n for n in names if not n.startswith(".scratch/") and not (killed and n.startswith((".tmp-", ".tcal.json")))
    }
    if "tcal.json" not in names:
        return sorted(rest - {".lock"})
    with RunFolder.open_existing(out) as run:  # finishes a commit that was cut off, as any command does
        owned = {f for r in run.manifest.stages.values() for f in r.files} | {"tcal.json", ".lock"}
        return sorted({*run.verify_files(), *(rest - owned)})


def one_try(work: Path, out: Path, steps: list[small_run.Step], box: Box) -> Story:
    """The commands on one folder: each within the limit, then without it."""
    log, story = work / "log", Story()
    for (name, words), step in zip(
        small_run.commands(work, out, ",".join(s.name for s in steps)).items(), steps, strict=True
    ):
        log.unlink(missing_ok=True)
        with box.around():
            _, status = os.waitpid(small_run.start(words, log, box.inside), 0)
        said = log.read_text() if log.exists() else ""
        how, kind = ended(status, said)
        story.ends[f"{name}: {how}"] += 1
        if kind == "fault" or (kind == "died" and not box.may_die):
            story.faults.append(f"{name}: {how}: {said[-1500:]}")
        if rest := half_written(out, killed=kind == "died"):
            story.faults.append(f"{name}: {how}: half-written: {rest}")
        if kind != "done" and (said := small_run.finish(words, log)):
            story.faults.append(f"without limit: {said}")
        if wrong := small_run.difference(small_run.made(out), step.made):
            story.faults.append(f"{name}: not as without limits: {wrong}")
    return story


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    """A mounted tmpfs with `size` bytes left."""

    def resize(to: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={to}", str(place)], check=True)

    resize(shutil.disk_usage(place).used + size)
    yield
    resize(1 << 28)


def starve(work: Path, kind: str, *, tries: int, seed: int) -> Story:
    """Runs the commands once without a limit, then `tries` times within one, below the folder work."""
    small_run.prepare(work)
    story, steps, rng, place = Story(), undisturbed(work, BOTH), Random(seed), work / "disk"
    low, high = math.log(SMALLEST[kind]), math.log(LARGEST[kind])
    for number in range(tries):
        size = int(math.exp(low + (high - low) * (number + rng.random()) / tries))
        story.limits.append(size)
        place.mkdir()
        if kind == "tmpfs":
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place)], check=True)
        try:
            boxes = {
                "files": Box(inside=partial(limit_files, size)),
                "memory": Box(inside=partial(limit_memory, size), may_die=True),
                "tmpfs": Box(around=partial(small_disk, place, size)),
            }
            found = one_try(work, place / "run", steps, boxes[kind])
            story.ends += found.ends
            story.faults += found.faults
        finally:
            if kind == "tmpfs":
                subprocess.run(["umount", "-l", str(place)], check=True)
            shutil.rmtree(place)
        print(f"{size} bytes: {dict(story.ends)}, {len(story.faults)} faults", flush=True)
    return story


def main() -> None:
    """Prints how commands ended and every fault; exit 1 when there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(LARGEST))
    parser.add_argument("--tries", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="JSON file of the figures of all seeds")
    args = parser.parse_args()
    sys.path.insert(0, str(small_run.ROOT))
    with tempfile.TemporaryDirectory(prefix="limits-") as work:
        story = starve(Path(work), args.kind, tries=args.tries, seed=args.seed)
    print("\n".join([f"{len(story.faults)} faults", *story.faults]))
    if args.record:
        figures = {"limits": story.limits, "ends": dict(sorted(story.ends.items())), "faults": story.faults}
        small_run.record(args.record, args.kind, f"seed {args.seed}", figures)
    sys.exit(bool(story.faults))


if __name__ == "__main__":
    main()
