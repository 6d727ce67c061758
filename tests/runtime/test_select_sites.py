"""Sets of sites, and what chooses among them, against students that are made and measured by hand."""

from __future__ import annotations

import json
import math
import weakref
from dataclasses import replace

import pytest
import torch
from tiny_models import VOCAB, TinyModel, capture_of

from tcal_compiler.errors import RunFolderError, StageError
from tcal_compiler.passes.capture import example_ids
from tcal_compiler.passes.choose import choose, choose_jointly
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.passes.types import Plan
from tcal_compiler.runtime import select_sites as module
from tcal_compiler.runtime.align import align
from tcal_compiler.runtime.calibrate import initialise
from tcal_compiler.runtime.config import AlignConfig, DistillConfig
from tcal_compiler.runtime.distill import distill
from tcal_compiler.runtime.evaluate import evaluate
from tcal_compiler.runtime.score_sites import Trials, initial_student, score_sites
from tcal_compiler.runtime.select_sites import SetScores, aligned_student, forward_path, sets_from_rows
from tcal_compiler.runtime.student import make_student
from tcal_compiler.runtime.taps import collect_taps

TRAIN, SCORED = example_ids(6, 24, VOCAB, seed=1), example_ids(3, 24, VOCAB, seed=2)
CAPTURE = capture_of(TinyModel("is_causal", layers=3, sharp=3.0))
SCAN = find_attention(CAPTURE)


@pytest.fixture(scope="module")
def initial(tmp_path_factory):
    options = {"init": "closed-form", "seed": 0, "batch": 4, "progress": lambda _: lambda *_: None}
    return initial_student(CAPTURE, SCAN, TRAIN, cache=tmp_path_factory.mktemp("a") / "initial.safetensors", **options)


def by_hand(keep: tuple[int, ...]) -> float:
    """KL of a student of this plan that was initialised on its own, from full logits."""
    plan = Plan(keep, tuple(i for i in range(3) if i not in keep), "")
    student = make_student(CAPTURE, SCAN, plan)
    if plan.convert:
        initialise(student, collect_taps(student, CAPTURE.gm, TRAIN, batch=4), init="closed-form", seed=0, batch=4)
    teacher = lambda ids: CAPTURE.gm(*CAPTURE.inputs(ids))  # noqa: E731
    return evaluate(SCORED, teacher=teacher, students={"s": student.logits})["s"].kl


@pytest.fixture(scope="module")
def exact() -> dict[tuple[int, ...], float]:
    return {keep: by_hand(keep) for keep in [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]}


def scores(initial, cache, **options) -> SetScores:
    return SetScores(CAPTURE, SCAN, SCORED, initial=lambda: initial, batch=2, cache=cache, **options)


def test_each_step_keeps_the_site_that_leaves_the_least_kl(initial, exact, tmp_path):
    expected, keep = [()], ()
    while len(keep) < 3:
        keep = min((tuple(sorted({*keep, i})) for i in range(3) if i not in keep), key=exact.__getitem__)
        expected.append(keep)
    found = list(forward_path(scores(initial, tmp_path / "sets")))
    assert [k for k, _ in found] == expected and exact[0, 1, 2] == 0.0
    for keep, kl in found:
        assert kl == pytest.approx(exact[keep], rel=1e-4, abs=1e-9)
    for bound in (exact[expected[1]] * 1.01, exact[expected[2]] * 1.01, 1e-9):
        plan = choose(SCAN, f"forward:{bound:.9f}nats", path=forward_path(scores(initial, tmp_path / "sets")))
        assert exact[plan.keep] <= bound
        assert all(exact[keep] > bound for keep in expected if len(keep) < len(plan.keep))


def test_sets_are_measured_once_and_no_more_than_needed(initial, tmp_path, monkeypatch):
    made, planned = [], module.planned_student
    monkeypatch.setattr(module, "planned_student", lambda i, s, plan: (made.append(plan.keep), planned(i, s, plan))[1])
    cache = tmp_path / "sets"
    plan = choose(SCAN, "forward:1", path=forward_path(scores(initial, cache)))
    assert made == [(), (0,), (1,), (2,)] and len(plan.keep) == 1
    cache.write_text(json.dumps(json.loads(cache.read_text())[:2]))  # stopped after the second
    again = scores(initial, cache)
    assert choose(SCAN, "forward:1", path=forward_path(again)) == plan and made[4:] == [(1,), (2,)]
    known = sets_from_rows(again.rows())
    other = SetScores(
        CAPTURE, SCAN, SCORED, initial=lambda: pytest.fail("made"), batch=2, cache=tmp_path / "b", known=known
    )
    assert choose(SCAN, "forward:1", path=forward_path(other)) == plan and len(made) == 6


def test_what_sets_need_is_made_before_the_first_is_measured(initial, tmp_path):
    asked: list[int] = []
    known = {(0,): 0.5}
    options = {"batch": 2, "cache": tmp_path / "sets", "known": known}
    sets = SetScores(CAPTURE, SCAN, SCORED, initial=lambda: asked.append(1) or initial, **options)
    sets.prepare([(0,), (0, 1, 2)])
    assert not asked
    sets.prepare([(0,), (1,)])
    sets.kl((1,))
    assert asked == [1]


