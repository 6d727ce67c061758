"""SIGKILL at random moments up to alignment, then the same command: the student of the run that was never killed."""

from __future__ import annotations

import json

import crash
import pytest


@pytest.mark.slow
def test_kills_change_nothing(tmp_path):
    story = crash.crash(tmp_path, rounds=1, seed=1, until="align")
    assert story.faults == [] and sum(story.kills.values()) + story.late == 4 and sum(story.kills.values()) >= 2


@pytest.mark.parametrize("fault", ["another byte", "orphan", "run again"])
def test_the_story_tells_faults(tmp_path, monkeypatch, fault):
    monkeypatch.setattr(crash, "_kill_once", lambda *_: True)

    def finish(teacher, out, until):
        out.mkdir(exist_ok=True)
        odd = out.name != "reference"
        (out / "weights").write_text("other" if odd and fault == "another byte" else "same")
        if odd and fault == "orphan":
            (out / ".tmp-plan-1").write_text("x")
        again = 2 if odd and fault == "run again" else 1
        (out / "tcal.json").write_text(json.dumps({"stages": {"plan": {"seconds": again}}}))
        return ""

    def records(out):
        file = out / "tcal.json"
        return json.loads(file.read_text())["stages"] if file.exists() else {"plan": {"seconds": 1}}

    monkeypatch.setattr(crash, "finish", finish)
    monkeypatch.setattr(crash, "records", records)
    assert len(crash.crash(tmp_path, rounds=1, seed=0, until="plan").faults) == 1
