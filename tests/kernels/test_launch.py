"""Launches that are made once and for all calls of one size; kernels that are compiled at once, before any runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tcal_compiler.kernels import launch, registration, self_check

CUDA = torch.device("cuda", 0)
X = torch.zeros(8)


class Kernel:
    """What Triton calls a kernel: `run` compiles, on a thread of the pool at work, or runs it."""

    arg_names = ("x", "y", "n", "BK")

    def __init__(self, name: str, done: list[Any], pool: list[Executor]) -> None:
        self.name, self.done, self.pool = name, done, pool

    def run(self, *args: object, grid: tuple[int, ...], warmup: bool, **options: object) -> Any:
        self.done.append(("compiled" if warmup else "ran", self.name, *args[2:], grid, options))
        if warmup:
            return SimpleNamespace(future=self.pool[-1].submit(compiled, self.name, options))
        return Found(self.done)


class Found:
    """What Triton has compiled, and is given addresses."""

    def __init__(self, done: list[Any]) -> None:
        self.done = done

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *given: self.done.append(("again", grid, *given))


def compiled(name: str, options: dict[str, object]) -> Any:
    if name == "broken":
        raise RuntimeError("does not compile")
    return SimpleNamespace(src=name, metadata=options)


def launched(name: str, done: list[Any], pool: list[Executor], programs: int = 1) -> None:
    launch.Launch(Kernel(name, done, pool), programs, 7, BK=programs)(X, X)


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


def test_what_triton_found_is_run_again_for_the_same_dtypes_and_alignment():
    done: list[Any] = []
    run = launch.Launch(Kernel("a", done, []), 3, 7, 0.5, num_warps=4, BK=2)
    wide, odd = X.double(), X[1:]
    for y in (X, X, wide, wide, odd, odd, X):
        run(X, y)
    asked = ("ran", "a", 7, 0.5, (3, 1, 1), {"num_warps": 4, "BK": 2})
    again = [("again", (3, 1, 1), X.data_ptr(), y.data_ptr(), 7, 0.5, 2) for y in (X, wide, X)]
    assert done == [asked, again[0], asked, again[1], asked, asked, again[2]]


def test_what_was_found_does_not_run_while_kernels_are_compiled(prepared, pool):
    done: list[Any] = []
    run = launch.Launch(Kernel("a", done, pool), 3, 7, BK=2)
    run(X, X)
    with launch.compiled_at_once(lambda: run(X, X), CUDA):
        pass
    assert [x[0] for x in done] == ["ran", "compiled"]


def test_launches_are_made_once_for_a_size_until_they_are_forgotten():
    made: list[int] = []
    make = launch.per_size(lambda size: made.append(size))
    for size in (1, 2, 1, 2):
        make(size)
    assert made == [1, 2]
    launch.forget()
    make(1)
    assert made == [1, 2, 1]


def test_all_are_compiled_before_any_runs(prepared, pool):
    done: list[Any] = []

    def run() -> None:
        for number, name in enumerate(("a", "broken", "b")):
            launched(name, done, pool, 3 + number)

    with launch.compiled_at_once(run, CUDA):
        assert [x[0] for x in done] == ["compiled"] * 3
        launched("meanwhile", done, pool)
    run()
    assert [x[0] for x in done] == ["compiled"] * 3 + ["ran"] * 4
    assert done[-1] == ("ran", "b", 7, (5, 1, 1), {"BK": 5})
    assert threading.current_thread() not in [thread for _, thread in prepared]
    assert sorted(name for name, _ in prepared) == ["a", "b"]


def test_what_fails_while_compiling_leaves_launches_as_they_were(prepared, pool):
    done: list[Any] = []

    def fails() -> None:
        launched("a", done, pool)
        raise MemoryError

    with pytest.raises(MemoryError), launch.compiled_at_once(fails, CUDA):
        pass
    launched("b", done, pool)
    assert [x[0] for x in done] == ["compiled", "ran"]


def test_on_the_cpu_nothing_is_compiled_first():
    done: list[Any] = []
    with launch.compiled_at_once(lambda: launched("a", done, []), torch.device("cpu")):
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


def test_addresses_of_several_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: X.get_device())
    other = SimpleNamespace(get_device=lambda: 1, device="cuda:1")
    with registration.on_device("op", X, None, X):
        pass
    with pytest.raises(ValueError, match="op: want all tensors on one device, got cpu, cuda:1"):
        registration.on_device("op", X, None, other)
