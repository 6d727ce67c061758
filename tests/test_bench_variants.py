"""examples/bench_variants.py on the student that the tests share: its table and what it counts."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path

import onnx
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import bench_onnx
import bench_variants
import profile_step

from tcal_compiler.runtime.session import OnnxSession

CONTEXTS = (8, 32)


@pytest.mark.slow
def test_every_variant_is_scored_and_timed(shared_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out.json"
    monkeypatch.setattr(bench_variants, "read_bandwidth", lambda: 1e9)  # the real one takes seconds
    words = ["bench", "--model", f"tiny={shared_run}", "--dtypes", "fp32", "int8", "--contexts", *map(str, CONTEXTS)]
    words += ["--steps", "2", "--turns", "1", "--sequences", "2", "--length", "32", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    bench_variants.main()
    found = json.loads(out.read_text())
    whole, int8 = (found["variants"][f"tiny {d}"] for d in ("fp32", "int8"))
    assert whole["kl"] == 0 < int8["kl"] < 0.1 and int8["size_mb"] < whole["size_mb"]
    session = OnnxSession(shared_run / "onnx", threads=1)
    for variant in ("tiny fp32", "tiny int8"):
        rows = found["variant_decode"][variant]
        assert set(rows) == set(map(str, CONTEXTS))
        for row in rows.values():
            assert row["speedup_over_first"] == 1 and row["median_ms"] > 0
            assert math.isclose(row["share_of_bound"], row["bound_ms"] / row["median_ms"], rel_tol=1e-2, abs_tol=1e-4)
    first, second = (found["variant_decode"]["tiny fp32"][str(c)]["moved_mb"] for c in CONTEXTS)
    growth = []
    for context in CONTEXTS:
        session.reset()
        session.prefill([1] * context)
        growth.append(session.state_bytes / 1e6)  # the recurrent states are as large behind both
    assert math.isclose(second - first, growth[1] - growth[0], abs_tol=1e-3)


def test_bytes_of_a_step(shared_run: Path):
    """Weights without tables, as stored; keys and values once, recurrent states in and out."""
    path = shared_run / "onnx/model.onnx"
    graph = onnx.load(path).graph
    sizes = {t.name: len(t.raw_data) for t in graph.initializer}
    tables = {n.input[0] for n in graph.node if n.op_type == "Gather"} & sizes.keys()
    others = {i for n in graph.node if n.op_type not in ("Gather", "GroupQueryAttention") for i in n.input}
    expected = sum(size for name, size in sizes.items() if name in others)
    assert bench_variants.weight_bytes(path) == expected < sum(sizes.values()) and tables
    session = OnnxSession(path, threads=1)
    session.prefill([1] * 7)
    shapes = zip(session.state_names, session.state_shapes(0), strict=True)
    recurrent = sum(4 * math.prod(shape) for name, shape in shapes if name.endswith(".recurrent_state"))
    assert session.step_bytes == session.state_bytes + recurrent


def test_turns_are_compared_with_themselves_and_contexts_may_be_longer_than_the_student_s(
    shared_run: Path, monkeypatch
):
    whole = OnnxSession(shared_run / "onnx", threads=1).context_length
    session = bench_onnx.opened(shared_run, whole + 100, 1)
    assert session.context_length == whole + 100

    def times(_, state, count):  # a machine that is three times as slow in its second turn
        turn.append(state.length)
        return [state.length * (1 if len(turn) <= 2 else 3)] * count

    turn: list[int] = []
    monkeypatch.setattr(bench_onnx, "step_times", times)
    rows = bench_onnx.measure({"tiny": session}, [8, whole + 50], 2, 2)["tiny"]
    assert turn == [8, whole + 50] * 2
    assert rows[str(whole + 50)]["over_first_context"] == pytest.approx((whole + 50) / 8)
    assert rows["8"]["over_first_context"] == 1 and rows["8"]["state_mb"] < rows[str(whole + 50)]["state_mb"]


def test_operators_of_a_step_are_those_of_the_graph_that_runs(shared_run: Path, tmp_path: Path):
    OnnxSession(shared_run / "onnx", threads=1, optimized_path=tmp_path / "run.onnx")
    runs = Counter(n.op_type for n in onnx.load(tmp_path / "run.onnx").graph.node)
    found = bench_onnx.operators(shared_run, 8, 2, 1)
    assert {kind: row["nodes"] for kind, row in found.items()} == runs
    assert all(row["ms"] > 0 for row in found.values())


def test_parts_of_a_step(shared_run: Path):
    """All that a step must read is in one of them, and each has nodes."""
    found = profile_step.parts(shared_run / "onnx", 20, 2, 1)
    assert sum(p["mb"] for p in found["parts"].values()) == pytest.approx(found["moved_mb"])
    assert all(p["nodes"] > 0 and p["ms"] > 0 for p in found["parts"].values()) and found["step_ms"] > 0


def test_operators_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(profile_step, "BEYOND_CACHES", 1.0)
    for block in (None, 32):
        row = profile_step.product(64, 32, block, 1)
        assert row["gb_s"] == pytest.approx(64 * 32 * (4 if block is None else 1 + 4 / 32) / row["us"] / 1e3)
    for measure in (profile_step.attention, profile_step.grouped):
        row = measure(4, 2, 16, 30, 1)
        assert row["gb_s"] == pytest.approx(2 * 2 * 30 * 16 * 4 / row["us"] / 1e3)
