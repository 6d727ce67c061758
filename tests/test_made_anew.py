"""A run folder in which an earlier stage was made anew, and what a later command keeps of its settings."""

from __future__ import annotations

import json
import shutil

import pytest
from command_line import ASSETS, BYTES, TINY, call, done, refused

from tcal_compiler.report.facts import Facts
from tcal_compiler.runtime.manifest import parse_manifest

FEW = ("--calib-sequences", "6", "--calib-length", "48", "--batch", "2", "--local-window", "8")


def said(*words: object) -> str:
    """Everything that a command prints which must succeed."""
    result = call(*words)
    assert result.code == 0, result
    return result.out + result.err


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder, whole = tmp_path_factory.mktemp("texts"), (ASSETS / "text" / "calibration.txt").read_text()
    for i, name in enumerate(("first.txt", "second.txt", "third.txt")):
        (folder / name).write_text(whole[i * 30_000 : i * 30_000 + 8_000])
    return folder


@pytest.fixture(scope="module")
def stages(tmp_path_factory, texts):
    """A run folder made stage by stage; options are given once."""
    out = tmp_path_factory.mktemp("anew") / "run"
    done("tcal", "plan", TINY, *BYTES, *FEW, "--calib", texts / "first.txt", "--policy", "keep=0", "-o", out)
    assert "goes on with its own settings" in said("tcal", "align", TINY, "--align-steps", "3", "-o", out)
    return out


def manifest(out):
    return parse_manifest((out / "tcal.json").read_bytes(), str(out))


def test_settings_and_tokenizer_are_kept(stages, texts):
    config, record = manifest(stages).config, manifest(stages).stages["calibrate"]
    assert config["calib"]["text"] == str(texts / "first.txt")
    assert (config["calib"]["sequences"], config["calib"]["length"], config["align"]["batch"]) == (6, 48, 2)
    assert config["align"]["steps"] == 3 and set(record.evidence["text"]) == {"first.txt"}


@pytest.mark.slow
def test_a_stage_that_runs_again_says_why(stages, tmp_path):
    out = shutil.copytree(stages, tmp_path / "run")
    lines = said("tcal", "align", TINY, "--align-steps", "4", "-o", out)
    assert "stage align runs again: its settings changed" in lines and "stage calibrate runs again" not in lines
    lines = said("tcal", "calibrate", TINY, "--init", "naive", "-o", out)
    assert "stage calibrate runs again: its settings changed" in lines
    assert manifest(out).made_before("align") == "calibrate"
    lines = said("tcal", "align", TINY, "-o", out)
    assert "stage align runs again: what it is made from changed" in lines
    assert manifest(out).made_before("align") == ""


@pytest.mark.slow
def test_a_student_of_before_is_not_scored_as_of_now(stages, texts, tmp_path):
    """Its calibration text is no longer the one on record, so that nothing could refuse a score on it."""
    out, first = shutil.copytree(stages, tmp_path / "run"), texts / "first.txt"
    done("tcal", "export", TINY, "-o", out)
    done("tcal", "export", out, "--dtype", "fp16")
    held_out = ("tcal", "eval", out, "--text", texts / "third.txt", "--sequences", "2", "--student-only", "--quiet")
    done(*held_out)
    refused(call("tcal", "eval", out, "--text", first), "DataError", "is the file that was calibrated on")
    assert Facts("run", manifest(out)).scores
    done("tcal", "calibrate", TINY, "--calib", texts / "second.txt", "-o", out)
    again = "is of before calibrate was made anew"
    refused(call("tcal", "eval", out, "--text", first), "RunFolderError", again, "tcal-compile")
    refused(call("tcal", "generate", out, "a"), "RunFolderError", again)
    refused(call("tcal", "export", out, "--dtype", "int8"), "RunFolderError", again)
    checked = call("tcal", "verify", out)
    assert checked.code == 1 and "stage align: an earlier one was made anew since" in checked.out
    facts = Facts("run", manifest(out))
    assert not facts.scores and not facts.held_out
    assert "before calibrate was made anew" in (out / "report.md").read_text()
    done("tcal", "export", TINY, "-o", out)
    refused(
        call("tcal", "generate", out, "a", "--dtype", "fp16"), "RunFolderError", "its fp16 student is of before export"
    )
    assert not Facts("run", manifest(out)).scores  # of the student before
    refused(call(*held_out[:3], "--text", texts / "second.txt"), "DataError", "is the file that was calibrated on")
    done(*held_out)
    assert Facts("run", manifest(out)).scores


def test_records_that_name_each_other_end(stages, tmp_path):
    out = shutil.copytree(stages, tmp_path / "run")
    data = json.loads((out / "tcal.json").read_text())
    for a, b in (("plan", "align"), ("align", "plan")):
        data["stages"][a]["made_from"] = {b: manifest(out).stage_hash(b)}
    (out / "tcal.json").write_text(json.dumps(data))
    assert manifest(out).made_before("align") == ""


def test_settings_that_are_none_are_a_typed_error(stages, tmp_path):
    out = shutil.copytree(stages, tmp_path / "run")
    data = json.loads((out / "tcal.json").read_text())
    for at, value, error in (("calib", "x", "ConfigError"), ("align", {"steps": "many"}, "ConfigError")):
        (out / "tcal.json").write_text(json.dumps(data | {"config": data["config"] | {at: value}}))
        refused(call("tcal", "align", TINY, "-o", out), error, at)
    data["stages"]["plan"]["evidence"]["info"] = ["bytes"]
    (out / "tcal.json").write_text(json.dumps(data))
    refused(call("tcal", "align", TINY, "-o", out), "RunFolderError", "the manifest is damaged")
    refused(call("tcal", "align", TINY, "-o", tmp_path / ("a" * 300)), "ConfigError", "File name too long")
    refused(call("tcal", "report", tmp_path / ("a" * 300)), "RunFolderError", "no such run folder")


def test_a_run_folder_does_not_make_its_function_run(stages, tmp_path):
    out = shutil.copytree(stages, tmp_path / "run")
    data = json.loads((out / "tcal.json").read_text())
    data["teacher"]["source"] = "os:getcwd"
    (out / "tcal.json").write_text(json.dumps(data))
    asked = call("tcal", "distill", out, "--steps", "1")
    refused(asked, "RunFolderError", "made by the function os:getcwd", "--teacher os:getcwd")
