"""Zero-shot tasks on local files, defined as in lm-evaluation-harness 0.4.13, so that scores can be compared.

A row of a file gives one context and a continuation for each choice (WinoGrande: a context for each choice and one
continuation); the model chooses the likeliest continuation:

    acc       argmax_c log p(" " + choice_c | context) is the right one
    acc_norm  the same with log p divided by the number of characters of the choice

LAMBADA asks for the last word of a passage: acc is the share whose every token is the likeliest one, and nll is -log p
of the word, nats. examples/compare_lm_eval.py compares every log likelihood with that program's.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from tcal_compiler.errors import ConfigError, DataError

from .data import check_not_calibrated, read_rows
from .tasks import Answer, Task, TaskScore, encode_request
from .tokenizer import TokenizerLike

SUFFIXES = (".jsonl", ".jsonl.zst")


@dataclass(frozen=True)
class Example:
    """pairs: context and continuation of each choice. choices: what is divided by in acc_norm. gold: the right one."""

    pairs: tuple[tuple[str, str], ...]
    choices: tuple[str, ...]
    gold: int

    @classmethod
    def of(cls, context: str, choices: Sequence[str], gold: int) -> Example:
        return cls(tuple((context, f" {c}") for c in choices), tuple(choices), gold)


class _Row(BaseModel, ABC):
    """A line of a task's file: only the fields that are read of it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    @abstractmethod
    def example(self) -> Example: ...


class _Choices(BaseModel):
    text: list[str] = Field(min_length=1)
    label: list[str]


class _Labelled(_Row):
    choices: _Choices
    answerKey: str

    def gold(self) -> int:
        labels, texts = self.choices.label, self.choices.text
        if len(set(labels)) != len(labels) or len(labels) != len(texts):
            raise ValueError(f"{len(texts)} choices with the labels {labels[:8]}, which are not one for each")
        return self.choices.label.index(self.answerKey.strip())


class Arc(_Labelled):
    question: str

    def example(self) -> Example:
        return Example.of(f"Question: {self.question}\nAnswer:", self.choices.text, self.gold())


class OpenBookQA(_Labelled):
    question_stem: str

    def example(self) -> Example:
        return Example.of(self.question_stem, self.choices.text, self.gold())


class HellaSwag(_Row):
    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: list[str]
    label: int

    def example(self) -> Example:
        context = f"{self.activity_label}: {self.ctx_a} {self.ctx_b.capitalize()}"
        return Example.of(_without_brackets(context), [_without_brackets(e) for e in self.endings], self.label)


def _without_brackets(text: str) -> str:
    """HellaSwag's WikiHow part marks titles and steps in brackets."""
    cut = []
    for line in text.strip().replace(" [title]", ". ").split("\n"):
        before, last, behind = line.rpartition("]")  # no [ behind it is closed: looking for that would be quadratic
        cut.append(re.sub(r"\[.*?\]", "", before + last) + behind)
    return "\n".join(cut).replace("  ", " ")


class Piqa(_Row):
    goal: str
    sol1: str
    sol2: str
    label: int

    def example(self) -> Example:
        return Example.of(f"Question: {self.goal}\nAnswer:", [self.sol1, self.sol2], self.label)


class WinoGrande(_Row):
    sentence: str
    option1: str
    option2: str
    answer: int

    def example(self) -> Example:
        before, gap, behind = self.sentence.partition("_")
        if not gap:
            raise ValueError("no _ in the sentence")
        filled = (before + self.option1, before + self.option2)
        return Example(tuple((f, f" {behind.strip()}") for f in filled), filled, self.answer - 1)


class BoolQ(_Row):
    passage: str
    question: str
    answer: bool = Field(validation_alias=AliasChoices("answer", "label"))

    def example(self) -> Example:
        return Example.of(f"{self.passage}\nQuestion: {self.question}?\nAnswer:", ["no", "yes"], int(self.answer))


class Lambada(_Row):
    """The whole passage as text, or in two as context and continuation, with the space between them left out."""

    text: str = ""
    context: str = ""
    continuation: str = ""

    def example(self) -> Example:
        passage = self.text or f"{self.context} {self.continuation}"
        before, gap, word = passage.rpartition(" ")
        if not (before.strip() and gap and word.strip()):
            raise ValueError('neither "text" nor "context" and "continuation" hold a passage and its last word')
        return Example(((before, f" {word}"),), (word,), 0)


CHOICE, NORMALISED, LAST_WORD = ("acc",), ("acc", "acc_norm"), ("acc", "nll")
TASKS: dict[str, tuple[type[_Row], tuple[str, ...]]] = {
    "hellaswag": (HellaSwag, NORMALISED),
    "arc_easy": (Arc, NORMALISED),
    "arc_challenge": (Arc, NORMALISED),
    "piqa": (Piqa, NORMALISED),
    "winogrande": (WinoGrande, CHOICE),
    "openbookqa": (OpenBookQA, NORMALISED),
    "boolq": (BoolQ, CHOICE),
    "lambada_openai": (Lambada, LAST_WORD),
}


def check_tasks(names: Sequence[str]) -> None:
    """Raises ConfigError for a name that TASKS does not have, or one that stands twice."""
    unknown = [n for n in names if n not in TASKS]
    if unknown or len(set(names)) < len(names):
        what = f"{', '.join(unknown)} is unknown" if unknown else f"{', '.join(names)} names a task twice"
        raise ConfigError("--tasks", what, ", ".join(TASKS))


