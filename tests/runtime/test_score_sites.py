"""What policies rank by: against students made and evaluated by hand, with a cache that is trusted and resumed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny_models import VOCAB, TinyModel, capture_of
from torch import Tensor

from tcal_compiler.errors import RunFolderError, StageError
from tcal_compiler.passes.capture import example_ids
from tcal_compiler.passes.choose import choose
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.passes.types import Plan
from tcal_compiler.runtime import score_sites as module
from tcal_compiler.runtime.calibrate import initialise
from tcal_compiler.runtime.evaluate import evaluate
from tcal_compiler.runtime.score_sites import Trials, bypassed, initial_student, score_sites
from tcal_compiler.runtime.student import Student, make_student
from tcal_compiler.runtime.taps import collect_taps

TRAIN, SCORED = example_ids(6, 24, VOCAB, seed=1), example_ids(3, 24, VOCAB, seed=2)


def teacher() -> TinyModel:
    """Three layers that matter differently: the second one's attention adds next to nothing."""
    model = TinyModel("is_causal", layers=3, sharp=3.0)
    with torch.no_grad():
        for block, factor in zip(model.blocks, (1.0, 1e-3, 3.0), strict=True):
            block.attn.out.weight.mul_(factor)
    return model


CAPTURE = capture_of(teacher())
SCAN = find_attention(CAPTURE)


def silent(_: str):
    return lambda *_: None


@pytest.fixture
def initial(tmp_path) -> Student:
    return prepared(tmp_path / "initial.safetensors")


def prepared(cache) -> Student:
    options = {"init": "closed-form", "seed": 0, "batch": 4}
    return initial_student(CAPTURE, SCAN, TRAIN, **options, cache=cache, progress=silent)


def by_hand(plan: Plan) -> Student:
    """A student of the plan, initialised on its own."""
    student = make_student(CAPTURE, SCAN, plan)
    groups = collect_taps(student, CAPTURE.gm, TRAIN, batch=4)
    return initialise(student, groups, init="closed-form", seed=0, batch=4)[0]


def teacher_logits(ids: Tensor) -> Tensor:
    return CAPTURE.gm(*CAPTURE.inputs(ids))


@pytest.mark.parametrize("policy", ["kl", "greedy"])
def test_trial_models_are_the_students_of_their_plans(initial, tmp_path, policy):
    scores = score_sites(Trials(CAPTURE, SCAN, policy, initial), SCORED, batch=2, cache=tmp_path / "scores")
    assert [s.index for s in scores] == [0, 1, 2]
    for score in scores:
        rest = tuple(i for i in range(3) if i != score.index)
        one = (score.index,)
        student = by_hand(Plan(rest, one, "") if policy == "kl" else Plan(one, rest, ""))
        result = evaluate(SCORED, teacher=teacher_logits, students={"s": student.logits})["s"]
        assert score.kl == pytest.approx(result.kl, rel=1e-4)
        assert score.nll == pytest.approx(torch.tensor(result.perplexity).log().item(), rel=1e-4)
        assert score.value == (score.kl if policy == "kl" else -score.nll)


def test_bypassing_is_attention_that_adds_nothing(tmp_path):
    before = {n: p.clone() for n, p in CAPTURE.gm.named_parameters()}
    scores = score_sites(Trials(CAPTURE, SCAN, "ar", None), SCORED, batch=3, cache=tmp_path / "scores")
    for score, site in zip(scores, SCAN.sites, strict=True):
        model = teacher()
        with torch.no_grad():
            model.blocks[site.index].attn.out.weight.zero_()
            assert torch.equal(bypassed(CAPTURE.gm, site)(SCORED), model(SCORED))
        result = evaluate(SCORED, teacher=teacher_logits, students={"s": model})["s"]
        assert score.value == score.kl == pytest.approx(result.kl, rel=1e-4)
    assert all(torch.equal(before[n], p) for n, p in CAPTURE.gm.named_parameters())


def test_a_site_that_adds_nothing_is_converted_first(initial, tmp_path):
    for policy in ("kl", "ar"):
        trials = Trials(CAPTURE, SCAN, policy, initial if policy == "kl" else None)
        scores = score_sites(trials, SCORED, batch=3, cache=tmp_path / policy)
        values = {s.index: s.value for s in scores}
        assert min(values, key=values.__getitem__) == 1
        if policy == "ar":
            plan = choose(SCAN, "ar:2", values)
            assert plan.keep == (0, 2) and plan.convert == (1,) and plan.scores == values


def test_scores_and_initial_values_are_measured_once(initial, tmp_path, monkeypatch):
    cache, made = tmp_path / "scores", []
    model = Trials.model
    monkeypatch.setattr(Trials, "model", lambda self, site: (made.append(site.index), model(self, site))[1])
    trials = Trials(CAPTURE, SCAN, "kl", initial)
    whole = score_sites(trials, SCORED, batch=2, cache=cache)
    assert made == [0, 1, 2] and score_sites(trials, SCORED, batch=2, cache=cache) == whole and made == [0, 1, 2]
    cache.write_text(json.dumps(json.loads(cache.read_text())[:1]))  # stopped after the first site
    assert score_sites(trials, SCORED, batch=2, cache=cache) == whole and made[3:] == [1, 2]

    monkeypatch.setattr(module, "initialise", lambda *_, **__: pytest.fail("initialised again"))
    again = prepared(tmp_path / "initial.safetensors")
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in initial.state_dict().items())


def test_a_damaged_cache_and_scores_that_are_not_finite(initial, tmp_path):
    (tmp_path / "bad").write_text('[{"index": 0}]')
    with pytest.raises(RunFolderError, match="cannot be read"):
        score_sites(Trials(CAPTURE, SCAN, "ar", None), SCORED, batch=2, cache=tmp_path / "bad")
    with torch.no_grad():
        initial.gm.get_parameter("tcal_mixers.1.norm").fill_(torch.inf)
    with pytest.raises(StageError, match="not finite") as e:
        score_sites(replace(Trials(CAPTURE, SCAN, "kl", initial)), SCORED, batch=2, cache=tmp_path / "infinite")
    assert "blocks.1" in e.value.where
