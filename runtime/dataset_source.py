"""Calibration text that the Hugging Face `datasets` library reads: by the name of a dataset or a local folder."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import psutil

from tcal_compiler.errors import ConfigError, DataError

from . import data
from .checkpoints import say

PREFIX = "datasets:"
FORM = "datasets:NAME[,CONFIG]@SPLIT[:COLUMN][:WEIGHT], as in datasets:allenai/c4,en@train[:20000]:text"
_SPELLED = re.compile(
    r"(?P<name>[^@,]+)(,(?P<config>[^@]+))?@(?P<split>([^:\[]|\[[^\]]*\])+)(:(?P<second>[^:]+))?(:(?P<third>[^:]+))?"
)
_OLDEST = 4  # earlier ones run code of the dataset


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class DatasetSource:
    """A column of strings of a dataset's split, one document a row, and its share of the rows of tokens.

    name: on the Hub, or a local folder of parquet, json, csv or text files. split: as `datasets` spells it, with
    slices. The library downloads what it does not have, keeps its own cache, and is imported when the text is read.
    """

    name: str
    config: str | None
    split: str
    column: str = "text"
    weight: float = 1.0

    @classmethod
    def of(cls, given: str, where: str) -> tuple[DatasetSource, str | None]:
        """The source in FORM, its weight still 1, and the text of its weight. Raises ConfigError, naming `where`."""
        found = _SPELLED.fullmatch(given.removeprefix(PREFIX))
        if found is None:
            raise ConfigError(where, f"{given} does not name a dataset and its split", FORM)
        column, weight = found["second"] or "text", found["third"]
        if weight is None and _is_number(column):
            column, weight = "text", column
        return cls(found["name"], found["config"], found["split"], column), weight

    @property
    def label(self) -> str:
        config = f",{self.config}" if self.config else ""
        column = "" if self.column == "text" else f":{self.column}"
        return f"{PREFIX}{self.name}{config}@{self.split}{column}"

    @property
    def short(self) -> str:
        return self.label

    @property
    def identity(self) -> str:
        return self.label

    def check(self) -> None:
        """Raises DataError where the library cannot be used."""
        _library(self.label)

    def documents(self) -> list[str]:
        """The rows that hold text. Raises DataError when there is no such dataset, split or column of strings."""
        return list(_documents(self.name, self.config, self.split, self.column, self.label))

    def sha256(self) -> str:
        """sha256 (hex) of the documents, each behind its length in bytes: the same wherever the library keeps them."""
        digest = hashlib.sha256()
        for doc in self.documents():
            raw = doc.encode()
            digest.update(len(raw).to_bytes(8, "little") + raw)
        return digest.hexdigest()

    def hashes(self) -> list[str]:
        """data.document_hashes of the documents and of all of them joined: rows are often no more than a line."""
        docs = self.documents()
        return data.document_hashes([*docs, " ".join(docs)])


def _library(where: str) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as e:
        raise DataError(where, "reading it needs the datasets package", 'pip install "datasets>=4"') from e
    if int(datasets.__version__.split(".")[0]) < _OLDEST:
        what = f"datasets is {datasets.__version__}, which may run code that comes with a dataset"
        raise DataError(where, what, f'pip install "datasets>={_OLDEST}"')
    return datasets


@lru_cache(maxsize=4)  # texts are asked for their hashes, their documents and their rows
def _documents(name: str, config: str | None, split: str, column: str, where: str) -> tuple[str, ...]:
    library = _library(where)
    try:
        table = library.load_dataset(name, config, split=split)
    except Exception as e:  # ValueError, OSError and many of the library's own and of those that it calls
        hint = f"a dataset that is here or can be reached; {FORM}"
        raise DataError(where, f"cannot be loaded: {say(e)}", hint) from e
    if column not in table.column_names:
        what = f'has no column "{column}"; columns: {", ".join(table.column_names[:8])}'
        raise DataError(where, what, FORM)
    return tuple(_rows(table, column, where))


def _rows(table: Any, column: str, where: str) -> Iterator[str]:
    room, seen = psutil.virtual_memory().available // 4, False
    for number, row in enumerate(table.select_columns([column]), start=1):
        value = row[column]
        if not isinstance(value, str):
            what = f'has no string under "{column}"; the column is {table.features[column]}'
            raise DataError(f"{where}, row {number}", what, "a column of strings without nulls")
        room -= len(value)
        if room < 0:
            what = "fills more than a quarter of the free memory"
            raise DataError(where, f"{what} after {number} of {len(table)} rows", "a slice, as in train[:20000]")
        if value.strip():
            seen = True
            yield value
    if not seen:
        raise DataError(where, f"holds no text ({len(table)} rows)", "a split with text")
