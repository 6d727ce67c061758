"""A run folder of a student with attention over the last tokens beside its states."""

from __future__ import annotations

import json

import pytest
import torch
from command_line import BYTES, HELD_OUT, TINY, call, done, refused

from tcal_compiler import StudentForCausalLM

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
