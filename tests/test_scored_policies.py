"""kl:, ar:, greedy: and forward: through the command line: measured once, kept in the run folder, resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import BYTES, SMALL, TINY, call, done, refused

from tcal_compiler import scoring
from tcal_compiler.runtime import select_sites
from tcal_compiler.runtime.align import GroupTrainer
from tcal_compiler.runtime.score_sites import SiteScore, Trials


def plan(out: Path, policy: str, *more: object, score: str = "align_steps = 4\n"):
    config = out.parent / "few.toml"
    config.write_text(f"[score]\n{score}")
    return call("tcal", "plan", TINY, "-o", out, *BYTES, *SMALL, "--config", config, "--policy", policy, *more)


def manifest(out: Path) -> dict:
    return json.loads((out / "tcal.json").read_text())


@pytest.mark.parametrize("policy", [pytest.param(p, marks=pytest.mark.slow) for p in ("ar", "greedy")])
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


def test_kl_keeps_the_candidate_that_leaves_the_least(tmp_path, monkeypatch):
    """Measured once: another budget needs its sets alone, the same budget again nothing."""
    made, planned = [], select_sites.planned_student
    monkeypatch.setattr(select_sites, "planned_student", lambda *args: (made.append(args[2].keep), planned(*args))[1])
    ranked, model = [], Trials.model
    monkeypatch.setattr(Trials, "model", lambda self, site: (ranked.append(self.policy), model(self, site))[1])
    out = tmp_path / "run"
    assert plan(out, "kl:2").code == 0
    found = json.loads((out / "scores/kl.json").read_text())
    sets = {tuple(c["keep"]): c["kl"] for c in found["candidates"]}
    assert found["candidates"][0] | {"kl": None} == {"rule": "uniform", "keep": [0, 2], "kl": None}
    assert set(made) == set(sets) and len(made) == len(sets) > 1 and ranked == ["kl"] * 4 + ["greedy"] * 4
    assert tuple(manifest(out)["plan"]["keep"]) == min(sets, key=sets.__getitem__)
    values = {str(s["index"]): s["value"] for s in found["kl"]}
    assert manifest(out)["stages"]["plan"]["evidence"]["scores"] == values and len(values) == 4
    assert "policy's score" in (out / "report.md").read_text()
    assert not list((out / ".scratch").rglob("*.safetensors"))
    made.clear(), ranked.clear()
    before = manifest(out)["stages"]["score-kl"]
    assert plan(out, "kl:50%").code == 0 and len(made) == 0 and ranked == []  # the same sets under another name
    assert manifest(out)["stages"]["score-kl"]["evidence"]["sets"] == before["evidence"]["sets"]
    assert plan(out, "kl:1").code == 0 and ranked == [] and {len(keep) for keep in made} == {1}
    made.clear()
    assert plan(out, "kl:4").code == 0 and made == [] and manifest(out)["plan"]["convert"] == []


def test_kl_distils_its_candidates(tmp_path, monkeypatch):
    """Stopped in the second set the first is kept; a schedule of its own; other settings of [distill] measure anew."""
    out, made, train, stop = tmp_path / "run", [], scoring.distill, [2]

    def stops(student, *rows, config, **options):
        made.append((student.plan.keep, config.steps, config.warmup, config.batch))
        if [len(made)] == stop:
            stop.clear()
            raise KeyboardInterrupt
        return train(student, *rows, config=config, **options)

    monkeypatch.setattr(scoring, "distill", stops)
    asked = "distill_steps = 3\nalign_steps = 1\nsequences = 2\n[distill]\nbatch = 2\n"
    assert plan(out, "kl:1", score=asked).code == 130
    assert plan(out, "kl:1", score=asked).code == 0
    assert made[0] == ((0,), 3, 1, 2) and made[1] == made[2] and made.count(made[0]) == 1
    found = json.loads((out / "scores/kl.json").read_text())
    sets = {tuple(c["keep"]): c["kl"] for c in found["candidates"]}
    assert set(sets) == {keep for keep, *_ in made} and len(made) == len(sets) + 1
    assert tuple(manifest(out)["plan"]["keep"]) == min(sets, key=sets.__getitem__)
    made.clear()
    assert plan(out, "kl:1", score=asked).code == 0 and made == []
    (out / "plan.toml").unlink()  # which would be followed
    assert plan(out, "kl:1", score=f"{asked}lr_gdn = 1e-4\n").code == 0 and {keep for keep, *_ in made} == set(sets)
    new = json.loads((out / "scores/kl.json").read_text())["candidates"]
    assert all(c["kl"] != sets[tuple(c["keep"])] for c in new)
    assert not list((out / ".scratch/score-kl").rglob("*.safetensors"))


def test_sets_that_cannot_be_distilled_are_refused_before_anything_is_measured(tmp_path):
    out = tmp_path / "run"
    for asked, words in (
        ("distill_steps = -1", ("score.distill_steps", "0")),
        ("distill_steps = 3\nsequences = 12", ("score.distill_steps", "4 of the 12", "calib.holdout = 12")),
        ("distill_steps = 3\n[distill]\nshort_length = 9", ("distill.short_length", "9")),
    ):
        refused(plan(out, "kl:1", score=asked + "\n"), "ConfigError", *words)
    asked = 'distill_steps = 3\n[distill]\ntrain = "attention"\n'
    refused(plan(out, "kl:0", score=asked), "ConfigError", "distill.train", "keeps no softmax site")
    assert not out.exists()


@pytest.mark.slow
def test_a_stopped_measurement_goes_on(tmp_path, monkeypatch):
    """Stopped among the single sites, in alignment and among the sets."""
    model, made = Trials.model, []
    planned, step, steps = select_sites.planned_student, GroupTrainer.step, []

    def stops(self, site):
        made.append(site.index)
        if len(made) == 3:
            raise KeyboardInterrupt
        return model(self, site)

    def stops_aligning(self, number, *args):
        steps.append(number)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(self, number, *args)

    def stops_measuring(*args):
        if len(steps) == 5:
            steps.append(-1)
            raise KeyboardInterrupt
        return planned(*args)

    config = tmp_path / "often.toml"
    config.write_text("[score]\nalign_steps = 4\n[align]\ncheckpoint_every = 1\n")
    given = [TINY, *BYTES, *SMALL, "--config", config, "--policy", "kl:1"]
    out = tmp_path / "run"
    monkeypatch.setattr(Trials, "model", stops)
    monkeypatch.setattr(GroupTrainer, "step", stops_aligning)
    monkeypatch.setattr(select_sites, "planned_student", stops_measuring)
    for scratch in ("initial.safetensors", "score-kl.safetensors", "aligned.safetensors"):
        assert call("tcal", "plan", *given, "-o", out).code == 130 and list((out / ".scratch").rglob(scratch))
    assert call("tcal", "plan", *given, "-o", out).code == 0
    assert made == [0, 1, 2, 2, 3, 0, 1, 2, 3] and steps == [0, 1, 2, 2, 3, -1]
    assert call("tcal", "plan", *given, "-o", tmp_path / "other").code == 0
    assert (out / "scores/kl.json").read_bytes() == (tmp_path / "other/scores/kl.json").read_bytes()


def test_a_bad_budget_is_refused_before_anything_is_measured(tmp_path):
    for policy in ("kl:5", "greedy:x", "ar:-1%"):
        refused(plan(tmp_path / "run", policy), "ConfigError", policy)
    assert not (tmp_path / "run").exists()


def test_a_budget_of_time_measures_once_and_keeps_what_it_measured(tmp_path, monkeypatch):
    asked: list[int] = []

    def seconds(scan, tokens):
        asked.append(tokens)
        return {s.index: (0.004, 0.001) for s in scan.sites}

    monkeypatch.setattr(scoring, "step_seconds", seconds)
    out = tmp_path / "run"
    result = plan(out, "ar:8ms@4096")
    assert result.code == 0 and len(manifest(out)["plan"]["keep"]) == 1
    stages = manifest(out)["stages"]
    assert stages["score-decode"]["evidence"] == {"seconds": [[i, 0.004, 0.001] for i in range(4)]}
    assert plan(out, "ar:10ms@4096").code == 0 and len(manifest(out)["plan"]["keep"]) == 2 and asked == [4096]
    assert manifest(out)["stages"]["score-ar"] == stages["score-ar"]
    refused(plan(out, "ar:3ms@4096"), "ConfigError", "at least 4 ms")


def test_an_edited_plan_of_a_scored_policy_is_followed(tmp_path):
    out = tmp_path / "run"
    assert plan(out, "ar:0").code == 0
    file = out / "plan.toml"
    file.write_text(file.read_text().replace('= "gdn"', '= "softmax"', 1))
    done("tcal", "plan", TINY, "-o", out, *BYTES, *SMALL)
    record = manifest(out)["plan"] | {"convert": None}
    assert record == {"keep": [0], "policy": "ar:0", "convert": None, "local_window": 8}


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


DAMAGED_SCORES = [
    ("ar:1", "sites", [], "KeyError: 0"),
    ("ar:1", "sites", [{"index": i, "value": "much"} for i in range(4)], "ValueError"),
    ("forward:1", "path", [{"keep": [], "kl": 1.0}, {"keep": [9], "kl": 0.5}], "sites [9] are not the teacher's"),
    ("ar:9s@64", "seconds", [[0, 1.0, 1.0]], "KeyError: 1"),
]


@pytest.mark.parametrize("policy, key, value, words", DAMAGED_SCORES, ids=[d[3] for d in DAMAGED_SCORES])
def test_damaged_scores(tmp_path, monkeypatch, policy, key, value, words):
    sites = [SiteScore(i, 1.0, 1.0, 1.0) for i in range(4)]
    monkeypatch.setattr(scoring, "score_sites", lambda *_, **__: sites)
    monkeypatch.setattr(scoring, "step_seconds", lambda *_: dict.fromkeys(range(4), (2.0, 1.0)))
    monkeypatch.setattr(select_sites.SetScores, "kl", lambda self, keep: 1.0 / (1 + len(keep)))
    out = tmp_path / "run"
    assert plan(out, policy).code == 0
    found = manifest(out)
    stage = next(s for name, s in found["stages"].items() if name.startswith("score-") and key in s["evidence"])
    stage["evidence"][key] = value
    (out / "tcal.json").write_text(json.dumps(found))
    (out / "plan.toml").unlink()  # which would be followed
    refused(plan(out, policy), "RunFolderError", "the manifest is damaged", words)
    assert manifest(out) == found
