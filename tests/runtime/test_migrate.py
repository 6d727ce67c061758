"""Manifests of earlier versions: read in the present one, with what they do not say told or counted as unknown.

tests/manifests holds what earlier programs wrote for the teacher `examples.tiny_torch_teacher:factory` with
`--tokenizer bytes --policy keep=0 --align-steps 2 --calib-sequences 6 --calib-length 48 --batch 2`:
version1-first.json commit a085977, version1-last-without-made-from.json commit faf2025, version1-made-from.json commit
cbaee3a after `tcal eval`.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tcal_compiler.config import Config, load_config
from tcal_compiler.errors import RunFolderError
from tcal_compiler.recorded import settings_before
from tcal_compiler.report.compare import _settings
from tcal_compiler.report.facts import Facts
from tcal_compiler.report.sections import configuration
from tcal_compiler.runtime.manifest import SCHEMA_VERSION, Manifest, parse_manifest
from tcal_compiler.runtime.run_folder import RunFolder

MANIFESTS = sorted((Path(__file__).parents[1] / "manifests").glob("*.json"))
CHAIN = ("plan", "calibrate", "align", "distill", "export")


def parse(data: Any) -> Manifest:
    return parse_manifest(json.dumps(data).encode(), "tcal.json")


def without_made_from(data: dict[str, Any]) -> dict[str, Any]:
    stages = {n: {k: v for k, v in r.items() if k != "made_from"} for n, r in data["stages"].items()}
    return data | {"schema_version": 1, "stages": stages}


def test_every_earlier_version_has_a_manifest_that_it_wrote():
    found = {json.loads(f.read_text())["schema_version"] for f in MANIFESTS}
    assert found == set(range(1, SCHEMA_VERSION))


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda f: f.stem)
def test_an_earlier_manifest_is_read_whole(file):
    data = json.loads(file.read_text())
    manifest = parse(data)
    assert manifest.schema_version == SCHEMA_VERSION and list(manifest.stages) == list(data["stages"])
    chain = [n for n in CHAIN if n in manifest.stages]
    for before, name in pairwise(chain):
        assert manifest.stages[name].made_from == {before: manifest.stage_hash(before)}
    assert [manifest.made_before(n) for n in manifest.stages] == [""] * len(data["stages"])
    for name, record in data["stages"].items():
        kept = manifest.stages[name].model_dump(mode="json", exclude={"made_from"})
        assert kept == {k: v for k, v in record.items() if k != "made_from"}
    again = manifest.model_dump(mode="json")
    assert parse(again) == manifest and {n: again[n] for n in data if n not in ("schema_version", "stages")} == {
        n: data[n] for n in data if n not in ("schema_version", "stages")
    } | {"config": data["config"] | {"local_window": 0, "align": data["config"]["align"] | {"near_error": 0.0}}}


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda f: f.stem)
def test_a_folder_of_before_there_were_windows_goes_on_without(file, tmp_path):
    """Its settings, where none is given, its place in a comparison and the file for --config."""
    (tmp_path / "tcal.json").write_bytes(file.read_bytes())
    settings, _ = settings_before(tmp_path)
    assert load_config(None, {}, settings).local_window == 0 != Config().local_window
    assert load_config(None, {}, settings).align.near_error == 0 != Config().align.near_error
    run = Facts("old", parse(json.loads(file.read_text())))
    assert _settings(run)["local_window"] == "0" and "local_window = 0" in configuration(run)


def test_what_version_1_left_out_is_what_its_later_programs_wrote():
    data = json.loads(next(f for f in MANIFESTS if f.stem == "version1-made-from").read_text())
    told = parse(without_made_from(data)).stages
    assert {n: r.made_from for n, r in told.items()} == {n: r["made_from"] for n, r in data["stages"].items()}
    assert len(told["report"].made_from) == 6 and told["eval"].made_from.keys() == {"export"}


@pytest.mark.parametrize("stage, stale", [("plan", CHAIN[1:]), ("align", CHAIN[3:]), ("export", ())])
def test_a_stage_that_ended_after_those_that_read_it_makes_them_count_as_made_before(stage, stale):
    data = json.loads(next(f for f in MANIFESTS if f.stem == "version1-last-without-made-from").read_text())
    data["stages"][stage]["finished_at"] = "2026-11-26T23:59:59+00:00"
    manifest = parse(data)
    assert tuple(n for n in CHAIN if manifest.made_before(n)) == stale


def open_(path: Path) -> RunFolder:
    return RunFolder.create_or_open(path, teacher_fingerprint="f", teacher_source="t", config_json={})


def work(path: Path) -> list[str]:
    """Stages that had to run, of a plan and a calibration that is made from it."""
    ran = []
    with open_(path) as run:
        for name, inputs in (("plan", lambda: {}), ("calibrate", lambda: {"plan": run.stage_hash("plan"), "text": 0})):
            with run.stage(name, config={}, inputs=inputs()) as stage:  # as the plan of a new folder
                if not stage.done:
                    (stage.dir / name).write_text(name)
                    ran.append(name)
    return ran


def test_a_reader_leaves_an_earlier_manifest_and_a_writer_brings_it_up(tmp_path):
    file = tmp_path / "run/tcal.json"
    assert work(file.parent) == ["plan", "calibrate"]
    written = json.loads(file.read_text())
    file.write_text(json.dumps(without_made_from(written)))
    before = file.read_bytes()
    with RunFolder.open_existing(file.parent) as run:
        run.require("calibrate")
    assert file.read_bytes() == before
    with open_(file.parent) as run, run.stage("more", config=0, inputs={}):
        pass
    after = json.loads(file.read_text())
    assert after["schema_version"] == SCHEMA_VERSION
    assert {n: r for n, r in after["stages"].items() if n != "more"} == written["stages"]


def test_the_same_command_settles_what_times_could_not(tmp_path):
    file = tmp_path / "run/tcal.json"
    work(file.parent)
    written = json.loads(file.read_text())
    old = without_made_from(written)
    old["stages"]["plan"]["finished_at"] = "2999-01-01T00:00:00+00:00"  # made again, with the same result
    file.write_text(json.dumps(old))
    with RunFolder.open_existing(file.parent) as run, pytest.raises(RunFolderError, match="is of before plan was made"):
        run.require("calibrate")
    assert work(file.parent) == []  # the hash of its inputs says that it was made from this plan
    with RunFolder.open_existing(file.parent) as run:
        run.require("calibrate")
    assert json.loads(file.read_text())["stages"]["calibrate"] == written["stages"]["calibrate"]


def test_a_newer_version_is_refused_and_left_alone(tmp_path):
    file = tmp_path / "run/tcal.json"
    work(file.parent)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": SCHEMA_VERSION + 1, "new": {}}))
    before = file.read_bytes()
    what = f"schema version {SCHEMA_VERSION + 1} is newer than {SCHEMA_VERSION}.*\n.*a newer tcal-compile"
    for again in (work, RunFolder.open_existing, lambda path: RunFolder.open_existing(path, write=True)):
        with pytest.raises(RunFolderError, match=what):
            again(file.parent)
    assert file.read_bytes() == before


def test_settings_that_do_not_say_the_window_have_the_plans(tmp_path):
    data = json.loads(MANIFESTS[0].read_text())
    data["plan"] |= {"local_window": 8}
    assert parse(data).config["local_window"] == 8
