"""Zero-shot tasks: prompts as they are published, metrics by hand, and files that are not as they should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tcal_compiler.errors import ConfigError, DataError
from tcal_compiler.runtime.data import document_hashes
from tcal_compiler.runtime.tasks import Answer, TaskScore
from tcal_compiler.runtime.tokenizer import ByteTokenizer
from tcal_compiler.runtime.zero_shot import (
    TASKS,
    _without_brackets,
    read_examples,
    task_file,
    with_average,
    zero_shot_task,
    zero_shot_tasks,
)

CHOICES = {"text": ["a stone", "the sun"], "label": ["A", "B"]}
ROWS: dict[str, dict[str, object]] = {
    "hellaswag": {
        "activity_label": "Baking",
        "ctx_a": "[header] How to bake [title] Mix [step] two eggs.",
        "ctx_b": "then stir",
        "endings": [" it [substeps] slowly. ", "rest.", "eat."],
        "label": "2",
    },
    "arc_easy": {"question": "What warms the earth?", "choices": CHOICES, "answerKey": "B"},
    "arc_challenge": {"question": "What warms?", "choices": {**CHOICES, "label": ["1", "2"]}, "answerKey": "1"},
    "piqa": {"goal": "Open a jar", "sol1": "turn the lid", "sol2": "sing", "label": 0},
    "winogrande": {"sentence": "Ann paid Eve so _ was glad.", "option1": "Ann", "option2": "Eve", "answer": "2"},
    "openbookqa": {"question_stem": "Heat comes from", "choices": CHOICES, "answerKey": "B "},
    "boolq": {"passage": "Ice floats.", "question": "does ice sink", "answer": False},
    "lambada_openai": {"context": "She put on her red", "continuation": "coat"},
}
EXPECTED: dict[str, tuple[list[tuple[str, str]], int]] = {
    "hellaswag": (
        [("Baking: How to bake. Mix two eggs. Then stir", f" {e}") for e in ("it slowly.", "rest.", "eat.")],
        2,
    ),
    "arc_easy": ([("Question: What warms the earth?\nAnswer:", f" {c}") for c in ("a stone", "the sun")], 1),
    "arc_challenge": ([("Question: What warms?\nAnswer:", f" {c}") for c in ("a stone", "the sun")], 0),
    "piqa": ([("Question: Open a jar\nAnswer:", f" {c}") for c in ("turn the lid", "sing")], 0),
    "winogrande": ([(f"Ann paid Eve so {n}", " was glad.") for n in ("Ann", "Eve")], 1),
    "openbookqa": ([("Heat comes from", f" {c}") for c in ("a stone", "the sun")], 1),
    "boolq": ([("Ice floats.\nQuestion: does ice sink?\nAnswer:", f" {c}") for c in ("no", "yes")], 0),
    "lambada_openai": ([("She put on her red", " coat")], 0),
}


def written(folder: Path, name: str, *rows: object) -> Path:
    path = folder / f"{name}_validation.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize("name", TASKS)
def test_prompts_and_answers(tmp_path, name):
    written(tmp_path, name, ROWS[name], ROWS[name])
    pairs, gold = EXPECTED[name]
    found = read_examples(task_file(tmp_path, name), name, limit=1)
    assert [list(e.pairs) for e in found] == [pairs] and found[0].gold == gold


def test_a_passage_is_cut_before_its_last_word(tmp_path):
    rows = ({"text": "One two  three\n\nfour"}, {"context": "One two ", "continuation": "three\n\nfour"})
    found = read_examples(written(tmp_path, "lambada_openai", *rows), "lambada_openai")
    assert [e.pairs for e in found] == [(("One two ", " three\n\nfour"),)] * 2


def test_metrics_by_hand(tmp_path):
    rows = [ROWS["arc_easy"], ROWS["arc_easy"] | {"choices": {"text": ["mud", "the sun"], "label": ["A", "B"]}}]
    task = zero_shot_task("arc_easy", read_examples(written(tmp_path, "arc_easy", *rows), "arc_easy"), ByteTokenizer())
    assert task.chance == {"acc": 0.5, "acc_norm": 0.5}
    answers = [Answer(-6.0, False), Answer(-7.0, False)]
    assert task.measure(0, answers) == {"acc": 0.0, "acc_norm": 0.0}  # 6/7 < 7/7 per character
    assert task.measure(1, answers) == {"acc": 0.0, "acc_norm": 1.0}  # 6/3 > 7/7
    word = read_examples(written(tmp_path, "lambada_openai", ROWS["lambada_openai"]), "lambada_openai")
    last = zero_shot_task("lambada_openai", word, ByteTokenizer())
    assert last.measure(0, [Answer(-1.5, True)]) == {"acc": 1.0, "nll": 1.5} and last.chance == {}


def test_the_average_takes_acc_norm_where_there_is_one():
    def score(task: str, metric: str, value: float, error: float) -> TaskScore:
        return TaskScore(task, metric, value, error, 10, 0.25, value - 0.5, error)

    scores = [score("needle 512", "exact", 0.9, 1.0), score("piqa", "acc", 0.1, 1.0)]
    assert with_average(scores) == scores
    scores += [score("piqa", "acc_norm", 0.6, 0.03), score("boolq", "acc", 0.4, 0.04)]
    *_, mean = with_average(scores)
    assert (mean.task, mean.value, mean.chance, mean.examples) == ("average", pytest.approx(0.5), 0.25, 20)
    assert mean.stderr == pytest.approx(0.025) and mean.change == pytest.approx(0)


@pytest.mark.parametrize(
    "name, row, message",
    [
        ("arc_easy", {"question": "x", "choices": CHOICES}, "line 2: answerKey: Field required; seen: keys"),
        ("arc_easy", ROWS["arc_easy"] | {"answerKey": "E"}, "line 2: 'E' is not in list"),
        ("arc_easy", ROWS["arc_easy"] | {"choices": {"text": [], "label": []}}, "line 2: choices.text"),
        ("arc_easy", ROWS["arc_easy"] | {"choices": {"text": ["a"], "label": ["A", "B"]}}, "1 choices with the lab"),
        ("arc_easy", ROWS["arc_easy"] | {"choices": {"text": ["a", "b"], "label": ["B", "B"]}}, "not one for each"),
        ("boolq", ROWS["boolq"] | {"passage": "half \ud800"}, "line 2: 'utf-8' codec"),
        ("piqa", ROWS["piqa"] | {"label": 2}, "line 2: the answer is number 2 of 2"),
        ("piqa", ROWS["piqa"] | {"sol2": " "}, "line 2: a context or choice is empty"),
        ("piqa", ["a"], "line 2: is no object; seen: list"),
        ("hellaswag", ROWS["hellaswag"] | {"label": ""}, "line 2: label"),
        ("winogrande", ROWS["winogrande"] | {"sentence": "none"}, "line 2: no _"),
        ("winogrande", ROWS["winogrande"] | {"answer": "0"}, "number -1 of 2"),
        ("boolq", ROWS["boolq"] | {"passage": None}, "line 2: passage"),
        ("lambada_openai", {"context": "word"}, "line 2: neither"),
    ],
)
def test_bad_rows_are_named_by_their_line(tmp_path, name, row, message):
    path = written(tmp_path, name, ROWS[name], row)
    with pytest.raises(DataError, match=message.replace("[", r"\[")) as e:
        read_examples(path, name)
    assert e.value.hint


def test_brackets_that_are_never_closed_cost_no_time():
    assert _without_brackets("a [b] c[[d] e\n[f") == "a c e\n[f"
    assert _without_brackets("[" * 300_000 + "\n]") == "[" * 300_000 + "\n]"


def test_bad_files_and_names(tmp_path):
    tokenizer = ByteTokenizer()
    with pytest.raises(ConfigError, match="mmlu is unknown") as e:
        zero_shot_tasks(["piqa", "mmlu"], tmp_path, tokenizer)
    assert "lambada_openai" in e.value.hint
    with pytest.raises(ConfigError, match="twice"):
        zero_shot_tasks(["piqa", "piqa"], tmp_path, tokenizer)
    with pytest.raises(DataError, match="no such folder"):
        zero_shot_tasks(["piqa"], tmp_path / "none", tokenizer)
    (tmp_path / "piqa_validation.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"holds no line .1 bytes"):
        zero_shot_tasks(["piqa"], tmp_path, tokenizer)
    with pytest.raises(DataError, match=r"holds no file for boolq; seen: piqa_validation.jsonl"):
        zero_shot_tasks(["boolq"], tmp_path, tokenizer)
    (tmp_path / "piqa.jsonl").touch()
    with pytest.raises(DataError, match="holds 2 files for piqa"):
        zero_shot_tasks(["piqa"], tmp_path, tokenizer)


def test_a_task_that_was_calibrated_on_is_refused(tmp_path):
    rows = [{"text": f"Passage {i} tells how {i * i} things were lost and found again"} for i in range(9)]
    written(tmp_path, "lambada_openai", *rows)
    seen = document_hashes([r["text"].rpartition(" ")[0] for r in rows[:6]])
    with pytest.raises(DataError, match=r"6 of 9 sampled passages were calibrated on \(web\)"):
        zero_shot_tasks(["lambada_openai"], tmp_path, ByteTokenizer(), calibrated=({}, {"web": seen}))
    assert zero_shot_tasks(["lambada_openai"], tmp_path, ByteTokenizer(), calibrated=({}, {"web": seen[:1]}))
