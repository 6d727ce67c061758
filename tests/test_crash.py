"""SIGKILL at random moments, small disks and little memory, then the same command: the folder of an undisturbed run.

The recorded figures, of more stages and more tries, are in docs/reliability.md.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from random import Random

import crash
import crash_shared
import limits
import pytest
import small_run
from command_line import BYTES, SMALL, TINY, call, contents, done, refused


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A folder with a small teacher, and what `tcal align` made of it."""
    work = tmp_path_factory.mktemp("small")
    small_run.prepare(work)
    return work, crash.undisturbed(work, "align")


@pytest.mark.slow
def test_a_kill_in_alignment_changes_nothing(undisturbed):
    work, (step,) = undisturbed
    story, known = crash.Story(), replace(step, seconds={"align": step.seconds["align"]})
    words = small_run.commands(work, work / "killed", "align")["align"]
    crash.disturb(words, work / "killed", known, Random(1), story)
    assert story.faults == [] and story.kills == {"align": 1}


@pytest.mark.slow
def test_a_full_disk_changes_nothing(undisturbed):
    work, steps = undisturbed
    story = limits.one_try(work, work / "full", steps, limits.Box(inside=partial(limits.limit_files, 1 << 18)))
    assert story.faults == [] and list(story.ends) == ["align: StageError, stage align: no space left"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1 << 20, 1 << 26])
def test_no_memory_changes_nothing(undisturbed, size):
    work, steps = undisturbed
    box = limits.Box(inside=partial(limits.limit_memory, size), may_die=True)
    assert limits.one_try(work, work / f"starved-{size}", steps, box).faults == []


@pytest.mark.slow
def test_kills_in_every_command_change_nothing(tmp_path):
    story = crash.crash(tmp_path, rounds=1, seed=1)
    assert story.faults == [] and len(story.kills) >= 7


@pytest.mark.slow
def test_kills_of_one_of_two_processes_and_of_all_change_nothing(tmp_path):
    hits, _, faults = crash_shared.crash_shared(tmp_path, kills=3, seed=1)
    assert faults == [] and sum(hits.values()) == 3


FAULTS = {"another byte": "not as without kills", "orphan": "not as without kills", "made again": "was made again"}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_story_tells_faults(tmp_path, monkeypatch, fault):
    def finish(words, log):
        out = tmp_path / words[words.index("-o") + 1]
        out.mkdir(exist_ok=True)
        odd = out.name != "reference"
        (out / "weights").write_text("other" if odd and fault == "another byte" else "same")
        if odd and fault == "orphan":
            (out / ".tmp-plan-1").write_text("x")
        count[out.name] += 1
        record = {"config_hash": "", "inputs_hash": "", "made_from": {}, "evidence": {}}
        times = {"seconds": 1.0, "finished_at": count[out.name] if odd and fault == "made again" else 0}
        (out / "tcal.json").write_text(json.dumps({"stages": {"plan": record | times}}))
        return ""

    def kill(words, out, stage, delay):
        finish(words, out)
        return 1

    count: Counter[str] = Counter()
    monkeypatch.setattr(small_run, "prepare", lambda work: None)
    monkeypatch.setattr(small_run, "finish", finish)
    monkeypatch.setattr(crash, "_kill_once", kill)
    faults = crash.crash(tmp_path, rounds=1, seed=0, names="align").faults
    assert faults and all(FAULTS[fault] in f for f in faults)


FULL = "StageError: stage align: no space left on the disk of x\n  Try: y"


@pytest.mark.parametrize(
    "status, said, ends",
    [
        (0, "", ("done", "done")),
        (signal.SIGKILL, "", ("killed by SIGKILL", "died")),
        (1 << 8, FULL, ("StageError, stage align: no space left", "typed")),
        (1 << 8, f"Traceback\n{FULL}", ("exit 1", "fault")),
        (1 << 8, "StageError: no hint", ("exit 1", "fault")),
        (70 << 8, "UNTYPED MemoryError: ", ("exit 70", "fault")),
    ],
    ids=lambda v: v[0] if isinstance(v, tuple) else "",
)
def test_how_a_command_may_end(status, said, ends):
    assert limits.ended(status, said) == ends


def test_half_written_files_are_found(shared_run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(shared_run, out)
    assert limits.half_written(out, killed=False) == []
    (out / ".tmp-align-1").mkdir()
    (out / ".tmp-align-1/part").write_text("x")
    assert limits.half_written(out, killed=True) == [] != limits.half_written(out, killed=False)
    (out / "part").write_text("x")
    (out / "weights.safetensors").write_text("half")
    assert limits.half_written(out, killed=True) == ["part", "weights.safetensors"]


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    pid = small_run.start(("tcal", "align", TINY, "-o", str(out), *BYTES, "--align-steps", "999999", *SMALL), log)
    try:
        end = time.monotonic() + 120
        while not (out / f".tmp-align-{pid}").exists():
            assert time.monotonic() < end and not os.waitpid(pid, os.WNOHANG)[0], log.read_text()
            time.sleep(0.01)
        before = (out / "tcal.json").read_bytes()
        for words in (
            ("tcal-compile", TINY, "-o", out, *BYTES, *SMALL),
            ("tcal", "distill", out),
            ("tcal", "report", out),
        ):
            refused(call(*words), "RunFolderError", f"in use by another process (pid {pid})")
        assert (out / "tcal.json").read_bytes() == before and (out / f".tmp-align-{pid}").exists()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert contents(out).keys() >= {".lock", "tcal.json"} and (out / f".tmp-align-{pid}").exists()
    done("tcal", "report", out)
    assert not list(out.glob(".tmp-*")) and list(small_run.records(out)) == ["plan", "calibrate", "report"]