def task_file(folder: Path, name: str) -> Path:
    """The file NAME.jsonl or NAME_ANYTHING.jsonl (or .jsonl.zst) in the folder.

    Raises:
        DataError: there is none, or more than one.
    """
    if not folder.is_dir():
        raise DataError(str(folder), "no such folder", "--task-files with the folder that holds the tasks' files")
    seen = sorted(p.name for p in folder.iterdir() if p.name.endswith(SUFFIXES))
    found = [s for s in seen if s.startswith((f"{name}.", f"{name}_"))]
    if len(found) != 1:
        what = f"holds {len(found)} files for {name}: {', '.join(found)}" if found else f"holds no file for {name}"
        raise DataError(str(folder), f"{what}; seen: {', '.join(seen[:12])}", f"one {name}.jsonl or {name}.jsonl.zst")
    return folder / found[0]


def read_examples(path: Path, name: str, *, limit: int | None = None) -> list[Example]:
    """The first `limit` examples of a task's file.

    Raises:
        DataError: see read_rows; a missing or malformed field, an answer that is none of the choices, or an empty text,
            with the line.
    """
    kind, _ = TASKS[name]
    return [_example(kind, row, where) for where, row in read_rows(path)[:limit]]


def _example(kind: type[_Row], row: dict[str, Any], where: str) -> Example:
    try:
        example = kind.model_validate(row).example()
        if not 0 <= example.gold < len(example.pairs):
            raise ValueError(f"the answer is number {example.gold} of {len(example.pairs)} choices")
        if not all(context.strip() and continuation.strip() for context, continuation in example.pairs):
            raise ValueError("a context or choice is empty")
        for pair in example.pairs:
            "".join(pair).encode()  # half of a surrogate pair is no text
    except ValidationError as e:
        first = e.errors()[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}; seen: keys {sorted(row)[:8]}"
        raise DataError(where, what, f"fields {', '.join(kind.model_fields)}") from e
    except ValueError as e:
        raise DataError(where, str(e), "the file again as it was published") from e
    return example


def zero_shot_task(name: str, examples: Sequence[Example], tokenizer: TokenizerLike) -> Task:
    """The task with its examples encoded."""
    requests = [[encode_request(tokenizer, *pair) for pair in e.pairs] for e in examples]
    metrics = TASKS[name][1]
    guessed = sum(1 / len(e.pairs) for e in examples) / len(examples)
    chance = {} if metrics is LAST_WORD else dict.fromkeys(metrics, guessed)
    return Task(name, requests, _measure(examples, metrics), chance)


def _measure(
    examples: Sequence[Example], metrics: tuple[str, ...]
) -> Callable[[int, Sequence[Answer]], dict[str, float]]:
    def measure(i: int, answers: Sequence[Answer]) -> dict[str, float]:
        if metrics is LAST_WORD:
            return {"acc": float(answers[0].greedy), "nll": -answers[0].log_likelihood}
        found = [a.log_likelihood for a in answers]
        by_length = [x / max(1, len(c)) for x, c in zip(found, examples[i].choices, strict=True)]
        values = {"acc": found, "acc_norm": by_length}
        return {m: float(values[m].index(max(values[m])) == examples[i].gold) for m in metrics}

    return measure


def zero_shot_tasks(
    names: Sequence[str],
    folder: Path,
    tokenizer: TokenizerLike,
    *,
    limit: int | None = None,
    calibrated: tuple[dict[str, str], dict[str, list[str]]] = ({}, {}),
) -> list[Task]:
    """The named tasks from the files of a folder, at most `limit` examples of each.

    calibrated: sha256 and hashes of the texts that were calibrated on; a file whose contexts were among them is
    refused, as far as passages of 200 characters, or whole shorter ones, show it (data.document_hashes).

    Raises:
        ConfigError: an unknown task.
        DataError: a file that is missing, damaged or was calibrated on.
    """
    check_tasks(names)
    tasks = []
    for name in names:
        path = task_file(folder, name)
        examples = read_examples(path, name, limit=limit)
        check_not_calibrated(path, *calibrated, docs=[e.pairs[e.gold][0] for e in examples])
        tasks.append(zero_shot_task(name, examples, tokenizer))
    return tasks


def with_average(scores: list[TaskScore]) -> list[TaskScore]:
    """The scores, and behind two or more zero-shot tasks their mean: acc_norm where a task has it, acc elsewhere.

    Its standard errors are sqrt(sum of squares) / number of tasks; the chance of LAMBADA counts as 0.
    """
    chosen = [s for s in scores if s.task in TASKS and s.metric == ("acc", "acc_norm")[TASKS[s.task][1] is NORMALISED]]
    n = len(chosen)
    if n < 2:
        return scores
    means = {k: sum(getattr(s, k) for s in chosen) / n for k in ("value", "change")}
    errors = {k: math.sqrt(sum(getattr(s, k) ** 2 for s in chosen)) / n for k in ("stderr", "change_stderr")}
    chance = sum(s.chance or 0.0 for s in chosen) / n
    examples = sum(s.examples for s in chosen)
    return [*scores, TaskScore("average", "acc", examples=examples, chance=chance, **means, **errors)]
