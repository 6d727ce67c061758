"""The measurement that the dry run's figures come from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import measure_dry_run
import pytest

from tcal_compiler.config import Config
from tcal_compiler.dry_run import DryRun
from tcal_compiler.passes.types import Plan
from tcal_compiler.runtime.config import AlignConfig
from tcal_compiler.runtime.meter import Time
from tcal_compiler.trial import StageCost, counts

ROOT = Path(__file__).parents[1]

# torch reads these settings when it is imported; the last line ends without a conversion.
CODE = """
import os, runpy, sys
from pathlib import Path

class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))

sys.meta_path.insert(0, Watch())
script = runpy.run_path("examples/measure_dry_run.py")
from tcal_compiler import cli
if sys.argv[1] == "command":
    sys.argv = ["tcal-compile", "--config", "none.toml"]
    try:
        cli.compile_main()
    except SystemExit:
        import torch
else:
    cli.compile_main = lambda: None
    script["convert_measured"]([], Path("none"), Path("none"))
"""


def policy(which: str) -> str:
    command = [sys.executable, "-c", CODE, which]
    shown = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    return shown.stdout.strip()


def test_the_measured_conversion_has_the_threads_of_the_command():
    assert policy("measured") == policy("command") == "PASSIVE"


def test_medians_of_memory_alone_and_of_dry_runs():
    runs = [{"command": "x", "stages": {"load": {"peak_bytes": [1, n]}}, "dry_run_seconds": n} for n in (3, 1, 2)]
    assert measure_dry_run.medians(runs) == runs[2]
    for run in runs:
        del run["dry_run_seconds"]
    assert measure_dry_run.medians(runs) == runs[2]


def test_a_stage_that_was_not_asked_for_has_no_figures():
    stages = [StageCost("align", Time(3.0, 4.0), 10**9, 5, 6), StageCost("distill", Time(1.0, 1.0), 10**9)]
    run = DryRun("x", [], [], Plan((), (0,), "none"), True, stages, Time(1.0, 1.0), ("distill",))
    lines = run.text().splitlines()
    assert next(line for line in lines if line.startswith("distill")).split() == ["distill", *"-----"]
    assert next(line for line in lines if line.startswith("align")).split()[:3] == ["align", "3.0", "s"]
    assert "temporary" in next(line for line in lines if line.startswith("stage"))


@pytest.mark.parametrize("steps", [0, 1, 2, 7, 10, 11, 10**9])
def test_scores_and_checkpoints_are_counted_without_going_through_the_steps(steps):
    config = AlignConfig(steps=steps, score_every=5, checkpoint_every=2)
    if steps < 100:
        done = range(1, steps + 1)
        assert counts(config) == (1 + sum(map(config.scores_after, done)), sum(map(config.saves_after, done)))
    else:
        assert counts(config) == (1 + steps // 5, steps // 2 - 1)


def test_every_number_of_a_configuration_has_an_upper_bound():
    """Of whole numbers: beyond it a tensor's size or a loop's end is reached, far behind the place of the mistake."""
    numbers = [Config, *(type(getattr(Config(), n)) for n in Config.model_fields)]
    fields = [(m, n, f) for m in numbers if hasattr(m, "model_fields") for n, f in m.model_fields.items()]
    for model, name, field in fields:
        if field.annotation in (int, int | None):
            assert any(hasattr(m, "le") for m in field.metadata), f"{model.__name__}.{name}"
