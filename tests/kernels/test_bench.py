"""The benchmarks' own code, at tiny shapes: every path of theirs that a CPU can take, ours in the interpreter too."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from interpreter import interpreted, interpreter_or_skip

from tcal_compiler.kernels.bench import __main__ as bench
from tcal_compiler.kernels.bench import attention, norm, step, timing

TINY = {"rule": "1,5,2,8", "step": "1,2,2,16", "norm": "2,6,2,16", "attention": "1,40,2,16"}
KINDS = {
    "rule": {"forward", "both"},
    "step": {"core", "with norms"},
    "norm": {"forward", "backward"},
    "attention": {"statistics", "output sums"},
}
on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="times the GPU where there is one")


def complete(result: dict[str, Any]) -> None:
    """Right results, a bound for each of our times, and no time that is missing."""
    assert "wrong" not in result and all(error < 1e-4 for error in result["errors"].values())
    assert set(result["times"]["tcal"]) == KINDS[result["op"]]
    assert set(result["bounds"]) <= KINDS[result["op"]] | {"forward"}
    for kinds in result["times"].values():
        assert all(t["low"] <= t["ms"] <= t["high"] and t["ms"] > 0 for t in kinds.values()), kinds
    assert all(least["bytes"] > 0 for least in result["bounds"].values())


@on_the_cpu
@pytest.mark.parametrize("op", bench.OPS)
def test_every_op(op, tmp_path, capsys):
    report = tmp_path / "report.json"
    assert bench.main(["--ops", op, "--shapes", TINY[op], "--repeat", "3", "--json", str(report)]) == 0
    (result,) = json.loads(report.read_text())["results"]
    assert result["op"] == op and result["shape"] == [int(n) for n in TINY[op].split(",")]
    complete(result)
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2 and "worst error" in shown[1] and "tcal: " in shown[1] and "failed" not in shown[1]


@interpreted
@pytest.mark.parametrize(("module", "name", "imported"), [
    (step, "kernel", "gated_delta_step_triton"), (norm, "kernels", "gated_rms_norm_triton"),
    (attention, "kernels", "attention_statistics_triton"),
], ids=["step", "norm", "attention"])  # fmt: skip
def test_the_kernels_are_what_is_timed(module, name, imported, monkeypatch):
    ours = getattr(module, name)("cuda")
    assert imported in {f.__name__ for f in (ours if isinstance(ours, tuple) else (ours,))}
    monkeypatch.setattr(module, name, lambda device: ours)
    op = next(op for op, each in bench.OPS.items() if each is module.BENCHMARK)
    with interpreter_or_skip():
        complete(module.time_shape(tuple(int(n) for n in TINY[op].split(",")), torch.float32, "cpu", 2))


@on_the_cpu
def test_a_wrong_result_is_not_timed(monkeypatch, capsys):
    right = step.kernel("cpu")

    def wrong(*args: Any, **given: Any) -> Any:
        y, state = right(*args, **given)
        return y * (1 + 1e-3), state

    monkeypatch.setattr(step, "kernel", lambda device: wrong)
    assert bench.main(["--ops", "step", "--shapes", TINY["step"]]) == 1
    assert "not timed" in capsys.readouterr().out


def test_bounds_are_what_must_be_moved(monkeypatch):
    assert step.least_bytes(64, 1, 16, 128, 2) == 64 * 16 * (2 * 4 * 128 * 128 + 5 * 2 * 128 + 8) + 4 * 16 * 128
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert timing.bound(3e9, 0, "cuda")["bound_ms"] == pytest.approx(1.0)
    assert timing.bound(1, 790e9, "cuda")["bound_ms"] == pytest.approx(1.0)
    assert "bound_ms" not in timing.bound(1, 1, "cpu")
    shown = timing.line(
        {
            "op": "step",
            "shape": (1, 1, 1, 1),
            "errors": {"y": 1e-3, "state": 1e-7},
            "bounds": {"core": {"bytes": 1.0, "operations": 0.0, "bound_ms": 0.5}},
            "times": {"tcal": {"core": {"ms": 0.625}}, "fla": {"failed": "no"}},
        }
    )
    assert "worst error 1.0e-03 (y)" in shown and "core 0.6250 (80%)" in shown and "fla:  failed" in shown


def test_every_default_shape_is_understood():
    for device in ("cpu", "cuda"):
        work = bench.parse([], device).work
        assert {op for op, _ in work} == set(bench.OPS)
    assert {(b, h) for b, _, h, d in (s for op, s in work if op == "step") if d == 128} >= {
        (b, h) for b in (1, 64, 256) for h in (16, 32)
    }
    assert {t for op, (_, t, *_) in work if op == "attention"} == {8192, 32768}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shapes", "1,1,1,1"], "one op"),
        (["--ops", "step", "--shapes", "1,1,1"], "want B,T,H,D"),
        (["--ops", "norm", "--shapes", "1,x,1,1"], "want S,N,H,D"),
        (["--ops", "stp"], "invalid choice"),
        (["--repeat", "1"], "2 runs"),
    ],
)
def test_arguments_that_do_not_fit(argv, message, capsys):
    with pytest.raises(SystemExit):
        bench.parse(argv, "cpu")
    assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("op", bench.OPS)
def test_on_the_gpu(op):
    """Ours runs, graphs included; peers may refuse."""
    shape = {"rule": (1, 70, 2, 64), "step": (2, 1, 2, 64), "norm": (1, 70, 2, 64), "attention": (1, 512, 2, 64)}[op]
    result = bench.OPS[op].time_shape(shape, torch.bfloat16, "cuda", 3)
    assert "wrong" not in result and set(result["times"]["tcal"]) == KINDS[op], result
