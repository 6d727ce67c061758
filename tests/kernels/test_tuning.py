"""The table of measured launch settings: what is looked up, how it is searched for, and what ships."""

from __future__ import annotations

import json
import time
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from interpreter import interpreted, interpreter_or_skip

from tcal_compiler.kernels import tuning
from tcal_compiler.kernels.bench import __main__ as bench

pytest.importorskip("triton")

from tcal_compiler.kernels.bench import tune
from tcal_compiler.kernels.gated_delta_rule import triton_tiles
from tcal_compiler.kernels.gated_delta_step import triton_kernel

BOTH = ("forward", "backward")


def cost(fields: dict[str, int], kinds: tuple[str, ...]) -> float | None:
    """Least at warps 8 and stages 3; two stages do not run with 8 warps, and other warps hardly matter. The forward
    alone is faster with eight warps of its own."""
    if fields.get("warps") == 8 and fields.get("stages") == 2:
        return None
    own = (fields.get("read_warps") == 8) * (1 if kinds == BOTH else 3)
    return 10 - own - 2 * (fields.get("warps") == 8) - (fields.get("stages") == 3) - 0.01 * fields.get("solve_warps", 0)


def test_search_takes_what_is_clearly_faster_and_runs():
    trials = [
        tune.Trial(BOTH, tune.one("solve_warps", 1, 2)),
        tune.Trial(BOTH, ({"warps": 8, "stages": 2}, {"warps": 8})),
        tune.Trial(BOTH, tune.one("stages", 1, 2, 3)),
        tune.Trial(("forward",), tune.one("read_warps", 4, 8)),
    ]
    best = {"warps": 8, "stages": 3, "read_warps": 8}
    assert list(tune.search(trials, cost)) == [{}, {"warps": 8}, {"warps": 8, "stages": 3}, best]
    assert list(tune.search(trials[2:3], lambda fields, kinds: cost(fields | {"warps": 8}, kinds))) == [{"stages": 3}]
    assert list(tune.search(trials, cost, until=0)) == [{}] * 4
    with pytest.raises(RuntimeError, match="without a table"):
        list(tune.search(trials, lambda fields, kinds: None))


TARGETS = (
    tune.Rule(torch.float32, ((1, 20, 2, 16), (2, 17, 1, 16))),
    tune.Step(torch.float32, ((1, 2, 2, 16),)),
    tune.NormedStep(torch.float32, ((1, 2, 2, 16),)),
)


