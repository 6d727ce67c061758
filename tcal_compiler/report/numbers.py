"""Numbers as a reader sees them."""

from __future__ import annotations

from typing import Any

from .facts import finite


def number(x: Any, digits: int = 4) -> str:
    return f"{x:.{digits}g}" if finite(x) else "-"


def fixed(x: Any, digits: int) -> str:
    return f"{x:.{digits}f}" if finite(x) else "-"


def with_error(x: Any, error: Any, digits: int) -> str:
    """A value and its standard error, which a single sequence or example does not have."""
    return f"{fixed(x, digits)} ± {fixed(error, digits)}" if finite(error) else fixed(x, digits)


def spread(values: list[float] | None, digits: int) -> str:
    """Smallest to largest over the heads of a layer."""
    return f"{fixed(min(values), digits)} to {fixed(max(values), digits)}" if values else ""


def size(count: int) -> str:
    return f"{count / 2**20:.3g} MiB"
