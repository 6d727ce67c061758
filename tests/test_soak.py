"""tests/soak.py in small: right answers, memory, and that it sees sessions which share a state or are never freed."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import soak

from tcal_compiler.runtime.session import OnnxSession


def test_answers_are_single_answers_and_sessions_are_freed(shared_run, monkeypatch):
    made, fork = weakref.WeakSet[OnnxSession](), OnnxSession.fork

    def noted(self: OnnxSession) -> OnnxSession:
        made.add(other := fork(self))
        return other

    monkeypatch.setattr(OnnxSession, "fork", noted)
    seen = soak.run(shared_run / "onnx", calls=50, sessions=10, seed=2, requests=16, samples=5)
    assert seen.wrong == [] and seen.calls >= 50 and seen.sessions >= 10
    assert min(seen.forks, seen.restored, seen.from_disk, seen.in_batches) > 0 and seen.tokens > 400
    gc.collect()
    assert len(made) == 0, "sessions that nothing uses are still there"
    assert seen.grown() < soak.BOUND


@pytest.mark.slow
def test_a_shared_state_and_a_leak_are_seen(shared_run, monkeypatch):
    kept: list[object] = []
    monkeypatch.setattr(OnnxSession, "fork", lambda self: (kept.append(np.ones(1 << 19)), self)[1])  # 4 MiB
    seen = soak.run(shared_run / "onnx", calls=60, sessions=40, seed=1, requests=8, samples=5)
    assert seen.wrong != [] and seen.grown() > 60 << 20
