"""examples/training_rates.py: from teacher to JSON and table, every student from the same start."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from command_line import HELD_OUT, TINY

from tcal_compiler.api import CALIBRATION_TEXT

ROOT = Path(__file__).parents[1]


def test_one_command_gives_the_json_and_its_tables(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    out = tmp_path / "rates.json"
    words = [TINY, "--tokenizer", "bytes", "--policy", "none", "--calib", CALIBRATION_TEXT, "--sequences", 6]
    words += ["--init-sequences", 4, "--holdout", 2, "--length", 32, "--local-window", 8, "--batch", 2, "--steps", 3]
    words += ["--near-errors", "0,1e9", "--distill-steps", 2, "--distill-rates", "1e-3/1e-4,1e-12/1e-12"]
    words += ["--eval", f"books={HELD_OUT}", "--eval-length", 32, "--eval-sequences", 1, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["training_rates.py", *map(str, [*words, "--json", out])])
    importlib.import_module("training_rates").main()
    body = json.loads(out.read_text())
    start, distilled = body["alignment"]["start"], body["distillation"]
    rows = {k: v for k, v in body["alignment"].items() if k != "start"}
    assert rows.keys() == {"0", "1e+09"} and distilled.keys() == {"0.001/0.0001", "1e-12/1e-12"}
    assert rows["0"]["errors"]["0"] == rows["1e+09"]["errors"]["0"] > rows["0"]["error"]
    least = min(r["kl"] for r in rows.values())
    assert abs(rows["1e+09"]["kl"] - start["kl"]) < 1e-2 * start["kl"] and least < start["kl"]
    assert abs(distilled["1e-12/1e-12"]["kl"] - least) < 1e-4 * least
    assert len(body["scores"]) == 5
    page = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", ["write_results.py", str(tmp_path), "--out", str(page)])
    importlib.import_module("write_results").main()
    assert "| near_error 0 | " in page.read_text() and "| rates 0.001/0.0001 | " in page.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--distill-rates", "1e-3"), "lr_gdn/lr_other"),
        (("--distill-rates", "1e-3/x"), "lr_gdn/lr_other"),
        (("--distill-rates", "1e-3/nan"), "lr_other nan: Input should be"),
        (("--distill-rates", "0/1e-4"), "lr_gdn 0.0: Input should be greater than 0"),
        (("--distill-rates", "1/1", "--distill-steps", "0"), "nothing is trained"),
        (("--near-errors", "nan"), "near_error nan: Input should be"),
        (("--near-errors=-1",), "near_error -1.0: Input should be"),
        (("--near-errors", "a"), "'a' is no list of numbers"),
        (("--steps", "0"), "nothing is trained"),
        (("--steps", "-1"), "steps -1: Input should be"),
        (("--init-sequences", "65"), "more than the 64 sequences"),
        (("--calib", "/none"), "--calib /none: no such file"),
        (("--eval", "a=/none"), "--eval a=/none: no such file"),
        (("--eval", "a"), "NAME=FILE"),
        (("--eval", f"a={HELD_OUT}:x"), "NAME=FILE"),
        (("--json", "/none/out.json"), "its folder is not there"),
    ],
)
def test_bad_arguments_are_refused_before_a_teacher_is_loaded(words, said, monkeypatch, capsys):
    """Rates out of range were trained with, and zero steps gave rows of students that were not trained."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    module = importlib.import_module("training_rates")
    monkeypatch.setattr(module, "RateBench", None)
    monkeypatch.setattr(sys, "argv", ["training_rates.py", "none", "--calib", str(CALIBRATION_TEXT), *words])
    with pytest.raises(SystemExit) as e:
        module.main()
    assert e.value.code == 2 and said in capsys.readouterr().err
