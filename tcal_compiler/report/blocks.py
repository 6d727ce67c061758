"""What a report is made of, before it is written as Markdown or HTML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Table:
    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Plot:
    """A chart: draw(axes) fills one pair of matplotlib axes. title also names it for readers that see no pictures."""

    title: str
    draw: Callable[[Any], None]


@dataclass(frozen=True)
class Code:
    text: str


Block = Paragraph | Table | Plot | Code


@dataclass(frozen=True)
class Section:
    title: str
    blocks: list[Block]
