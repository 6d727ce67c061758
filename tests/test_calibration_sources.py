"""Several calibration texts through the command line."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from command_line import ASSETS, BYTES, SMALL, TINY, call, done, refused

from tcal_compiler import Config
from tcal_compiler.api import prepare
from tcal_compiler.progress import Progress
from tcal_compiler.runtime.repeats import repeat_stretches
from tcal_compiler.runtime.tokenizer import ByteTokenizer


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


def test_repeats_of_the_configuration_are_in_the_rows(tmp_path):
    calib = {"sequences": 2, "length": 64, "holdout": 1, "repeats": 0.5}
    job = prepare(
        TINY,
        out=tmp_path / "run",
        config=Config.model_validate({"calib": calib}),
        tokenizer="bytes",
        allow_pickle=False,
        plan=None,
        until="plan",
        device="cpu",
        progress=Progress(quiet=True),
    )
    plain = replace(job.text, repeats=0.0).sequences(ByteTokenizer(), count=3, length=64)
    assert torch.equal(job.ids, repeat_stretches(plain, 0.5)) and not torch.equal(job.ids, plain)


def test_repeats_that_are_no_share_are_refused(tmp_path):
    file = tmp_path / "c.toml"
    for repeats in ("0.6", "-1", "nan", "true"):
        file.write_text(f"calib.repeats = {repeats}\n")
        words = ("tcal", "plan", TINY, *BYTES, "-o", tmp_path / "run", "--config", file)
        refused(call(*words), "ConfigError", "calib.repeats")
