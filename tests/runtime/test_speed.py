import numpy as np
import pytest

from tcal_compiler.runtime.session import OnnxSession
from tcal_compiler.runtime.speed import STEPS, go_behind, measure_speed


def test_a_session_behind_a_context_is_as_large_as_one_that_read_it(shared_run):
    session = OnnxSession(shared_run / "onnx")
    session.prefill(list(range(20)))
    read = session.snapshot()
    go_behind(session, 20, batch=3)
    made = session.snapshot()
    assert made.length == session.length == 20 and made.mask.shape == (3, 20)
    assert [v.shape[1:] for v in made.values] == [v.shape[1:] for v in read.values]
    assert np.isfinite(session.forward(np.ones((3, 1), np.int64))).all()


def test_every_context_is_measured_that_the_session_has_room_for(shared_run, monkeypatch):
    session, ticks = OnnxSession(shared_run / "onnx"), iter(range(10_000))
    monkeypatch.setattr("tcal_compiler.runtime.speed.time.perf_counter", lambda: float(next(ticks)))
    longest = session.context_length - STEPS - 1
    rows = measure_speed(session, (4, longest, longest + 1))
    assert [r.context for r in rows] == [4, longest] and session.length == 0
    assert rows[0].prefill_tokens_per_second == pytest.approx(4) and rows[1].decode_seconds == pytest.approx(1)
