"""--json of every command, against a schema; shell completion; the dry run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from command_line import BYTES, HELD_OUT, SMALL, TINY, call, contents, done, refused
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from tcal_compiler import cli
from tcal_compiler.runtime.manifest import Manifest

Bytes = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Site(Strict):
    layer: int
    module: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    window: int | None
    rope: bool
    causal: str
    scores: str


class Refused(Strict):
    node: str
    layer: str
    reason: str


class Teacher(Strict):
    family: str | None
    vocab_size: int | None
    context_length: int | None


class Inspected(Strict):
    teacher: Teacher
    sites: list[Site]
    refused: list[Refused]


class Planned(Site):
    local_window: int
    local_first: bool
    becomes: Literal["softmax", "gated delta net"]


class Plan(Strict):
    policy: str
    keep: list[int]
    convert: list[int]
    exact: bool


class Cost(Strict):
    stage: str
    seconds: Seconds
    cpu_seconds: Seconds
    peak_bytes: Bytes
    file_bytes: Bytes
    scratch_bytes: Bytes


class Spent(Strict):
    seconds: Seconds
    cpu_seconds: Seconds


class DryRun(Strict):
    teacher: str
    sites: list[Planned]
    refused: list[Refused]
    plan: Plan
    stages: list[Cost]
    total: Cost
    dry_run: Spent
    note: str


class Task(Strict):
    task: str
    metric: str
    value: float
    stderr: float | None
    examples: int
    chance: float | None
    change: float
    change_stderr: float | None


class Score(Strict):
    tokens: int
    perplexity: float
    log_perplexity_stderr: float | None
    kl: float
    kl_stderr: float | None
    tasks: list[Task] = []


class Checked(Strict):
    name: str
    measured: float
    allowed: float
    detail: str
    passed: bool


class Generated(Strict):
    prompt: str
    text: str


class Reported(Strict):
    md: str
    html: str | None


class Row(Strict):
    what: str
    first: str
    second: str


class Compared(Strict):
    first: str
    second: str
    rows: list[Row]


SCHEMAS: dict[str, Any] = {
    "inspect": Inspected,
    "eval": dict[str, Score],
    "verify": list[Checked],
    "generate": Generated,
    "report": Reported,
    "compare": Compared,
    "doctor": dict[str, str],
    "distill": Manifest,
    **dict.fromkeys(("plan", "calibrate", "align", "export"), Manifest),
}
NEEDLE = ("--needle", "300", "--limit", "1")
EXTRA = {
    "inspect": (TINY,),
    "eval": (*("RUN", "--text", HELD_OUT, "--length", "32", "--sequences", "2", "--student-only"), *NEEDLE),
    "verify": ("RUN",),
    "generate": ("RUN", "The old", "--max-new-tokens", "4"),
    "report": ("RUN",),
    "compare": ("RUN", "RUN"),
    "doctor": (),
    "distill": ("RUN", "--steps", "1", "--no-export"),
}


def test_every_command_has_a_schema():
    assert set(SCHEMAS) == set(cli.COMMANDS) and set(EXTRA) | {"plan", "calibrate", "align", "export"} == set(SCHEMAS)


def checked(schema: Any, text: str) -> Any:
    return TypeAdapter(schema).validate_json(text)


SLOW = ("eval", "verify", "distill")


@pytest.mark.parametrize("command", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in EXTRA])
def test_json_is_as_the_schema_says(command, finished):
    words = [str(finished) if w == "RUN" else w for w in EXTRA[command]]
    checked(SCHEMAS[command], done("tcal", command, *words, "--json"))


@pytest.mark.parametrize("command", ["tcal-compile", "plan", "calibrate", "align", "export"])
def test_json_of_a_stage_is_the_manifest(command, finished, monkeypatch):
    monkeypatch.setattr("tcal_compiler.api.convert", lambda *_, **__: finished)
    words = (command,) if command == "tcal-compile" else ("tcal", command)
    found = done(*words, TINY, "-o", finished, "--json", "--quiet")
    assert checked(Manifest, found) and json.loads(found) == json.loads((finished / "tcal.json").read_text())


@pytest.mark.parametrize(
    "line, expected",
    [("tcal ev", {"eval"}), ("tcal eval --st", {"--student-only"}), ("tcal-compile --dry", {"--dry-run"})],
)
def test_completion_of_bash(line, expected):
    name, entry = line.split()[0], {"tcal": "main", "tcal-compile": "compile_main"}[line.split()[0]]
    code = f"import sys; sys.argv = ['{name}']; from tcal_compiler.cli import {entry}; {entry}()"
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    env = {f"_{name.upper().replace('-', '_')}_COMPLETE": "complete_bash", "PATH": "", "HOME": "/"} | words
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(cli.__file__).parents[1], env=env, capture_output=True
    )
    assert set(shown.stdout.decode().split()) == expected, shown.stderr


def test_a_dry_run_says_the_plan_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("tcal", "align", TINY, *BYTES, "--policy", "keep=0,2", "--align-steps", "7", "--dry-run", *SMALL)
    words += ("--local-window", "48")
    found = checked(DryRun, done(*words, "--json"))
    assert list(tmp_path.iterdir()) == []
    assert found.plan.keep == [0, 2] and found.plan.exact
    assert [s.becomes == "softmax" for s in found.sites] == [True, False, True, False]
    assert {(s.local_window, s.local_first) for s in found.sites} == {(48, True)}
    assert found.note.startswith("Calibration sequences of 48 tokens are no longer than")
    assert [s.stage for s in found.stages] == ["load", "plan", "calibrate", "align", "report"]
    assert found.total.seconds == pytest.approx(sum(s.seconds for s in found.stages), abs=0.01)
    assert found.total.peak_bytes == max(s.peak_bytes for s in found.stages) > 10**8
    sizes = {s.stage: s.file_bytes for s in found.stages}
    assert 0 < sizes["calibrate"] < sizes["align"]


@pytest.mark.slow
def test_a_dry_run_goes_no_further_than_bad_input(tmp_path):
    words = ("tcal", "plan", TINY, *BYTES, "--dry-run", "-o", tmp_path / "run", *SMALL)
    refused(call(*words, "--policy", "keep=7"), "ConfigError", "[7]")
    refused(call(*words, "--policy", "kl:4"), "ConfigError", "all 4 sites")
    refused(call(*words, "--calib", tmp_path / "none.txt"), "DataError", "none.txt")
    assert contents(tmp_path) == {}


def test_a_dry_run_counts_the_distillation_of_candidate_sets(tmp_path):
    (tmp_path / "c.toml").write_text("[score]\nalign_steps = 0\ndistill_steps = 1000000\n[distill]\nbatch = 2\n")
    words = ("tcal", "align", TINY, *BYTES, "--dry-run", "--json", *SMALL, "--policy", "kl:2")
    score = checked(DryRun, done(*words, "--config", tmp_path / "c.toml")).stages[1]
    assert score.stage == "score" and score.cpu_seconds > 4 * 1000


@pytest.mark.slow
def test_times_of_more_steps_and_of_scored_policies(tmp_path):
    """Steps are counted up; a policy that measures the sites has a stage of its own and no plan yet."""
    words = ("tcal", "align", TINY, *BYTES, "--dry-run", "--json", *SMALL)
    few, many = (checked(DryRun, done(*words, "--align-steps", n, "--policy", "kl:50%")) for n in ("10", "1010"))
    assert not few.plan.exact and len(few.plan.keep) == 2 and few.stages[1].stage == "score"
    times = [next(s for s in f.stages if s.stage == "align").cpu_seconds for f in (few, many)]
    assert times[1] > 10 * times[0]
