"""kl:, ar:, greedy: and forward: through the command line: measured once, kept in the run folder, resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import BYTES, SMALL, TINY, call, done, refused

from tcal_compiler.runtime import select_sites
from tcal_compiler.runtime.score_sites import Trials


def plan(out: Path, policy: str, *more: object):
    return call("tcal", "plan", TINY, "-o", out, *BYTES, *SMALL, "--policy", policy, *more)


def manifest(out: Path) -> dict:
    return json.loads((out / "tcal.json").read_text())


@pytest.mark.parametrize("policy", ["kl", *(pytest.param(p, marks=pytest.mark.slow) for p in ("ar", "greedy"))])
def test_the_sites_with_the_largest_scores_are_kept(tmp_path, policy):
    out = tmp_path / "run"
    assert plan(out, f"{policy}:50%").code == 0
    rows = json.loads((out / "scores" / f"{policy}.json").read_text())
    values = {r["index"]: r["value"] for r in rows}
    best = sorted(sorted(values, key=values.__getitem__)[2:])
    assert len(values) == 4 and manifest(out)["plan"]["keep"] == best
    stages = manifest(out)["stages"]
    assert list(stages)[:2] == [f"score-{policy}", "plan"]
    assert stages["plan"]["evidence"]["scores"] == {str(i): v for i, v in values.items()}
    assert "policy's score" in (out / "report.md").read_text()
    assert not list((out / ".scratch").rglob("*.safetensors"))
    found = manifest(out)["stages"][f"score-{policy}"]
    assert plan(out, f"{policy}:1").code == 0  # another budget: the same scores
    assert manifest(out)["stages"][f"score-{policy}"] == found
    assert manifest(out)["plan"]["keep"] == [max(values, key=values.__getitem__)]


@pytest.mark.slow
def test_a_stopped_measurement_goes_on(tmp_path, monkeypatch):
    model, made = Trials.model, []

    def stops(self, site):
        made.append(site.index)
        if len(made) == 3:
            raise KeyboardInterrupt
        return model(self, site)

    monkeypatch.setattr(Trials, "model", stops)
    out = tmp_path / "run"
    assert plan(out, "kl:1").code == 130 and list((out / ".scratch").rglob("initial.safetensors"))
    assert plan(out, "kl:1").code == 0 and made == [0, 1, 2, 2, 3]
    assert plan(tmp_path / "other", "kl:1").code == 0
    assert (out / "scores/kl.json").read_bytes() == (tmp_path / "other/scores/kl.json").read_bytes()


def test_a_bad_budget_is_refused_before_anything_is_measured(tmp_path):
    for policy in ("kl:5", "greedy:x", "ar:-1%"):
        refused(plan(tmp_path / "run", policy), "ConfigError", policy)
    assert not (tmp_path / "run").exists()


def test_an_edited_plan_of_a_scored_policy_is_followed(tmp_path):
    out = tmp_path / "run"
    assert plan(out, "ar:0").code == 0
    file = out / "plan.toml"
    file.write_text(file.read_text().replace('= "gdn"', '= "softmax"', 1))
    done("tcal", "plan", TINY, "-o", out, *BYTES, *SMALL)
    assert manifest(out)["plan"] | {"convert": None} == {"keep": [0], "policy": "ar:0", "convert": None}


@pytest.mark.slow
def test_forward_selection_is_kept_for_other_budgets(tmp_path, monkeypatch):
    made, planned = [], select_sites.planned_student
    monkeypatch.setattr(select_sites, "planned_student", lambda *args: (made.append(args[2].keep), planned(*args))[1])
    out = tmp_path / "run"
    assert plan(out, "forward:1").code == 0 and made == [(), (0,), (1,), (2,), (3,)]
    rows = {tuple(r["keep"]): r["kl"] for r in json.loads((out / "scores/forward.json").read_text())}
    best = min([(0,), (1,), (2,), (3,)], key=rows.__getitem__)
    assert manifest(out)["plan"]["keep"] == list(best)
    assert manifest(out)["stages"]["plan"]["evidence"]["scores"] == {str(best[0]): rows[best]}
    assert "policy's score" in (out / "report.md").read_text()
    made.clear()
    assert plan(out, f"forward:{1.001 * rows[best]:.9f}nats").code == 0 and made == []
    assert manifest(out)["plan"]["keep"] == list(best)
    assert plan(out, "forward:0nats").code == 0 and manifest(out)["plan"]["convert"] == []
    assert [len(keep) for keep in made] == [2, 2, 2, 3, 3]  # all four are the teacher
