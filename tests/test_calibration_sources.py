"""Several calibration texts through the command line."""

from __future__ import annotations

import json

import pytest
from command_line import ASSETS, BYTES, SMALL, TINY, call, done, refused


@pytest.mark.slow
def test_two_texts_with_weights(tmp_path):
    whole = (ASSETS / "text" / "calibration.txt").read_text()
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text(whole[:20_000])
    second.write_text(whole[50_000:70_000])
    out, both = tmp_path / "run", ("--calib", f"{first}:0.75", "--calib", f"{second}:0.25")
    words = ("tcal", "calibrate", TINY, *BYTES, *SMALL, "--policy", "keep=0", "-o", out)
    refused(call(*words, "--calib", first, "--calib", first), "ConfigError", "names a file twice")
    refused(call(*words, "--calib", f"{first}:none"), "ConfigError", "'none' is no positive number")
    refused(call(*words, "--calib", first, "--calib", tmp_path / "c.txt"), "DataError", "c.txt", "no such file")
    assert not out.exists()
    done(*words, *both)
    manifest = json.loads((out / "tcal.json").read_text())
    assert manifest["config"]["calib"]["text"] == [f"{first}:0.75", f"{second}:0.25"]
    assert set(manifest["stages"]["calibrate"]["evidence"]["text"]) == {"a.txt", "b.txt"}
    for file in (first, second):
        refused(call("tcal", "eval", out, "--text", file), "DataError", "is the file that was calibrated on", file.name)
    done(*words, *both)
    assert json.loads((out / "tcal.json").read_text())["stages"]["calibrate"] == manifest["stages"]["calibrate"]
    done(*words, "--calib", first, "--calib", second)  # other weights: other rows
    assert json.loads((out / "tcal.json").read_text())["stages"]["calibrate"] != manifest["stages"]["calibrate"]


@pytest.mark.slow
def test_more_sequences_than_the_initialisation_uses(tmp_path):
    file, out = tmp_path / "c.toml", tmp_path / "run"
    words = ("tcal", "align", TINY, *BYTES, *SMALL, "--policy", "keep=0", "-o", out, "--config", file)
    file.write_text("calib.init_sequences = 1000\n")
    refused(call(*words), "ConfigError", "init_sequences is 1000, more than the")
    assert not out.exists()
    file.write_text("calib.init_sequences = 2\n")
    done(*words)
    stages = json.loads((out / "tcal.json").read_text())["stages"]
    first, last = (stages["align"]["evidence"]["curve"][i] for i in (0, -1))
    assert sum(last["held_out"].values()) < sum(first["held_out"].values())
    assert stages["calibrate"]["evidence"]["tokens"] == 2 * 48
