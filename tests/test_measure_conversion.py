"""examples/measure_conversion.py from policy to page, on the tiny teacher."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import HELD_OUT, TINY

from tcal_compiler.api import CALIBRATION_TEXT

ROOT = Path(__file__).parents[1]


def script(name: str, *words: object) -> str:
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, words)]
    shown = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=400, env={"PYTHONPATH": str(ROOT)}
    )
    assert shown.returncode == 0, shown.stderr[-3000:]
    return shown.stdout


@pytest.mark.slow
def test_one_command_gives_the_table(tmp_path):
    (tmp_path / "piqa.jsonl").write_text(json.dumps({"goal": "Eat", "sol1": "soup", "sol2": "sand", "label": 0}) + "\n")
    out = tmp_path / "results" / "tiny.json"
    out.parent.mkdir()
    given = ["--calib", CALIBRATION_TEXT, "--sequences", 6, "--holdout", 8, "--length", 48, "--batch", 2]
    given += ["--policy", "kl:1", "--policy", "none", "--seeds", "0,1", "--init", "naive", "--steps", "4+2"]
    given += ["--eval", f"books={HELD_OUT}", "--eval-length", 64, "--eval-sequences", 2, "--needle", 300]
    given += ["--tasks", "piqa", "--task-files", tmp_path, "--limit", 2, "--without-linear", "--device", "cpu"]
    script("measure_conversion.py", TINY, *given, "--json", out)
    found = json.loads(out.read_text())
    names = [f"{a}{b}" for a in ("naive", "aligned-4-distilled-2") for b in ("", ", no linear")]
    expected = {f"{p}, {n}, seed {s}" for p in ("kl:1", "none") for n in names for s in (0, 1)}
    assert found["scores"].keys() == expected and found["tasks"].keys() == expected | {"teacher"}
    assert len(found["kept"]["kl:1"]) == 1 and found["kept"]["none"] == []
    kl = {n: r["books (64)"]["kl"] for n, r in found["scores"].items()}
    assert kl["none, aligned-4-distilled-2, seed 0"] != kl["none, aligned-4-distilled-2, seed 1"]
    assert kl["none, aligned-4-distilled-2, seed 0"] < kl["none, naive, seed 0"]
    none = [kl[n] for n in expected if n.startswith("none") and "no linear" in n]
    assert max(none) - min(none) > 0  # what training changed outside the converted sites
    script("write_results.py", out.parent, "--out", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "policies kl:1, none" in page and "seeds 0, 1" in page and "| piqa | acc_norm | teacher | 1 |" in page
    assert page.count("| needle 300 | exact |") == len(expected) + 1


def test_the_calibration_text_is_not_scored(tmp_path):
    (tmp_path / "text.txt").write_text(CALIBRATION_TEXT.read_text()[:60_000])
    words = [sys.executable, str(ROOT / "examples/measure_conversion.py"), TINY, "--calib", str(tmp_path / "text.txt")]
    words += ["--sequences", "2", "--length", "16", "--eval", f"same={CALIBRATION_TEXT}"]
    shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, env={"PYTHONPATH": str(ROOT)})
    assert shown.returncode and "calibrated on" in shown.stderr
