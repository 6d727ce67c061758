"""Calibration text from one or several weighted sources, in an order that depends on nothing but text and weights.

Every row of tokens is of one file. The next row is taken from the file that is furthest behind its share, so that every
stretch of rows, the held-out slice too, holds the files in proportion.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tcal_compiler.errors import ConfigError, DataError

from . import data
from .dataset_source import PREFIX, DatasetSource
from .repeats import repeat_stretches
from .tokenizer import TokenizerLike, prompt_start

WHERE = "calib.text"
LEAST = 1e-6  # weight
LEAST_LENGTH = 8  # of calib.length
EXPANDED = 20  # tokens of a byte that is not ASCII, at most: NFKC makes 33 bytes of the three of U+FDFA


@dataclass(frozen=True)
class TextSource:
    """A text file and its share of the rows, relative to the other files' weights."""

    path: Path
    weight: float = 1.0

    @property
    def label(self) -> str:
        return str(self.path)

    @property
    def short(self) -> str:
        return self.path.name

    @property
    def identity(self) -> str:
        """Equal for two spellings of one source."""
        return str(self.path.absolute())

    def check(self) -> None:
        """Raises DataError for a file that is missing or empty; reads nothing."""
        if not os.path.lexists(self.path):
            raise DataError(self.label, "no such file", "check the path")
        if self.path.is_file() and not self.path.stat().st_size:
            raise DataError(self.label, "holds no text (0 bytes)", "a file with text")

    def documents(self) -> list[str]:
        return data.read_text(self.path)

    def sha256(self) -> str:
        return data.text_sha256(self.path)

    def hashes(self) -> list[str]:
        return data.paragraph_hashes(self.path)


Source = TextSource | DatasetSource


def parse_source(given: str) -> Source:
    """PATH or PATH:WEIGHT, or dataset_source.FORM. Raises ConfigError for a weight that is no positive number."""
    if given.startswith(PREFIX):
        source, weight = DatasetSource.of(given, WHERE)
        return source if weight is None else replace(source, weight=_weight(weight, given, source.label))
    head, colon, tail = given.rpartition(":")
    if not colon or not head.endswith(data.SUFFIXES):
        return TextSource(Path(given))
    return TextSource(Path(head), _weight(tail, given, head))


def _weight(tail: str, given: str, head: str) -> float:
    try:
        weight = float(tail)
    except ValueError:
        weight = math.nan
    if not LEAST <= weight <= 1 / LEAST:
        what = f"{given}: the weight {tail!r} is no positive number from {LEAST:g} to {1 / LEAST:g}"
        raise ConfigError(WHERE, what, f"{head}:0.5")
    return weight


def _most_tokens(document: str) -> int:
    further = len(document.encode("utf-8", "surrogatepass")) - len(document)
    return len(document) + EXPANDED * further


def mix(weights: Sequence[float]) -> Iterator[int]:
    """Which file each row is of, without end: of the first n rows file i has n w_i / sum w, rounded up or down.

    The next row goes to the file whose share of it ends first among those that may have another row already (ties: the
    first file), as in Balinski and Young's quota method.
    """
    total, taken, number = math.fsum(weights), [0] * len(weights), 0
    while True:
        number += 1
        due = [i for i, w in enumerate(weights) if taken[i] < number * w / total]
        chosen = min(due, key=lambda i: ((taken[i] + 1) / weights[i], i))
        taken[chosen] += 1
        yield chosen


