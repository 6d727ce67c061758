"""docs/hazards.md names tests that exist, and every number once."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def unknown_tests(text: str) -> list[str]:
    """Tests named in table rows, as `file: a, b`, that their file does not have; a bare file has to exist."""
    wrong = []
    for name, listed in re.findall(
        r"((?:\w+/)?test_\w+)(?:: ([a-z0-9_]+(?:(?: \([^)]*\))?, [a-z0-9_]+_[a-z0-9_]+)*))?", text
    ):
        file = ROOT / "tests" / f"{name}.py"
        code = file.read_text() if file.is_file() else ""
        names = [re.sub(r" \(.*", "", n) for n in listed.split(", ")] if listed else []
        wrong += [f"{name}: {n}" for n in names if f"def test_{n}(" not in code]
        wrong += [] if code else [name]
    return wrong


def test_hazards_name_tests_that_exist():
    text = (ROOT / "docs" / "hazards.md").read_text()
    assert unknown_tests(text) == []
    assert unknown_tests("| 1 | x | test_hazards: no_such, other_one; test_none |") == [
        "test_hazards: no_such",
        "test_hazards: other_one",
        "test_none",
    ]
    numbers = [n for row in re.findall(r"^\| ([\d, ]+) \|", text, re.M) for n in map(int, row.split(", "))]
    assert numbers == list(range(1, 57))
