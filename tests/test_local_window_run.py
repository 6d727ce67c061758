"""A run folder of a student with attention over the last tokens beside its states."""

from __future__ import annotations

import json

import pytest
from command_line import BYTES, TINY, call, done, refused

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
    again = call("tcal-compile", TINY, *BYTES, *FEW, "--local-window", "8", "-o", out)
    assert again.code == 0 and "runs again" not in again.err
    other = call("tcal", "calibrate", TINY, *BYTES, "--local-window", "4", "-o", out)
    assert other.code == 0 and "stage calibrate runs again" in other.err


def test_a_window_below_nothing_is_refused(tmp_path):
    refused(
        call("tcal-compile", TINY, *FEW, "--local-window", "-1", "-o", tmp_path / "run"), "ConfigError", "local_window"
    )
    assert not (tmp_path / "run").exists()
