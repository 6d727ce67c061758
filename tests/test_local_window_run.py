"""A run folder of a student with attention over the last tokens beside its states."""

from __future__ import annotations

import json

import pytest
import torch
from command_line import BYTES, HELD_OUT, TINY, call, contents, done, refused

from tcal_compiler import StudentForCausalLM
from tcal_compiler.errors import RunFolderError
from tcal_compiler.runtime.manifest import hash_json

FEW = ("--policy", "keep=0", "--calib-sequences", "6", "--calib-length", "48", "--align-steps", "3", "--batch", "2")


@pytest.mark.slow
def test_it_is_recorded_followed_and_verified(tmp_path):
    out = tmp_path / "run"
    done("tcal-compile", TINY, *BYTES, *FEW, "--local-window", "8", "-o", out)
    record = json.loads((out / "tcal.json").read_text())
    assert record["plan"]["local_window"] == 8 == record["config"]["local_window"]
    names = {row["layer"]: row.get("local_window") for row in record["stages"]["plan"]["evidence"]["sites"]}
    assert set(names.values()) == {8}
    printed = done("tcal", "verify", out)
    assert "student.pt2 equals the graph with weights.safetensors" in printed and "FAIL" not in printed
    assert done("tcal", "generate", out, "The", "--max-new-tokens", "4")
    assert "with softmax attention over the last 8 tokens" in (out / "report.md").read_text()
    assert "KL" in done("tcal", "eval", out, "--text", HELD_OUT, "--sequences", "4", "--length", "48")
    ids = torch.randint(0, 256, (1, 30), generator=torch.Generator().manual_seed(0))
    model, program = StudentForCausalLM.from_pretrained(out), torch.export.load(out / "student.pt2").module()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, program(ids))
    both = [model.generate(ids, max_new_tokens=20, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*both) and both[0].shape == (1, 50)
    model.save_pretrained(tmp_path / "folder")
    kept = StudentForCausalLM.from_pretrained(tmp_path / "folder")
    assert torch.equal(kept.generate(ids, max_new_tokens=20, do_sample=False), both[0])
    again = call("tcal-compile", TINY, *BYTES, *FEW, "--local-window", "8", "-o", out)
    assert again.code == 0 and "runs again" not in again.err
    other = call("tcal", "calibrate", TINY, *BYTES, "--local-window", "4", "-o", out)
    assert other.code == 0 and "stage calibrate runs again" in other.err


def planned(out, *words):
    done("tcal", "plan", TINY, *BYTES, "--calib-sequences", "2", "--calib-length", "96", "--quiet", "-o", out, *words)
    record = json.loads((out / "tcal.json").read_text())
    sites = {s.get("local_window") for s in record["stages"]["plan"]["evidence"]["sites"]}
    return record["config"]["local_window"], record["plan"].get("local_window"), sites


def test_it_is_the_default_and_settings_not_the_plan_say_it(tmp_path):
    assert planned(tmp_path / "usual") == (64, 64, {64})
    assert planned(tmp_path / "none", "--local-window", "0") == (0, None, {None})
    assert planned(tmp_path / "none") == (0, None, {None})  # goes on with its own
    plan = tmp_path / "none" / "plan.toml"
    assert planned(tmp_path / "other", "--plan", plan) == (64, 64, {64})
    assert planned(tmp_path / "none", "--local-window", "8", "--plan", plan) == (8, 8, {8})


def test_a_window_below_nothing_is_refused(tmp_path):
    refused(
        call("tcal-compile", TINY, *FEW, "--local-window", "-1", "-o", tmp_path / "run"), "ConfigError", "local_window"
    )
    assert not (tmp_path / "run").exists()


def _sites_too(record, window):
    """As if all of it had been edited, but one site."""
    record["plan"]["local_window"] = window
    record["stages"]["plan"]["config_hash"] = hash_json(record["plan"])
    for site in record["stages"]["plan"]["evidence"]["sites"][1:]:
        site["local_window"] = window


DAMAGE = {
    "negative": (lambda r: r["plan"].update(local_window=-5), '"local_window": -5'),
    "text": (lambda r: r["plan"].update(local_window="64"), '"local_window": "64"'),
    "beyond the context": (lambda r: r["plan"].update(local_window=100_000), '"local_window": 100000'),
    "missing": (lambda r: r["plan"].pop("local_window"), "is not the one that stage plan made"),
    "another": (lambda r: r["plan"].update(local_window=32), '"local_window": 32'),
    "not that of a site": (lambda r: _sites_too(r, 32), "attention 0 8 and not 32"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_window_is_refused_by_every_command_when_it_reads_the_folder(finished, name, monkeypatch):
    monkeypatch.setattr("tcal_compiler.source.load_teacher", None)  # before anything is loaded
    damage, seen = DAMAGE[name]
    record = json.loads((finished / "tcal.json").read_text())
    damage(record)
    (finished / "tcal.json").write_text(json.dumps(record))
    before = contents(finished)
    for words in (
        *(("tcal", stage, TINY, *BYTES, "-o", finished) for stage in ("plan", "align", "export")),
        ("tcal-compile", TINY, *BYTES, "-o", finished),
        ("tcal", "export", finished, "--dtype", "fp16"),
        ("tcal", "distill", finished, "--steps", "1"),
        ("tcal", "eval", finished, "--text", HELD_OUT),
        ("tcal", "generate", finished, "The"),
        ("tcal", "report", finished),
        ("tcal", "compare", finished, finished),
        ("tcal", "verify", finished),
    ):
        refused(call(*words), "RunFolderError", "the manifest is damaged", seen, "restore the file")
    with pytest.raises(RunFolderError, match="the manifest is damaged"):
        StudentForCausalLM.from_pretrained(finished)
    assert contents(finished) == before