@interpreted
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.op)
def test_a_setting_is_measured_where_its_results_are_the_usual_ones(target, monkeypatch, capsys):
    table: dict[str, dict[str, dict[str, int]]] = {}
    monkeypatch.setattr(tuning, "table", lambda: table)
    monkeypatch.setattr(tuning, "place", lambda device: "here")
    monkeypatch.setattr(tuning, "tuned", lambda *_: {})
    monkeypatch.setattr(tune, "_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(tune, "median_in_graph", lambda runs, *_: {"ms": float(len(runs))})
    monkeypatch.setattr(tune.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(type(target), "errors", lambda *_: {"o": 0.0})
    measure, kinds = tune.Measure(target, 2), target.trials()[0].kinds
    with interpreter_or_skip():
        assert tune.prepare(target, {}, tune.parts(target, kinds)) == ""
        assert measure({}, kinds) == pytest.approx(1.0)
    assert table == {"here": {}}
    wrong = next(iter(measure.expected))
    measure.expected[wrong] = tuple(x + 1 for x in measure.expected[wrong])
    assert measure({}, kinds) is None and f"at {wrong[0]}" in capsys.readouterr().out
    monkeypatch.setattr(type(target), "errors", lambda *_: 1 / 0)
    assert measure({}, kinds) is None and "ZeroDivision" in tune.prepare(target, {}, [None])


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="compiles where there is a GPU")
def test_what_does_not_run_in_a_process_of_its_own_is_left_out(capsys):
    """Without a GPU that is everything; the search itself goes on without it."""
    failed = tune.prepare_all(TARGETS[1:2], time.monotonic() + 60)
    candidates = [c for trial in TARGETS[1].trials() for c in trial.candidates]
    assert set(failed) == {(TARGETS[1].key, tune.spelled(c)) for c in [{}, *candidates]}
    assert all("CUDA" in why or "NVIDIA" in why for why in failed.values()), failed
    late = tune.prepare_all(TARGETS[1:2], time.monotonic())
    assert set(late.values()) == {"not compiled in time"}


def test_one_target_for_every_operator_and_head_dim():
    work = [("rule", (8, 9, 1, 64)), ("rule", (1, 9, 1, 128)), ("step", (1, 1, 2, 128)), ("rule", (2, 9, 1, 64))]
    found = [(type(t), t.shapes) for t in tune.targets_of(work, torch.bfloat16)]
    steps = [(kind, ((1, 1, 2, 128),)) for kind in (tune.Step, tune.NormedStep)]
    assert found == [*steps, (tune.Rule, ((1, 9, 1, 128),)), (tune.Rule, ((8, 9, 1, 64), (2, 9, 1, 64)))]


def test_an_entry_holds_for_its_card_triton_dtype_and_dims_alone(monkeypatch):
    table = {"Card A, Triton 3.6": {"gated_delta_rule, bfloat16, 64, 64": {"solve_warps": 2}}}
    monkeypatch.setattr(tuning, "table", lambda: table)
    monkeypatch.setattr(tuning, "place", lambda device: device.name)

    def found(card: str = "Card A, Triton 3.6", dtype=torch.bfloat16, dims=(64, 64)) -> dict[str, int]:
        return tuning.tuned("gated_delta_rule", dtype, SimpleNamespace(type="cuda", name=card), *dims)

    assert found() == {"solve_warps": 2}
    assert not found("Card B, Triton 3.6") and not found("Card A, Triton 3.9")
    assert not found(dtype=torch.float32) and not found(dims=(64, 128))
    assert not tuning.tuned("gated_delta_rule", torch.bfloat16, torch.device("cpu"), 64, 64)


def test_kernels_take_what_the_table_says(monkeypatch):
    q = torch.zeros(1, 1, 1, 64)
    sizes = triton_tiles.sizes_of(q, q)
    usual = triton_tiles.setting_for(sizes)
    monkeypatch.setattr(triton_tiles, "tuned", lambda *_: {"solve_warps": 2, "key_part": 32})
    assert triton_tiles.setting_for(sizes) == replace(usual, solve_warps=2, key_part=32)


def test_candidates_and_the_table_that_ships_have_known_fields():
    kinds = {kind.op: kind for kinds in tune.TARGETS.values() for kind in kinds}
    known = {
        op: {"apart", *triton_kernel.Tile._fields} if "step" in op else {f.name for f in fields(triton_tiles.Setting)}
        for op in kinds
    }
    for op, kind in kinds.items():
        for trial in kind(torch.bfloat16, ((1, 1, 1, 128),)).trials():
            assert trial.candidates and all(set(c) <= known[op] for c in trial.candidates)
    for entries in json.loads(tuning.TABLE.read_text()).values():
        for name, chosen in entries.items():
            assert set(chosen) <= known[name.split(", ")[0]], name


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 64), (torch.float16, 64), (torch.bfloat16, 256)], ids=str)
def test_float32_kernels_of_gradients_never_get_eight_warps(dtype, dim):
    """The suspect of illegal memory accesses (docs/kernels.md); inputs of these dtypes are widened to float32."""

    def tried(dtype: torch.dtype, dim: int) -> set[int]:
        candidates = [c for trial in tune.Rule(dtype, ((1, 1, 1, dim),)).trials() for c in trial.candidates]
        return {c["pair_warps"] for c in candidates if "pair_warps" in c}

    assert tried(dtype, dim) == {2} and tried(torch.bfloat16, 64) == {2, 8}


@pytest.mark.skipif(torch.cuda.is_available(), reason="tunes where there is a GPU")
def test_tuning_needs_a_gpu(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--tune"])
    assert "needs a CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
def test_tuning_on_the_gpu(monkeypatch, tmp_path, capsys):
    """The best of some candidates is written and then used; a wrong setting is not timed."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    monkeypatch.setattr(tuning, "table", lambda: table)
    monkeypatch.setattr(tune.Rule, "trials", lambda self: (tune.Trial(("forward",), tune.one("solve_warps", 1, 4)),))
    monkeypatch.setattr(tune, "prepare_all", lambda *_: {})  # other processes would read the table that ships
    monkeypatch.setattr(tune, "GAIN", -10.0)  # anything is clearly faster
    path = tmp_path / "table.json"
    given = ["--tune", "--ops", "rule", "--shapes", "1,300,2,64", "--repeat", "3", "--json", str(path)]
    assert bench.main(given) == 0
    (entries,) = json.loads(path.read_text()).values()
    (chosen,) = entries.values()
    x = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16, device="cuda")
    assert triton_tiles.setting_for(triton_tiles.sizes_of(x, x)).solve_warps == chosen["solve_warps"]
    assert capsys.readouterr().out.count(" ms of ") == 3
    monkeypatch.setattr(tune.Rule, "errors", lambda *_: {"o": 1.0})
    with pytest.raises(RuntimeError, match="without a table"):
        bench.main(given)
