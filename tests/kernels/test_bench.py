"""The benchmarks' own code, at tiny shapes: every path of theirs that a CPU can take, ours in the interpreter too."""

from __future__ import annotations

import json
import sys
import types
from typing import Any

import pytest
import torch
from interpreter import interpreted, interpreter_or_skip

from tcal_compiler.kernels.bench import __main__ as bench
from tcal_compiler.kernels.bench import attention, gates, norm, peers, plain, report, rule, step, timing
from tcal_compiler.kernels.gated_delta_rule.reference import gated_delta_rule_reference

TINY = {"rule": "1,5,2,8", "step": "1,2,2,16", "norm": "2,6,2,16", "gates": "2,6,2,16", "attention": "1,40,2,16"}
KINDS = {
    "rule": {"forward", "both"},
    "step": {"core", "with norms"},
    "norm": {"forward", "backward"},
    "gates": {"l2", "l2, both", "gates", "gates, both"},
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
    path = tmp_path / "report.json"
    assert bench.main(["--ops", op, "--shapes", TINY[op], "--repeat", "3", "--json", str(path)]) == 0
    body = json.loads(path.read_text())
    assert {"device", "torch", "python", "packages", "commit", "date", "dtype", "repeat", "seed"} <= set(body)
    (result,) = body["results"]
    assert result["op"] == op and result["shape"] == [int(n) for n in TINY[op].split(",")]
    complete(result)
    shown = capsys.readouterr().out.splitlines()
    assert body["commit"] in shown[0] and "worst error" in shown[2] and shown[3].split()[0] == "tcal"
    assert not any("failed" in line for line in shown)


@interpreted
@pytest.mark.parametrize(("module", "name", "imported"), [
    (step, "kernel", "gated_delta_step_triton"), (norm, "kernels", "gated_rms_norm_triton"),
    (gates, "kernels", "delta_gates_backward_triton"), (attention, "kernels", "attention_statistics_triton"),
], ids=["step", "norm", "gates", "attention"])  # fmt: skip
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


RESULT = {
    "op": "step",
    "shape": (1, 1, 1, 1),
    "errors": {"y": 1e-3, "state": 1e-7},
    "errors_beside": {"pytorch": {"y": 5e-4, "state": 1e-7}, "fla": {"y": 2e-3, "failed": "no"}, "half": {"y": 4e-3}},
    "bounds": {"core": {"bytes": 1.0, "operations": 0.0, "bound_ms": 0.5}},
    "times": {
        "tcal": {"core": {"ms": 0.625, "low": 0.6, "high": 0.7, "peak_bytes": 2e6, "host_ms": 0.25}},
        "fla": {"core": {"ms": 1.25, "low": 1.2, "high": 1.3, "peak_bytes": 3e6}, "failed": "both: no"},
        "flash": {"forward": {"ms": 0.5, "low": 0.4, "high": 0.6}},
    },
}


def test_what_is_said_of_a_result():
    head, ours, fla, flash, pytorch, half = report.lines(RESULT)
    assert "worst error 1.0e-03 (y)" in head and "core 0.5000" in head
    assert "core 0.6250 [0.6000 0.7000] (80%) 2 MB, host 0.2500" in ours and "x" not in ours
    assert "2.00x 3 MB" in fla and "worst error 2.0e-03 (y) of its forward" in fla and "failed: both: no" in fla
    assert "failed" not in flash
    assert pytorch.split() == ["pytorch", "worst", "error", "5.0e-04", "(y)"] and "4.0e-03 (y)" in half
    said = report.summary([RESULT, RESULT | {"times": {"tcal": {"core": {"ms": 2.5}}, "fla": {"core": {"ms": 20.0}}}}])
    assert "step, core: 20% to 80% of the bound" in said
    assert "step, core: time of fla 2.00 to 8.00 times, geometric mean 4.00 of 2, of ours" in said
    assert "step, core: memory of fla 1.50 to 1.50 times, geometric mean 1.50 of 1, of ours" in said
    assert "step, core: time of flash, forward 0.80 to 0.80 times, geometric mean 0.80 of 1, of ours" in said
    errors = [line for line in said if "our errors" in line]
    assert [line.split(" times")[0] for line in errors] == [
        "step: our errors in results in the inputs' dtype 2.00 to 2.00",  # y, a rounded result of both
        "step: our errors in float32 results 1.00 to 1.00",
        "step: our errors in results in the inputs' dtype 0.50 to 0.50",
        "step: our errors in results in the inputs' dtype 0.25 to 0.25",
    ]
    assert errors[0].endswith("of pytorch's float32 computation") and errors[2].endswith("of fla's")
    wrong = {"op": "rule", "shape": (1,), "errors": {"o": float("nan")}, "wrong": "not timed"}
    assert report.summary([wrong]) == ["rule: NOT RIGHT at (1,): not timed"]


def test_tables(tmp_path, capsys):
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"device": "H100", "packages": {"triton": "3.6"}, "results": [RESULT]}))
    assert bench.main(["--table", str(path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "device H100, triton 3.6."
    times = shown.index("| shape | bound | tcal | fla | flash, forward |")
    assert shown[times + 2] == "| 1, 1, 1, 1 | 0.5000 | 0.6250 (80%) | 1.2500 (2.00x) | 0.5000 (0.80x) |"
    assert "| 1, 1, 1, 1 | 2 | 3 |" in shown
    assert "| 1, 1, 1, 1 | 1.0e-03 | 5.0e-04 | 2.0e-03 (forward) | 4.0e-03 |" in shown


def test_a_peer_that_refuses_is_told_with_each_kind():
    times: dict[str, Any] = {}
    timing.attempt(times, "fla", "forward", lambda: 1 / 0)
    timing.attempt(times, "fla", "both", lambda: {"ms": 1.0})
    timing.attempt(times, "fla", "more", lambda: [][0])
    assert times["fla"].pop("failed").startswith("forward: ZeroDivisionError") and times == {
        "fla": {"both": {"ms": 1.0}}
    }


def flashinfer_like(q, k, v, alpha, beta, *, initial_state, output_final_state, cu_seqlens):
    """FlashInfer's layout: tokens of all sequences in one row, decay itself, states [N, H, V, K]."""
    o, state = gated_delta_rule_reference(
        *(x.unsqueeze(0) for x in (q, k, v, alpha.log(), beta)),
        initial_state.mT, scale=q.shape[-1] ** -0.5, bounds=tuple(cu_seqlens.tolist()),
    )  # fmt: skip
    return o[0], state.mT


def test_peers_are_compared_and_wrong_ones_seen(monkeypatch):
    module = types.ModuleType("flashinfer.gdn_prefill")
    module.chunk_gated_delta_rule = flashinfer_like
    monkeypatch.setitem(sys.modules, "flashinfer", types.ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.gdn_prefill", module)
    inputs = rule.make_inputs(2, 70, 2, 16, torch.float32, "cpu")
    seeds = [torch.randn_like(inputs[2]), torch.randn_like(inputs[5])]
    half = peers.Peer("half", lambda *a: tuple(0.5 * x for x in rule.op(*a)))
    refuses = peers.Peer("refuses", peers.refused(ImportError("no libcuda")))
    ours, beside = rule.compare(inputs, seeds, 16**-0.5, [peers.flashinfer(), half, refuses])
    assert set(ours) == set(rule.NAMES) and max(ours.values()) < 1e-5
    assert set(beside["flashinfer"]) == {"o", "state"} and max(beside["flashinfer"].values()) < 1e-5
    assert set(beside["half"]) == set(rule.NAMES) and min(beside["half"].values()) == pytest.approx(0.5)
    assert "no libcuda" in beside["refuses"]["failed"]


def test_plain_pytorch_in_bfloat16():
    """Every product of the chunked path is rounded, and none by much; a state that nothing multiplies stays exact."""
    inputs = rule.make_inputs(2, 130, 2, 16, torch.bfloat16, "cpu")
    seeds = [torch.randn_like(inputs[2]), torch.randn_like(inputs[5])]
    exact = rule.forward_and_backward(*(list(rule.exactly(x)) for x in (inputs, seeds)), 0.25)
    with plain.Bfloat16Products():
        found = rule.forward_and_backward(inputs, seeds, 0.25)
    errors = rule.relative_errors(rule.NAMES, found, exact)
    assert all(2e-3 < error < 1e-2 for error in errors.values()), errors
    a, x = torch.full((1, 2, 2), 1 + 2**-12), torch.full((1, 2, 2), 1 + 2**-12)
    with plain.Bfloat16Products():
        assert torch.equal(torch.bmm(a, a), torch.full_like(a, 2.0))
        assert torch.equal(torch.bmm(a, a, out=torch.zeros_like(a)), torch.full_like(a, 2.0))
        assert torch.equal(torch.baddbmm(x, a, a, alpha=-1), x - 2)
        assert torch.equal(x.clone().baddbmm_(a, a), x + 2)


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
    shape = {"step": (2, 1, 2, 64), "attention": (1, 512, 2, 64)}.get(op, (1, 70, 2, 64))
    result = bench.OPS[op].time_shape(shape, torch.bfloat16, "cuda", 3)
    assert "wrong" not in result and set(result["times"]["tcal"]) == KINDS[op], result
