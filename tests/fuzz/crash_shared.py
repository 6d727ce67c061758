"""Kills a distillation that two processes share: `python tests/fuzz/crash_shared.py --kills 8 --seed 0`.

Each kill is at a random moment: before the stage (every fourth), else in it. By turns SIGKILL takes process 0,
process 1, or all processes with the launcher; the launcher has to end by itself where it is left. Then the same command
is given again, at last without a kill. The run folder has to be what it is without kills, byte for byte.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

import crash
import psutil
import small_run

MOST_SECONDS = 60.0  # until the launcher has ended, once a process is gone
MOST_OF_A_COMMAND = 600.0  # undisturbed, or until it is killed
VICTIMS = ("process 0", "process 1", "all")


def launch(out: Path, log: Path) -> subprocess.Popen[bytes]:
    words = ["-m", "tcal_compiler.cli", "distill", str(out), "--steps", "60", "--no-export"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(small_run.ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("ab") as said:
        return subprocess.Popen([*torchrun, *words], env=environment, stdout=said, stderr=said)


def workers(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """By rank: torchrun starts them in this order."""
    try:
        return sorted(psutil.Process(launcher.pid).children(), key=lambda p: p.pid)
    except psutil.NoSuchProcess:
        return []


def in_stage_now(out: Path, ranks: list[psutil.Process]) -> bool:
    """Folders of stages name the process that writes; killed ones leave theirs."""
    return any((out / f".tmp-distill-{p.pid}").exists() for p in ranks)


def stop(launcher: subprocess.Popen[bytes]) -> None:
    for process in [*workers(launcher), psutil.Process(launcher.pid)]:
        process.kill()
    launcher.wait()


def whole_command(out: Path, log: Path) -> int:
    """The exit status of a command that nobody kills. Raises TimeoutError when it does not end."""
    launcher = launch(out, log)
    try:
        return launcher.wait(MOST_OF_A_COMMAND)
    except subprocess.TimeoutExpired:
        stop(launcher)
        what = f"the command went on for {MOST_OF_A_COMMAND:.0f} s: {log.read_text()[-2000:]}"
        raise TimeoutError(what) from None


def kill_once(out: Path, log: Path, victim: str, delay: float, *, in_stage: bool) -> str:
    """Where the kill hit: "start", "distill" or, when the command ended before, "late". Raises TimeoutError."""
    launcher = launch(out, log)
    began = time.monotonic()
    since = None if in_stage else began
    while since is None or time.monotonic() - since < delay or len(workers(launcher)) < 2:
        if launcher.poll() is not None:
            return "late"
        if since is None and in_stage_now(out, workers(launcher)):
            since = time.monotonic()
        if time.monotonic() - began > MOST_OF_A_COMMAND:
            stop(launcher)
            raise TimeoutError(f"there was nothing to kill in {MOST_OF_A_COMMAND:.0f} s: {log.read_text()[-2000:]}")
        time.sleep(0.02)
    ranks = workers(launcher)
    where = "distill" if in_stage_now(out, ranks) else "start"
    chosen = [psutil.Process(launcher.pid), *ranks] if victim == "all" else [ranks[VICTIMS.index(victim)]]
    for process in chosen:
        process.send_signal(signal.SIGKILL)
    try:
        launcher.wait(MOST_SECONDS)
        _, left = psutil.wait_procs(ranks, MOST_SECONDS)
    except subprocess.TimeoutExpired:
        left = ranks
    if left:
        for process in [*left, launcher]:
            process.kill()
        raise TimeoutError(f"processes went on for {MOST_SECONDS:.0f} s")
    return where


def crash_shared(work: Path, *, kills: int, seed: int) -> tuple[Counter[str], int, list[str]]:
    """Hits by victim and place, how often training went on from a checkpoint, and faults."""
    small_run.prepare(work)
    crash.undisturbed(work, "align")
    aligned, reference, out, log = (work / name for name in ("aligned", "reference", "run0", "run0.log"))
    shutil.copytree(reference, aligned)
    started = time.monotonic()
    if whole_command(reference, log):
        raise RuntimeError(log.read_text()[-3000:])
    whole, seconds = time.monotonic() - started, small_run.records(reference)["distill"]["seconds"]
    rng, hits, faults, resumed = Random(seed), Counter[str](), list[str](), 0
    for number in range(kills + 1):
        log.unlink(missing_ok=True)
        if not out.exists():
            shutil.copytree(aligned, out)
        victim, in_stage = VICTIMS[number % 3], number % 4 != 3
        delay = rng.uniform(0, seconds if in_stage else whole - seconds)
        try:
            if number < kills:
                hits[f"{victim}: {kill_once(out, log, victim, delay, in_stage=in_stage)}"] += 1
            elif whole_command(out, log):
                faults.append(log.read_text()[-2000:])
        except TimeoutError as e:
            faults.append(f"kill {number}, {victim}: {e}")
        resumed += log.read_text().count(" goes on from step ")
        if "distill" in small_run.records(out):
            wrong = small_run.difference(small_run.made(out), small_run.made(reference))
            faults += [f"kill {number}: not as without kills: {wrong}"] if wrong else []
            shutil.rmtree(out)
    return hits, resumed, faults + (["the last command did not complete the stage"] if out.exists() else [])


def main() -> None:
    """Prints what was hit and every fault; exit 1 when there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="JSON file of the figures of all seeds")
    args = parser.parse_args()
    sys.path.insert(0, str(small_run.ROOT))
    with tempfile.TemporaryDirectory(prefix="crash-") as work:
        hits, resumed, faults = crash_shared(Path(work), kills=args.kills, seed=args.seed)
    print(f"{dict(sorted(hits.items()))}; {resumed} times training went on from a checkpoint")
    print("\n".join([f"{len(faults)} faults", *faults]))
    if args.record:
        figures = {"kills": dict(sorted(hits.items())), "resumed": resumed, "faults": faults}
        small_run.record(args.record, "kills of two processes", f"seed {args.seed}", figures)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
