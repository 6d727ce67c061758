"""Feeds mutated files to the compiler: `python tests/fuzz/fuzz.py --inputs 20000 --run RUN`.

Each input may be accepted or refused with a TcalError. Anything else is a finding: another exception, a process that
dies, more than 10 seconds, more memory than max(fuzz_watch.FLOOR, twice the bytes of the input's files), a write
outside the input's folder, a socket, another process, or an unpickled object. An input is a function of target, seed
and number alone, so a finding is repeated by its number. Linux only.
"""

from __future__ import annotations

import argparse
import gc
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

import torch
from fuzz_watch import FLOOR, Memory, Watch

ROOT = Path(__file__).parents[2]
MOST_SECONDS = 10.0
WARM_SECONDS = 100.0  # for the inputs that are not mutated, and what they import
WARM = (1 << 64) - 1  # in place of an input's number, while those are read
MOST_ADDRESSES = 3 << 30  # bytes of address space that reading may add: beyond, allocations fail

COLUMNS = ("target", "inputs", "accepted", "refused, by error", "findings", "seconds", "slowest, s", "memory, MiB")


@dataclass
class Tally:
    """Counts of one target. outcomes: "accepted", a typed error's name, or a finding."""

    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    slowest: float = 0.0
    most_memory: int = 0  # bytes that reading one input added


def one(target: Any, files: dict[str, bytes], folder: Path, watch: Watch) -> tuple[str, int]:
    """The outcome of one input, and bytes of memory that reading it added.

    An outcome is "accepted", the name of a typed error, or a finding that starts with "!".
    """
    from fuzz_targets import put

    from tcal_compiler.errors import TcalError

    put(folder, files)
    gc.collect()
    memory, watch.active, watch.seen = Memory(), True, ""
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
        watch.active = False
    added, size = memory.added(), sum(map(len, files.values()))
    if watch.seen:
        outcome = f"!{watch.seen}"
    elif outcome[0] != "!" and added > max(FLOOR, 2 * size):
        outcome = f"!memory: {added >> 20} MiB for {size} bytes, {outcome}"
    return outcome, added


def _child(target: Any, first: int, last: int, seed: int, folder: Path, board: memoryview, out: Path) -> None:
    """Reads the inputs of a range; the board tells the parent which one is being read."""
    from fuzz_targets import put

    warnings.simplefilter("ignore")
    board[:8] = WARM.to_bytes(8, "little")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for files in target.seeds:  # loads libraries, which may take memory and make folders for their caches
        put(folder, files)
        target.read(folder)
    gc.collect()
    gc.freeze()  # what is loaded by now costs later collections no time
    gc.set_threshold(700, 10, 10)  # Python's own; more would count as memory
    watch = Watch(folder)
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + MOST_ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with out.open("a") as log:
        for number in range(first, last):
            board[:8] = number.to_bytes(8, "little")
            files, started = target.make(Random(f"{target.name} {seed} {number}")), time.monotonic()
            outcome, added = one(target, files, folder, watch)
            log.write(json.dumps([number, outcome, time.monotonic() - started, added]) + "\n")
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
        limit = WARM_SECONDS if current == WARM.to_bytes(8, "little") else MOST_SECONDS
        if time.monotonic() - since > limit:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return f"!more than {limit:.0f} s"
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
            if at == WARM:
                raise RuntimeError(f"{target.name}: reading what nobody touched: {end}")
            ends[at] = end
            at += 1
    finally:
        memory.close()
        memory.unlink()
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for number, outcome, seconds, added in [*rows, *((n, e, MOST_SECONDS, 0) for n, e in ends.items())]:
        tally.outcomes[outcome.partition(" at ")[0]] += 1
        tally.slowest, tally.most_memory = max(tally.slowest, seconds), max(tally.most_memory, added)
        if outcome.startswith("!"):
            tally.findings.append(f"{target.name} {number}: {outcome[1:]}")
    outside = [p for p in (work / "sandbox").rglob("*") if not p.is_relative_to(folder) and p != folder.parent]
    if outside != []:
        tally.findings.append(f"{target.name}: files outside the input's folder: {outside[:3]}")
    tally.seconds = time.monotonic() - started
    return tally


def row(name: str, tally: Tally) -> list[str]:
    """A line of the table that `main` prints."""
    refused = [f"{n} {c}" for n, c in sorted(tally.outcomes.items()) if n[0] != "!" and n != "accepted"]
    counts = [sum(tally.outcomes.values()), tally.outcomes["accepted"], ", ".join(refused), len(tally.findings)]
    spent = f"{tally.seconds:.0f}", f"{tally.slowest:.1f}", str(tally.most_memory >> 20)
    return [name, *map(str, counts), *spent]


def main() -> None:
    """Prints a table of counts, then the findings; exit 1 when there are any."""
    torch.set_num_threads(1)  # a forked child would wait for ever for OpenMP threads that only its parent has
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a finished run folder of a model with four layers")
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of each target's first input")
    parser.add_argument("--target", action="append", help="only these; all inputs are theirs")
    parser.add_argument("--number", type=int, help="read this one input in this process, with its traceback")
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
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
        print("|", " | ".join(COLUMNS), "|\n|" + "---|" * len(COLUMNS))
        for target in targets:
            count = round(args.inputs * target.share / total)
            print("|", " | ".join(row(target.name, tally := fuzz(target, count, args.seed, work, args.first))), "|")
            sys.stdout.flush()
            failed += tally.findings
        print("\n".join(failed))
        sys.exit(bool(failed))
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
