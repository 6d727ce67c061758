"""The table of measured launch settings: what is looked up, how it is searched for, and what ships."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from tcal_compiler.kernels import tuning
from tcal_compiler.kernels.bench import __main__ as bench

pytest.importorskip("triton")

from tcal_compiler.kernels.bench import tune
from tcal_compiler.kernels.gated_delta_rule import triton_tiles


def cost(fields: dict[str, int]) -> float | None:
    """Least at warps 8 and stages 3; two stages do not run with 8 warps, and other warps hardly matter."""
    if fields.get("warps") == 8 and fields.get("stages") == 2:
        return None
    return 10 - 2 * (fields.get("warps") == 8) - (fields.get("stages") == 3) - 0.01 * (fields.get("solve_warps") == 2)


def test_search_takes_what_is_clearly_faster_and_runs():
    values = {"solve_warps": (1, 2), "warps": (4, 8), "stages": (1, 2, 3)}
    assert tune.search(values, cost) == {"warps": 8, "stages": 3}
    assert tune.search({"stages": (1, 2)}, cost) == {}
    with pytest.raises(RuntimeError, match="without a table"):
        tune.search(values, lambda fields: None)


def test_an_entry_holds_for_its_card_triton_dtype_and_dims_alone(monkeypatch):
    table = {"Card A, Triton 3.6": {"gated_delta_rule, bfloat16, 64, 64": {"solve_warps": 2}}}
    monkeypatch.setattr(tuning, "table", lambda: table)
    monkeypatch.setattr(tuning, "place", lambda device: device)

    def found(card: str = "Card A, Triton 3.6", dtype=torch.bfloat16, dims=(64, 64)) -> dict[str, int]:
        return tuning.tuned("gated_delta_rule", SimpleNamespace(is_cuda=True, device=card, dtype=dtype), *dims)

    assert found() == {"solve_warps": 2}
    assert not found("Card B, Triton 3.6") and not found("Card A, Triton 3.9")
    assert not found(dtype=torch.float32) and not found(dims=(64, 128))
    assert not tuning.tuned("gated_delta_rule", torch.zeros(1, dtype=torch.bfloat16), 64, 64)  # no GPU


def test_kernels_take_what_the_table_says(monkeypatch):
    q = torch.zeros(1, 1, 1, 64)
    usual = triton_tiles.setting_for(q, q)
    monkeypatch.setattr(triton_tiles, "tuned", lambda *_: {"solve_warps": 2, "key_part": 32})
    assert triton_tiles.setting_for(q, q) == dataclasses.replace(usual, solve_warps=2, key_part=32)


def test_the_table_that_ships_has_known_fields():
    fields = {f.name for f in dataclasses.fields(triton_tiles.Setting)}
    assert set(tune.VALUES) <= fields
    for entries in json.loads(tuning.TABLE.read_text()).values():
        for name, chosen in entries.items():
            op, _, *dims = name.split(", ")
            allowed = tune.values_for(int(dims[0]))
            assert op == tune.OP and all(value in allowed[field] for field, value in chosen.items()), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="tunes where there is a GPU")
def test_tuning_needs_a_gpu(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--tune"])
    assert "needs a CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
def test_tuning_on_the_gpu(monkeypatch, tmp_path, capsys):
    """The heads' own best of two values is written and then used; a wrong setting is not timed."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    monkeypatch.setattr(tuning, "table", lambda: table)
    monkeypatch.setattr(tune, "VALUES", {"solve_warps": (1, 4)})
    monkeypatch.setattr(tune, "GAIN", -10.0)  # anything is clearly faster
    path = tmp_path / "table.json"
    assert bench.main(["--tune", "--shapes", "1,300,2,64", "--repeat", "3", "--json", str(path)]) == 0
    (entries,) = json.loads(path.read_text()).values()
    (fields,) = entries.values()
    x = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16, device="cuda")
    assert triton_tiles.setting_for(x, x).solve_warps == fields["solve_warps"]
    assert capsys.readouterr().out.count(" ms of ") == 3
    monkeypatch.setattr(tune, "_errors", lambda *_: {"o": 1.0})
    with pytest.raises(RuntimeError, match="without a table"):
        bench.main(["--tune", "--shapes", "1,300,2,64", "--repeat", "3", "--json", str(path)])
