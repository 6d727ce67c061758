"""Feeds mutated files to the compiler: `python tests/fuzz/fuzz.py --inputs 20000 --run RUN`.

Each input may be accepted or refused with a TcalError. Anything else is a finding: another exception, a process that
dies, more than 10 seconds, a write outside the input's folder, a socket, another process, or an unpickled object.
An input is a function of target, seed and number alone, so a finding is repeated by its number.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing import shared_memory
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[2]
MOST_SECONDS = 10.0
MOST_MEMORY = 3 << 30  # address space that reading may add
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
FORBIDDEN = ("socket.connect", "socket.getaddrinfo", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen")


@dataclass
class Tally:
    """Counts of one target. outcomes: "accepted", a typed error's name, or a finding."""

    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    slowest: float = 0.0


class Watch:
    """Audit hook that notes what must not happen while an input is read. Hooks stay for the life of the process."""

    def __init__(self, allowed: Path) -> None:
        self.allowed, self.active, self.seen = os.path.realpath(allowed), False, ""
        sys.addaudithook(self)

    def _outside(self, path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        real = os.path.realpath(os.fsdecode(path))
        return not real.startswith(self.allowed) and real != os.devnull

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        self.active = False
        try:
            bad = (
                event in FORBIDDEN
                or (event == "open" and isinstance(args[2], int) and args[2] & WRITES and self._outside(args[0]))
                or (event in CHANGES and self._outside(args[0]) and not isinstance(args[-1], int))
                or (event == "pickle.find_class" and not str(args[0]).startswith(("torch", "collections")))
            )
            if bad:
                self.seen = f"{event} {args[:2]}"
        finally:
            self.active = True


def one(target: Any, number: int, seed: int, folder: Path, watch: Watch | None) -> str:
    """The outcome of one input: "accepted", the name of a typed error, or a finding that starts with "!"."""
    from fuzz_targets import put

    from tcal_compiler.errors import TcalError

    put(folder, target.make(Random(f"{target.name} {seed} {number}")))
    if watch is not None:
        watch.active, watch.seen = True, ""
    try:
        target.read(folder)
        outcome = "accepted"
    except TcalError as e:
        outcome = type(e).__name__ if e.where and e.what else "!empty message"
    except BaseException as e:
        place = traceback.extract_tb(e.__traceback__)
        ours = [f for f in place if str(ROOT) in f.filename] or place
        outcome = f"!{type(e).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}: {str(e)[:120]}"
    finally:
        if watch is not None:
            watch.active = False
    return f"!{watch.seen}" if watch is not None and watch.seen else outcome


def _child(target: Any, first: int, last: int, seed: int, folder: Path, board: memoryview, out: Path) -> None:
    """Reads the inputs of a range; the board tells the parent which one is being read."""
    warnings.simplefilter("ignore")
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + MOST_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    watch = Watch(folder)
    with out.open("a") as log:
        for number in range(first, last):
            board[:8] = number.to_bytes(8, "little")
            started = time.monotonic()
            outcome = one(target, number, seed, folder, watch)
            log.write(json.dumps([number, outcome, time.monotonic() - started]) + "\n")
            log.flush()
    os._exit(0)


def _wait(pid: int, board: memoryview) -> str:
    """Waits for a child; empty when it ended by itself in good order, else what became of it."""
    current, since = b"", time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return "" if code == 0 else f"!process ended with {code}"
        if bytes(board[:8]) != current:
            current, since = bytes(board[:8]), time.monotonic()
        if time.monotonic() - since > MOST_SECONDS:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return f"!more than {MOST_SECONDS:.0f} s"
        time.sleep(0.01)


def fuzz(target: Any, count: int, seed: int, work: Path, first: int = 0) -> Tally:
    """Reads `count` inputs of a target in child processes, a new one after each that dies or hangs."""
    tally, started = Tally(), time.monotonic()
    log, folder = work / "log.jsonl", work / "sandbox" / "deep" / "input"
    folder.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    memory = shared_memory.SharedMemory(create=True, size=8)
    ends: dict[int, str] = {}
    try:
        at = first
        while at < first + count:
            pid = os.fork()
            if pid == 0:
                try:
                    _child(target, at, first + count, seed, folder, memory.buf, log)
                except BaseException:  # of the fuzzer itself
                    (work / "broken.txt").write_text(traceback.format_exc())
                finally:
                    os._exit(3)
            end = _wait(pid, memory.buf)
            if (work / "broken.txt").exists():
                raise RuntimeError((work / "broken.txt").read_text())
            if not end:
                break
            at = int.from_bytes(memory.buf[:8], "little")
            ends[at] = end
            at += 1
    finally:
        memory.close()
        memory.unlink()
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for number, outcome, seconds in [*rows, *((n, e, MOST_SECONDS) for n, e in ends.items())]:
        tally.outcomes[outcome.partition(" at ")[0]] += 1
        tally.slowest = max(tally.slowest, seconds)
        if outcome.startswith("!"):
            tally.findings.append(f"{target.name} {number}: {outcome[1:]}")
    outside = [p for p in (work / "sandbox").rglob("*") if not p.is_relative_to(folder) and p != folder.parent]
    if outside != []:
        tally.findings.append(f"{target.name}: files outside the input's folder: {outside[:3]}")
    tally.seconds = time.monotonic() - started
    return tally


def main() -> None:
    """Prints a table of counts, then the findings; exit 1 when there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a finished run folder of a model with four layers")
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", help="only these; all inputs are theirs")
    parser.add_argument("--number", type=int, help="read this one input in this process, with its traceback")
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT / "tests" / "fuzz"), str(ROOT / "tests"), str(ROOT)]
    from fuzz_targets import make_targets, put

    work = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        (work / "seeds").mkdir()
        targets = [t for t in make_targets(args.run, work / "seeds") if not args.target or t.name in args.target]
        if args.number is not None:
            put(work / "input", targets[0].make(Random(f"{targets[0].name} {args.seed} {args.number}")))
            targets[0].read(work / "input")
            return
        total, failed = sum(t.share for t in targets), []
        print("| target | inputs | accepted | refused, by error | findings | seconds | slowest input, s |")
        print("|" + "---|" * 7)
        for target in targets:
            count = round(args.inputs * target.share / total)
            tally = fuzz(target, count, args.seed, work)
            refused = ", ".join(
                f"{n} {c}" for n, c in sorted(tally.outcomes.items()) if n[0] != "!" and n != "accepted"
            )
            numbers = (
                f"{sum(tally.outcomes.values())} | {tally.outcomes['accepted']} | {refused} | {len(tally.findings)}"
            )
            print(f"| {target.name} | {numbers} | {tally.seconds:.0f} | {tally.slowest:.1f} |", flush=True)
            failed += tally.findings
        print("\n".join(failed))
        sys.exit(bool(failed))
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
