"""Retrieval examples: exact length, facts where they should be, answers nowhere else, the same from the same seed."""

from __future__ import annotations

import math
import re

import pytest
import torch

from tcal_compiler.api import ASSETS
from tcal_compiler.errors import ConfigError, DataError
from tcal_compiler.runtime.data import read_text
from tcal_compiler.runtime.retrieval import retrieval_tasks
from tcal_compiler.runtime.tasks import Request, score_tasks
from tcal_compiler.runtime.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
FACT = re.compile(r"The code for the (\w+ \w+) is (\d{4})\.")
ASKED = re.compile(r"\n\nThe code for the (\w+ \w+) is$")


@pytest.fixture(scope="module")
def docs() -> list[str]:
    return read_text(ASSETS / "text" / "heldout.txt")


def words(request: Request) -> tuple[str, str]:
    return BYTES.decode(request.context), BYTES.decode(request.continuation)


@pytest.mark.parametrize("kind, facts", [("needle", 1), ("recall", 8)])
def test_the_answer_stands_in_its_fact_alone(docs, kind, facts):
    for task in retrieval_tasks(docs, BYTES, kind=kind, lengths=[600, 2000], examples=12):
        length, depths = int(task.name.split()[1]), []
        for (request,) in task.examples:
            text, answer = words(request)
            assert len(request.context) + len(request.continuation) == length
            found = dict(FACT.findall(text))
            assert len(found) == facts == len(set(found.values()))
            asked = ASKED.search(text)
            assert asked and answer == f" {found[asked[1]]}"
            assert all(text.count(code) == 1 for code in found.values())
            depths.append(text.index(found[asked[1]]) / length)
        assert min(depths) < 0.3 and max(depths) > 0.6
        assert len({words(r)[1] for (r,) in task.examples}) > 9


def test_the_filler_is_the_text_and_examples_do_not_hang_on_their_number(docs):
    few, many = (retrieval_tasks(docs, BYTES, kind="needle", lengths=[700], examples=n)[0] for n in (3, 6))
    assert list(few.examples) == list(many.examples)[:3]
    other = retrieval_tasks(docs, BYTES, kind="needle", lengths=[700], examples=3, seed=1)[0]
    assert all(a != b for a, b in zip(few.examples, other.examples, strict=True))
    whole = " ".join(" ".join(docs).split())
    before, behind = (p.strip() for p in FACT.split(words(few.examples[0][0])[0])[::3])
    assert before in whole and behind.partition("\n\n")[0].strip() in whole
    assert len(before) + len(behind) > 500


def reader(ids: torch.Tensor) -> torch.Tensor:
    """A model that looks a fact up: certain of each digit, for byte tokens."""
    out = torch.zeros(*ids.shape, 256)
    for row, tokens in enumerate(ids.tolist()):
        text = bytes(tokens).decode("latin-1")  # a character for each token
        found = dict(FACT.findall(text))
        place, key = max((m.end(), m[1]) for m in re.finditer(r"\n\nThe code for the (\w+ \w+) is", text))
        for i, byte in enumerate(f" {found.get(key, '????')}".encode()):
            if place - 1 + i < ids.shape[1]:
                out[row, place - 1 + i, byte] = 50.0
    return out


def test_a_model_that_reads_is_right_and_one_that_does_not_is_at_chance(docs):
    (task,) = retrieval_tasks(docs, BYTES, kind="recall", lengths=[900], examples=5)

    def blind(ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*ids.shape, 256)

    found = score_tasks([task], {"teacher": reader, "blind": blind}, device=torch.device("cpu"))
    assert [s.value for s in found["teacher"]] == pytest.approx([1, 0], abs=1e-6)
    exact, nll = found["blind"]
    assert exact.value == 0 and exact.chance == 1e-4 and nll.value == pytest.approx(math.log(256))


def test_lengths_and_fillers_that_do_not_do(docs):
    with pytest.raises(ConfigError, match="--needle: 100 examples of 64 tokens"):
        retrieval_tasks(docs, BYTES, kind="needle", lengths=[64])
    with pytest.raises(ConfigError, match="0 examples"):
        retrieval_tasks(docs, BYTES, kind="needle", lengths=[600], examples=0)
    with pytest.raises(DataError, match=r"the filler has 1[0-9]{3} tokens, too few for examples of 4096"):
        retrieval_tasks([docs[0][:1500]], BYTES, kind="recall", lengths=[4096])
    with pytest.raises(DataError, match="too short for the facts"):
        retrieval_tasks(docs, BYTES, kind="recall", lengths=[256], examples=1)
    every_code = " ".join(f"{i:04}" for i in range(10_000))
    with pytest.raises(DataError, match="cannot be made"):
        retrieval_tasks([every_code] * 2, BYTES, kind="needle", lengths=[49_000], examples=1)
