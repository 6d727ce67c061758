"""Zero-shot scores are lm-evaluation-harness's, example by example, where that is installed."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest

from tcal_compiler.api import ASSETS
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


@pytest.mark.slow
def test_every_task_is_scored_as_lm_eval_does(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name in TASKS:
        rng = random.Random(name)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row(name, rng)) + "\n" for _ in range(EXAMPLES)))
    spec = importlib.util.spec_from_file_location("compare_lm_eval", ROOT / "examples/compare_lm_eval.py")
    assert spec and spec.loader
    monkeypatch.setitem(sys.modules, "compare_lm_eval", script := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(script)
    found = script.compare(ASSETS / "teacher", tmp_path, list(TASKS), EXAMPLES)
    for name, r in found.items():
        assert r["examples"] == EXAMPLES and r["differing"] == 0, name
        assert r["largest_difference"] < 1e-3, name
        assert r["ours"] == r["lm_eval"], name
