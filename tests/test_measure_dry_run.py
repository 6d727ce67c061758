"""The measurement that the dry run's figures come from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import measure_dry_run

from tcal_compiler.dry_run import DryRun
from tcal_compiler.passes.types import Plan
from tcal_compiler.runtime.meter import Time
from tcal_compiler.trial import StageCost

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
