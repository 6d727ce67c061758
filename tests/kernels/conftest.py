"""Kernel tests see NaN wherever a kernel forgot to write, and launches of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tcal_compiler.kernels import launch


@pytest.fixture(autouse=True)
def nan_filled_memory() -> Iterator[None]:
    """Deterministic mode fills what torch.empty and its relatives return with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def own_launches() -> None:
    """A test may change what launches are made of."""
    launch.forget()
