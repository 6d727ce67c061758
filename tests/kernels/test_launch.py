"""Kernels that are compiled at once on several threads, before any runs."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tcal_compiler.kernels import launch

CUDA = torch.device("cuda", 0)


class Kernel:
    """What Triton calls a kernel: `run` compiles or runs it."""

    def __init__(self, done: list[Any]) -> None:
        self.done = done

    def run(self, *args: object, grid: tuple[int], warmup: bool, **options: object) -> Any:
        self.done.append(("compiled" if warmup else "ran", *args, grid, options))
        return SimpleNamespace(src=args[0], metadata=options) if warmup and args[0] != "broken" else None


@pytest.fixture
def prepared(monkeypatch) -> list[Any]:
    """What was prepared for the host, and on which thread."""
    triton = pytest.importorskip("triton")
    found: list[Any] = []
    active = SimpleNamespace(launcher_cls=lambda src, _: found.append((src, threading.current_thread())))
    monkeypatch.setattr(triton.runtime.driver, "_active", active, raising=False)
    monkeypatch.setattr(triton, "AsyncCompileMode", lambda pool, ignore_errors: nullcontext())
    return found


def test_all_are_compiled_before_any_runs(prepared):
    done: list[Any] = []

    def run() -> str:
        for number, name in enumerate(("a", "broken", "b")):
            launch.launch(Kernel(done), 3 + number, name, BK=number)
        return "results"

    assert launch.compiled_at_once(run, CUDA) == "results"
    assert [x[0] for x in done] == ["compiled"] * 3 + ["ran"] * 3
    assert done[-1] == ("ran", "b", (5,), {"BK": 2})
    assert sorted(name for name, _ in prepared) == ["a", "b"]
    assert threading.current_thread() not in [thread for _, thread in prepared]


def test_what_fails_while_compiling_leaves_launches_as_they_were(prepared):
    done: list[Any] = []

    def fails() -> None:
        launch.launch(Kernel(done), 1, "a")
        raise MemoryError

    with pytest.raises(MemoryError):
        launch.compiled_at_once(fails, CUDA)
    launch.launch(Kernel(done), 1, "b")
    assert [x[0] for x in done] == ["compiled", "ran"]


def test_on_the_cpu_nothing_is_compiled_first():
    done: list[Any] = []
    launch.compiled_at_once(lambda: launch.launch(Kernel(done), 1, "a"), torch.device("cpu"))
    assert [x[0] for x in done] == ["ran"]
