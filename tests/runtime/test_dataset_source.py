"""Calibration text by the name of a dataset; the `datasets` library is a stand-in, which the tests do not install."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tcal_compiler.errors import ConfigError, DataError
from tcal_compiler.runtime import dataset_source
from tcal_compiler.runtime.data import check_not_calibrated
from tcal_compiler.runtime.dataset_source import DatasetSource
from tcal_compiler.runtime.sources import CalibrationText, parse_source
from tcal_compiler.runtime.tokenizer import ByteTokenizer


class Table(list[dict[str, Any]]):
    """What load_dataset returns of a split, as far as it is used."""

    @property
    def column_names(self) -> list[str]:
        return list(self[0])

    @property
    def features(self) -> dict[str, str]:
        return {n: type(v).__name__ for n, v in self[0].items()}

    def select_columns(self, names: list[str]) -> Table:
        return Table({n: row[n] for n in names} for row in self)


@pytest.fixture
def library(monkeypatch) -> Callable[..., list[tuple[str, str | None, str]]]:
    """Makes `import datasets` find a library that has these rows, whatever is asked for; returns what was asked."""
    dataset_source._documents.cache_clear()

    def install(rows: list[dict[str, Any]], version: str = "5.2.0") -> list[tuple[str, str | None, str]]:
        asked: list[tuple[str, str | None, str]] = []

        def load_dataset(name: str, config: str | None, *, split: str) -> Table:
            asked.append((name, config, split))
            if name == "nobody/nothing":
                raise ConnectionError("cannot reach the Hub")
            return Table(rows)

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, __version__=version))
        return asked

    yield install
    dataset_source._documents.cache_clear()


def words(seed: int, count: int = 300) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefgh", k=5)) for _ in range(count))


def text(*given: object, **options: Any) -> CalibrationText:
    return CalibrationText.of([str(g) for g in given], default=Path("default.txt"), **options)


def test_names_are_read():
    for given, *expected in (
        ("a/b@train", "a/b", None, "train", "text", 1.0),
        ("a/b,en@train[:20%]+test[5:10]:body:0.5", "a/b", "en", "train[:20%]+test[5:10]", "body", 0.5),
        ("./folder@train:3", "./folder", None, "train", "text", 3.0),
        ("a@train:body", "a", None, "train", "body", 1.0),
    ):
        source = parse_source(f"datasets:{given}")
        assert source == DatasetSource(*expected)
        assert parse_source(source.label) == DatasetSource(*expected[:-1])
    for bad in ("a/b", "@train", "a@", "a@train:", "a@train:b:1:2", "a@train[:5", ""):
        with pytest.raises(ConfigError, match="does not name a dataset and its split"):
            parse_source(f"datasets:{bad}")
    for bad in ("a@train:0", "a@train:nan", "a@train:text:x"):
        with pytest.raises(ConfigError, match="is no positive number"):
            parse_source(f"datasets:{bad}")
    with pytest.raises(ConfigError, match="names a file twice"):
        text("datasets:a@train", "datasets:a@train:text:2")


def test_rows_are_those_of_a_file_with_the_same_documents(library, tmp_path):
    docs = [words(i) for i in range(5)]
    asked = library([{"id": i, "body": d} for i, d in enumerate([*docs[:2], " ", *docs[2:]])])
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in docs))
    own, file = text("datasets:a/b,en@train:body"), text(tmp_path / "a.jsonl")
    own.check()
    assert not asked
    given = {"count": 20, "length": 64}
    assert torch.equal(own.sequences(ByteTokenizer(), **given), file.sequences(ByteTokenizer(), **given))
    for a, b in zip(own.rows(ByteTokenizer(), length=64), file.rows(ByteTokenizer(), length=64), strict=True):
        assert torch.equal(a, b)
    assert asked == [("a/b", "en", "train")]  # read once
    mixed = text("datasets:a/b,en@train:body:0.75", f"{tmp_path / 'a.jsonl'}:0.25")
    assert mixed.sequences(ByteTokenizer(), **given).shape == (20, 64)


def test_the_identity_is_of_the_text_and_nothing_that_was_calibrated_on_is_scored(library, tmp_path):
    source = text("datasets:a@train")
    library([{"text": "ab"}, {"text": "c"}])
    first = source.identity()
    for rows in (["a", "bc"], ["ab", "d"]):
        dataset_source._documents.cache_clear()
        library([{"text": r} for r in rows])
        assert source.identity() != first
    dataset_source._documents.cache_clear()
    lines = [words(i, 12) for i in range(60)]
    library([{"text": t} for t in (*lines, *map(words, range(5)))])
    copy = tmp_path / "copy.txt"
    for part in (words(3), "\n".join(lines[20:50])):
        copy.write_text(part)
        with pytest.raises(DataError, match="sampled passages were calibrated on"):
            check_not_calibrated(copy, source.sha256(), source.hashes())
    copy.write_text("\n".join(map(words, range(9, 14))))
    check_not_calibrated(copy, source.sha256(), source.hashes())


def test_what_cannot_be_read_is_refused(library, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the datasets package") as e:
        text("datasets:a@train").check()
    assert e.value.hint == 'pip install "datasets>=4"'
    library([], version="3.6.0")
    with pytest.raises(DataError, match=r"3\.6\.0, which may run code"):
        text("datasets:a@train").check()
    library([{"text": "a", "n": 1}, {"text": None, "n": 2}])
    for given, what in (
        ("nobody/nothing@train", "cannot be loaded: ConnectionError: cannot reach the Hub"),
        ("a@train:body", 'has no column "body"; columns: text, n'),
        ("a@train", 'row 2: has no string under "text"'),
        ("a@train:n", 'row 1: has no string under "n"; the column is int'),
    ):
        with pytest.raises(DataError, match=what):
            parse_source(f"datasets:{given}").documents()
    library([{"text": "a"}] * 9)
    monkeypatch.setattr(dataset_source.psutil, "virtual_memory", lambda: SimpleNamespace(available=16))
    with pytest.raises(DataError, match="more than a quarter of the free memory after 5 of 9 rows"):
        parse_source("datasets:large@train").documents()
    library([{"text": " "}])
    with pytest.raises(DataError, match="holds no text"):
        parse_source("datasets:blank@train").documents()
