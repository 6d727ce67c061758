"""What a tokenizer's own rules may do to a text: grow it without end, or stop the library that runs them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tcal_compiler.errors import DataError
from tcal_compiler.passes.json_text import TABLES, read_json

_MOST_GROWTH = 64.0  # rules that spell out a character in others make a few of it


def check_growth(folder: Path) -> None:
    """Raises ValueError when tokenizer.json replaces pieces of a text by longer ones, time and again."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    body = read_json(file.read_bytes(), times=TABLES)
    parts = [body.get(k) for k in ("normalizer", "pre_tokenizer", "decoder")] if isinstance(body, dict) else []
    for part in parts:
        if (growth := _growth(part)) > _MOST_GROWTH:
            raise ValueError(f"its rules make a text up to {growth:.3g} times as long")


def _growth(rule: Any) -> float:
    """The largest factor by which a rule, or a sequence of rules, makes a text longer."""
    factor = 1.0
    if isinstance(rule, list):
        for r in rule:
            factor = min(factor * _growth(r), 1e300)
    elif isinstance(rule, dict):
        if rule.get("type") == "Replace":
            pattern, content = rule.get("pattern"), rule.get("content")
            factor = _of_replacement(pattern if isinstance(pattern, dict) else {}, len(str(content)))
        for value in rule.values():
            factor = min(factor * _growth(value), 1e300)
    return factor


def _of_replacement(pattern: dict[str, Any], content: int) -> float:
    if "String" in pattern:
        plain = len(str(pattern["String"]))
        return max(1.0, content / plain) if plain else 1.0 + content
    try:
        empty = re.search(str(pattern.get("Regex")), "") is not None
    except (re.error, OverflowError, RecursionError):  # another dialect
        empty = True
    return 1.0 + content if empty else max(1.0, float(content))


@contextlib.contextmanager
def no_panic() -> Iterator[None]:
    """A panic of the tokenizers library, which is no Exception, becomes a DataError."""
    try:
        yield
    except BaseException as e:
        if type(e).__name__ != "PanicException":
            raise
        what = f"its rules fail on this text: {' '.join(str(e).split())[:200]}"
        raise DataError("tokenizer", what, "another tokenizer") from e
