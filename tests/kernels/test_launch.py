"""Kernels that are compiled at once on several threads, before any runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tcal_compiler.kernels import launch, self_check

CUDA = torch.device("cuda", 0)


class Kernel:
    """What Triton calls a kernel: `run` compiles, on a thread of the pool at work, or runs it."""

    def __init__(self, done: list[Any], pool: list[Executor]) -> None:
        self.done, self.pool = done, pool

    def run(self, *args: object, grid: tuple[int], warmup: bool, **options: object) -> Any:
        self.done.append(("compiled" if warmup else "ran", *args, grid, options))
        return SimpleNamespace(future=self.pool[-1].submit(compiled, args[0], options)) if warmup else None


def compiled(name: str, options: dict[str, object]) -> Any:
    if name == "broken":
        raise RuntimeError("does not compile")
    return SimpleNamespace(src=name, metadata=options)


@pytest.fixture
def pool() -> list[Executor]:
    return []


@pytest.fixture
def prepared(monkeypatch, pool) -> list[Any]:
    """What was prepared for the host, and on which thread."""
    triton = pytest.importorskip("triton")
    found: list[Any] = []
    active = SimpleNamespace(launcher_cls=lambda src, _: found.append((src, threading.current_thread())))
    monkeypatch.setattr(triton.runtime.driver, "_active", active, raising=False)
    monkeypatch.setattr(triton, "AsyncCompileMode", lambda given, ignore_errors: nullcontext(pool.append(given)))
    return found


def test_all_are_compiled_before_any_runs(prepared, pool):
    done: list[Any] = []

    def run() -> None:
        for number, name in enumerate(("a", "broken", "b")):
            launch.launch(Kernel(done, pool), 3 + number, name, BK=number)

    with launch.compiled_at_once(run, CUDA):
        assert [x[0] for x in done] == ["compiled"] * 3
        launch.launch(Kernel(done, pool), 1, "meanwhile")
    run()
    assert [x[0] for x in done] == ["compiled"] * 3 + ["ran"] * 4
    assert done[-1] == ("ran", "b", (5,), {"BK": 2})
    assert threading.current_thread() not in [thread for _, thread in prepared]
    assert sorted(name for name, _ in prepared) == ["a", "b"]


def test_what_fails_while_compiling_leaves_launches_as_they_were(prepared, pool):
    done: list[Any] = []

    def fails() -> None:
        launch.launch(Kernel(done, pool), 1, "a")
        raise MemoryError

    with pytest.raises(MemoryError), launch.compiled_at_once(fails, CUDA):
        pass
    launch.launch(Kernel(done, pool), 1, "b")
    assert [x[0] for x in done] == ["compiled", "ran"]


def test_on_the_cpu_nothing_is_compiled_first():
    done: list[Any] = []
    with launch.compiled_at_once(lambda: launch.launch(Kernel(done, []), 1, "a"), torch.device("cpu")):
        pass
    assert not done


def test_proofs_are_compiled_together_and_their_exact_results_computed_meanwhile(monkeypatch):
    done: list[str] = []

    @contextmanager
    def at_once(run: Any, device: torch.device) -> Iterator[None]:
        run()
        done.append("meanwhile")
        yield
        done.append("ready")

    def proof(name: str, found: float) -> self_check.Proof:
        def result(kind: str, value: float) -> list[torch.Tensor]:
            done.append(f"{kind} {name}")
            return [torch.tensor([value])]

        return self_check.Proof([name], lambda: result("run", found), lambda: result("exact", 2.0))

    monkeypatch.setattr(self_check, "compiled_at_once", at_once)
    assert self_check.errors_of(CUDA, proof("a", 2.0), proof("b", 3.0)) == {"a": 0.0, "b": 0.5}
    assert done == ["run a", "run b", "meanwhile", "exact a", "exact b", "ready", "run a", "run b"]