def test_sets_are_measured_after_what_trains_them_one_at_a_time(initial, tmp_path):
    """Each from the same values, and gone before the next; a set that was measured is not trained again."""
    config, ids = DistillConfig(batch=4, lr_gdn=5e-3).trial(6), torch.cat([TRAIN, SCORED])
    counts, students = torch.ones(len(ids), 23, dtype=torch.bool), []

    def train(student):
        assert not any(s() for s in students)
        students.append(weakref.ref(student.gm))
        distill(student, ids, counts, train=len(TRAIN), config=config, seed=0)

    found = scores(initial, tmp_path / "sets", train=train)
    plain, values = scores(initial, tmp_path / "plain"), {n: t.clone() for n, t in initial.state_dict().items()}
    for keep in ((1,), (0, 2), ()):
        student = module.planned_student(initial, SCAN, Plan(keep, tuple(i for i in range(3) if i not in keep), ""))
        distill(student, ids, counts, train=len(TRAIN), config=config, seed=0)
        teacher = lambda ids: CAPTURE.gm(*CAPTURE.inputs(ids))  # noqa: E731
        kl = evaluate(SCORED, teacher=teacher, students={"s": student.logits})["s"].kl
        assert found.kl(keep) == pytest.approx(kl, rel=1e-4) and found.kl(keep) < 0.999 * plain.kl(keep)
    assert len(students) == 3 and not any(s() for s in students)
    assert all(torch.equal(t, values[n]) for n, t in initial.state_dict().items())
    again = scores(initial, tmp_path / "sets", train=lambda _: pytest.fail("trained"))
    assert again.kl((0, 2)) == found.kl((0, 2)) and again.kl((0, 1, 2)) == 0.0


def test_damaged_caches_and_scores_that_are_not_finite(initial, tmp_path):
    for text in ("[", '[{"keep": [0]}]', '[{"keep": 3, "kl": 1}]', "3", '[{"keep": ["x"], "kl": 1}]'):
        (tmp_path / "bad").write_text(text)
        with pytest.raises(RunFolderError, match="cannot be read"):
            scores(initial, tmp_path / "bad")
    weight = initial.gm.get_parameter("tcal_mixers.1.norm")
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(math.inf)
        with pytest.raises(StageError, match=r"KL nan of the student that keeps \[0\] is not finite"):
            scores(initial, tmp_path / "c").kl((0,))
        weight.copy_(before)


def silent(_: str):
    return lambda *_: None


def mislead() -> TinyModel:
    """The first layer's attention adds most, but nearly the same everywhere, which is learned in a few steps; the last
    one's adds less and looks at single tokens, which is not.
    """
    model = TinyModel("is_causal", layers=3, bias=True)
    first, second, last = (block.attn for block in model.blocks)
    with torch.no_grad():
        first.proj[2].weight.mul_(0.1)
        first.out.weight.mul_(5.0)
        second.out.weight.mul_(1e-3)
        last.out.weight.mul_(4.0)
        for proj in last.proj[:2]:
            proj.weight.mul_(20.0)
    return model


def test_kl_is_not_misled_by_what_alignment_mends(tmp_path):
    """Before training the first layer matters most on its own, and in every set; once aligned the last one does."""
    capture = capture_of(mislead())
    scan, config = find_attention(capture), AlignConfig(steps=40, batch=8, score_every=20, warmup=4)
    train, held = example_ids(32, 24, VOCAB, seed=1), example_ids(8, 24, VOCAB, seed=2)
    given = {"seed": 0, "batch": 8, "progress": silent}
    make = lambda: initial_student(capture, scan, train, init="zero-gate", cache=tmp_path / "i", **given)  # noqa: E731
    single = score_sites(Trials(capture, scan, "kl", make()), held, batch=8, cache=tmp_path / "single")
    ranks = {"kl": {s.index: s.value for s in single}, "greedy": {0: 0.0, 1: 0.0, 2: 1.0}}  # so that 2 is a candidate
    assert max(ranks["kl"], key=ranks["kl"].__getitem__) == 0
    before = SetScores(capture, scan, held, initial=make, batch=8, cache=tmp_path / "before")
    assert choose_jointly(scan, "kl:1", ranks, before.kl).keep == (0,)
    options = {"kept": len(train), "config": config, "cache": tmp_path / "a", **given}
    after = SetScores(
        capture,
        scan,
        held,
        initial=lambda: aligned_student(make(), train, held, **options),
        batch=8,
        cache=tmp_path / "after",
    )
    assert choose_jointly(scan, "kl:1", ranks, after.kl).keep == (2,)
    assert after.kl((2,)) < 0.8 * after.kl((0,)) and after.kl((0,)) < before.kl((0,))

    for keep in ((0,), (2,)):  # students of these plans that are initialised and aligned on their own
        student = make_student(capture, scan, Plan(keep, tuple(i for i in range(3) if i not in keep), ""))
        groups = collect_taps(student, capture.gm, torch.cat([train, held]), batch=8)
        seen = [replace(g, x=g.x[:, :32], y=g.y[:, :32]) for g in groups]
        initialise(student, seen, init="zero-gate", seed=0, batch=8)
        values, start = student.state_dict(), make().state_dict()
        for n in set(values) & set(start):  # zero-gate draws in the order of the sites
            values[n].copy_(start[n])
        align(student, groups, train=32, config=config, seed=0)
        teacher = lambda ids: capture.gm(*capture.inputs(ids))  # noqa: E731
        kl = evaluate(held, teacher=teacher, students={"s": student.logits})["s"].kl
        assert after.kl(keep) == pytest.approx(kl, rel=1e-3)

    again = aligned_student(make(), train, held, **options | {"config": None})  # from its file
    assert again.stage == "aligned"