@dataclass(frozen=True)
class CalibrationText:
    """The texts that a student is calibrated and distilled on, and that nothing may be measured on."""

    sources: tuple[Source, ...]
    repeats: float = 0.0  # share of repeat_stretches

    @classmethod
    def of(cls, given: str | list[str] | None, *, default: Path, repeats: float = 0.0) -> CalibrationText:
        """From calib.text: what parse_source reads, one or several; default when nothing is given.

        Raises ConfigError for an empty list, a weight that is no positive number, or a text that stands twice.
        """
        texts = [given] if isinstance(given, str) else [str(default)] if given is None else given
        sources = tuple(map(parse_source, texts))
        if not sources or len({s.identity for s in sources}) < len(sources):
            what = f"{texts} names no file" if not sources else f"{texts} names a file twice"
            raise ConfigError(WHERE, what, '["a.jsonl:0.7", "b.txt:0.3"], every file once')
        return cls(sources, repeats)

    def check(self) -> None:
        """Raises DataError for a file that is missing or empty; reads none."""
        for source in self.sources:
            source.check()

    def check_enough(self, *, count: int, length: int, holdout: int) -> None:
        """Raises DataError for a file that is too short whatever the tokenizer is.

        Counted: a token for each byte of ASCII, EXPANDED for each further byte, as normalising may make several of
        one, and 2 for each document: its end and what a tokenizer puts in front. Of a sequence one token may be the
        prompt's. Large files are not read.
        """
        order = self._order(count)
        for i, source in enumerate(self.sources):
            short = _Short(source.label, 0, order == i, length, 0, holdout, most=True)
            need = int(short.mine.sum()) * (length - 1)
            if isinstance(source, TextSource) and 0 < source.path.stat().st_size < EXPANDED * need:
                docs = source.documents()
                most = sum(map(_most_tokens, docs))
                if most + 2 * len(docs) < need:
                    raise replace(short, have=most).error()

    @property
    def name(self) -> str:
        return ", ".join(s.label for s in self.sources)

    def _named(self) -> dict[str, Source]:
        """The files by their names, those of equal names by their paths."""
        names = [s.short for s in self.sources]
        return {s.short if names.count(s.short) == 1 else s.label: s for s in self.sources}

    def sha256(self) -> dict[str, str]:
        """Of every text, by name."""
        return {name: source.sha256() for name, source in self._named().items()}

    def hashes(self) -> dict[str, list[str]]:
        """document_hashes of every text, by name."""
        return {name: source.hashes() for name, source in self._named().items()}

    def identity(self) -> list[list[object]]:
        """What the rows depend on besides the tokenizer: sha256 and weight of every text, in order, and repeats."""
        texts: list[list[object]] = [[s.sha256(), s.weight] for s in self.sources]
        return texts + ([["repeats", self.repeats]] if self.repeats else [])

    def sequences(
        self,
        tokenizer: TokenizerLike,
        *,
        count: int,
        length: int,
        holdout: int = 0,
        progress: data.Bar | None = None,
    ) -> Tensor:
        """The first `count` rows [count, length], of which the last `holdout` only score.

        Raises DataError when a file is too short for its share of them.
        """
        order = self._order(count)
        parts: list[Tensor] = []
        start = prompt_start(tokenizer)
        for i, source in enumerate(self.sources):
            docs, share = source.documents(), int((order == i).sum())
            if share:
                bar = progress(f"tokens of {source.short}") if progress else None
                most = share * length
                tokens = data.encode_documents(docs, tokenizer, tokenizer.eos_token_id, most=most, progress=bar)
                short = _Short(source.label, len(tokens), order == i, length, len(start), holdout)
                if data.count_rows(tokens, length=length, start=start) < share:
                    raise short.error()
                parts.append(data.pack(tokens, sequences=share, length=length, what=source.label, start=start))
        return self._repeated(torch.cat(parts)[order.argsort(stable=True).argsort()], tokenizer)

    def rows(self, tokenizer: TokenizerLike, *, length: int, progress: data.Bar | None = None) -> tuple[Tensor, Tensor]:
        """All rows, as data.encode_rows gives them, up to where the file that is next has no more.

        The first rows are those of `sequences`. One file is taken whole.
        """
        parts = []
        for s in self.sources:
            docs, bar = s.documents(), progress(f"documents of {s.short}") if progress else None
            eos = tokenizer.eos_token_id
            parts.append(data.encode_rows(docs, tokenizer, eos, length=length, padding=-1, progress=bar))
        left = [len(ids) for ids, _ in parts]
        starts = [sum(left[:i]) for i in range(len(left))]
        pick: list[int] = []
        taken = [0] * len(parts)
        for i in mix([s.weight for s in self.sources]):
            if taken[i] == left[i]:
                break
            pick.append(starts[i] + taken[i])
            taken[i] += 1
        index = torch.tensor(pick)
        ids, counts = (torch.cat(part)[index] for part in zip(*parts, strict=True))
        return self._repeated(ids, tokenizer).clamp(min=0), counts

    def _repeated(self, rows: Tensor, tokenizer: TokenizerLike) -> Tensor:
        return repeat_stretches(rows, self.repeats, behind=len(prompt_start(tokenizer)))

    def _order(self, count: int) -> Tensor:
        turns = mix([s.weight for s in self.sources])
        return torch.tensor([next(turns) for _ in range(count)])


@dataclass(frozen=True)
class _Short:
    """A text of `have` tokens that lacks some for its sequences.

    mine [N] bool: which of all sequences are of this text. length: of one, of which `start` tokens are the prompt's.
    most: `have` is the most that there can be.
    """

    where: str
    have: int
    mine: Tensor
    length: int
    start: int
    holdout: int
    most: bool = False

    @property
    def need(self) -> int:
        return int(self.mine.sum()) * (self.length - self.start)

    def error(self) -> DataError:
        count, share = len(self.mine), int(self.mine.sum())
        what = f"has {'at most about ' * self.most}{self.have} tokens"
        what += f", but {share} sequences of {self.length} tokens need {self.need}"
        what += f": of all {count}, {count - self.holdout} to train on + {self.holdout} held out (calib.holdout)"
        hint = ", or ".join([*self._smaller(share), f"{self.need - self.have} more tokens of text"])
        return DataError(self.where, what, hint)

    def _rows(self, length: int) -> int:
        """Sequences of all texts in front of the first of this one that is missing."""
        places, fit = self.mine.nonzero().flatten(), self.have // (length - self.start)
        return int(places[fit]) if fit < len(places) else len(self.mine)

    def _smaller(self, share: int) -> list[str]:
        """Fewer sequences and shorter ones; where neither is enough, fewer and shorter ones."""
        found = []
        if (rows := self._rows(self.length)) > self.holdout:
            found.append(f"--calib-sequences {rows - self.holdout}")
        if (shorter := self.have // share + self.start) >= LEAST_LENGTH:
            found.append(f"--calib-length {shorter}")
        halves = [n for i in range(1, self.length.bit_length()) if (n := self.length >> i) > LEAST_LENGTH]
        both = ((n, self._rows(n) - self.holdout) for n in [*halves, LEAST_LENGTH] if n > self.start)
        return found or [f"--calib-sequences {rows} --calib-length {n}" for n, rows in both if rows > 0][:1]
