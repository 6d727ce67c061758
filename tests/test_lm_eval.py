"""Zero-shot scores are lm-evaluation-harness's, example by example, where that is installed."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tcal_compiler import Config, convert
from tcal_compiler.api import ASSETS
from tcal_compiler.hf import StudentForCausalLM
from tcal_compiler.runtime.tokenizer import read_tokenizer
from tcal_compiler.runtime.zero_shot import TASKS

ROOT = Path(__file__).parents[1]
EXAMPLES = 50
WORDS = (ASSETS / "text" / "heldout.txt").read_text(encoding="utf-8").split()


def row(name: str, rng: random.Random) -> dict[str, object]:
    """Words of the held-out text in the fields of a task."""

    def words(most: int) -> str:
        start = rng.randrange(len(WORDS) - most)
        return " ".join(WORDS[start : start + rng.randint(1, most)]).replace("_", "")

    choices = {"text": [words(9) for _ in range(4)], "label": list("ABCD")}
    labelled = {"choices": choices, "answerKey": rng.choice("ABCD")}
    return {
        "hellaswag": {
            "activity_label": words(3),
            "ctx_a": f"[header] {words(9)} [title] {words(20)}",
            "ctx_b": words(9),
            "endings": [f"{words(9)} [step]  {words(9)}" for _ in range(4)],
            "label": str(rng.randrange(4)),
        },
        "arc_easy": {"question": words(30), **labelled},
        "arc_challenge": {"question": words(30), **labelled},
        "piqa": {"goal": words(20), "sol1": words(20), "sol2": f"{words(20)} ", "label": rng.randrange(2)},
        "winogrande": {
            "sentence": f"{words(9)} _ {words(9)}",
            "option1": words(2),
            "option2": words(2),
            "answer": rng.choice("12"),
        },
        "openbookqa": {"question_stem": words(20), **labelled},
        "boolq": {"passage": words(90), "question": words(9), "answer": rng.random() < 0.5},
        "lambada_openai": {"context": words(60), "continuation": words(1)},
    }[name]


@pytest.fixture
def script(tmp_path, monkeypatch) -> ModuleType:
    """examples/compare_lm_eval.py, with a file of every task in tmp_path."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name in TASKS:
        rng = random.Random(name)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row(name, rng)) + "\n" for _ in range(EXAMPLES)))
    spec = importlib.util.spec_from_file_location("compare_lm_eval", ROOT / "examples/compare_lm_eval.py")
    assert spec and spec.loader
    monkeypatch.setitem(sys.modules, "compare_lm_eval", module := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


def check(found: dict[str, dict[str, Any]], examples: int) -> None:
    for name, r in found.items():
        assert r["examples"] == examples and r["differing"] == 0, name
        assert r["largest_difference"] < 1e-3, name
        assert r["ours"] == r["lm_eval"], name


@pytest.mark.slow
def test_every_task_is_scored_as_lm_eval_does(script, tmp_path):
    check(script.compare(ASSETS / "teacher", tmp_path, list(TASKS), EXAMPLES), EXAMPLES)


@pytest.mark.slow
def test_lm_eval_takes_a_saved_student(script, tmp_path):
    """As --model hf does: in padded batches, by AutoModelForCausalLM."""
    calib = {"sequences": 2, "length": 32, "holdout": 1}
    settings = {"policy": "keep=0", "local_window": 8, "calib": calib, "align": {"steps": 0}}
    run = convert("embedded", out=tmp_path / "run", config=Config.model_validate(settings))
    StudentForCausalLM.from_pretrained(run).save_pretrained(tmp_path / "student")
    read_tokenizer(run / "onnx").save(tmp_path / "student")
    check(script.compare(tmp_path / "student", tmp_path, ["arc_easy", "lambada_openai"], 12), 12)
