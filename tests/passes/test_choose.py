"""Policies, and plan.toml as users edit it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcal_compiler.errors import ConfigError
from tcal_compiler.passes.budget import memory
from tcal_compiler.passes.choose import (
    MEASURED,
    RANKED,
    candidates,
    choose,
    choose_jointly,
    plan_from_toml,
    plan_to_toml,
    scored_by,
)
from tcal_compiler.passes.types import AttentionSite, Rejection, SiteScan


def site(index: int) -> AttentionSite:
    names = dict.fromkeys(("anchor", "q", "k", "v", "x", "y"), f"n{index}")
    sizes = {"num_heads": 4, "num_kv_heads": 2, "key_dim": 8, "value_dim": 8, "hidden": 32}
    facts = {"scale": 0.5, "window": None, "rope": True, "proof": "is_causal"}
    return AttentionSite(index=index, layer=f'a "b".{index}', **names, **sizes, **facts)


def scan(*indices: int) -> SiteScan:
    return SiteScan(tuple(map(site, indices)), (Rejection("node", 'layer "q"\n', "not causal"),))


EIGHT = scan(*range(8))


@pytest.mark.parametrize(
    "policy, keep",
    [
        ("uniform:2", [0, 4]),
        ("uniform:25%", [0, 4]),
        ("uniform:3", [0, 2, 5]),
        ("uniform:0", []),
        ("uniform:0%", []),
        ("uniform:100%", list(range(8))),
        ("uniform:8", list(range(8))),
        ("keep=7,1", [1, 7]),
        ("none", []),
        ("all", list(range(8))),
    ],
)
def test_policies(policy, keep):
    plan = choose(EIGHT, policy)
    assert list(plan.keep) == keep and plan.policy == policy
    assert sorted(plan.keep + plan.convert) == list(range(8)) and not set(plan.keep) & set(plan.convert)


SCORES = dict(enumerate([0.1, 0.9, 0.2, 0.9, 0.3, -0.5, 0.0, 0.4]))


@pytest.mark.parametrize("measure", RANKED)
@pytest.mark.parametrize("budget, keep", [("3", [1, 3, 7]), ("1", [1]), ("25%", [1, 3]), ("0", []), ("8", range(8))])
def test_scored_policies_keep_the_largest_scores(measure, budget, keep):
    plan = choose(EIGHT, f"{measure}:{budget}", SCORES)
    assert list(plan.keep) == list(keep) and plan.scores == SCORES and plan.policy == f"{measure}:{budget}"
    assert scored_by(plan.policy) == measure
    with pytest.raises(ConfigError, match="needs every site measured"):
        choose(EIGHT, f"{measure}:{budget}")


LATE = dict(enumerate([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.9, 0.8]))
RANKS = {"kl": SCORES, "greedy": LATE}


@pytest.mark.parametrize(
    "budget, sets",
    [
        ("0", [()] * 5),
        ("1", [(0,), (1,), (1,), (6,), (6,)]),
        ("2", [(0, 4), (1, 3), (1, 7), (6, 7), (3, 6)]),
        ("3", [(0, 2, 5), (1, 3, 7), (1, 3, 7), (5, 6, 7), (1, 4, 6)]),
        ("100%", [tuple(range(8))] * 5),
    ],
)
def test_kl_chooses_among_the_sets_of_several_rules(budget, sets):
    """Stretches of 3 of 8 sites: 0 and 1, 2 to 4, 5 to 7."""
    found = candidates(EIGHT, f"kl:{budget}", RANKS)
    rules = ["uniform", "kl", "kl, spread", "greedy", "greedy, spread"]
    assert found == dict(zip(rules, sets, strict=True)) and list(found) == rules
    for best in set(sets):
        asked = []
        kl = lambda keep, best=best, asked=asked: asked.append(keep) or float(keep != best)  # noqa: E731
        plan = choose_jointly(EIGHT, f"kl:{budget}", RANKS, kl)
        assert plan.keep == best and set(asked) == set(sets) and plan.scores == SCORES
        assert plan.policy == f"kl:{budget}" and plan.convert == tuple(i for i in range(8) if i not in best)
    with pytest.raises(ConfigError, match="needs every site measured"):
        choose(EIGHT, f"kl:{budget}", SCORES)


def test_candidates_of_a_size_all_fit_it():
    found = candidates(EIGHT, "kl:30KB@64", RANKS)
    assert found == candidates(EIGHT, "kl:3", RANKS)
    assert all(memory(EIGHT, keep, 64) <= 30_000 < memory(EIGHT, range(4), 64) for keep in found.values())


def test_only_scored_policies_are_scored():
    assert [scored_by(f"{p}:2") for p in MEASURED] == list(MEASURED)
    assert [scored_by(p) for p in ("uniform:2", "keep=1", "none", "kl", "klx:2", "")] == [None] * 6


def test_refused_sites_keep_their_number_and_are_not_counted():
    plan = choose(scan(0, 2, 5, 9), "uniform:50%")
    assert plan.keep == (0, 5) and plan.convert == (2, 9)
    with pytest.raises(ConfigError, match=r"no convertible site has number \[1\]"):
        choose(scan(0, 2), "keep=1")


BAD = [
    ("uniform:9", "keep 9 of 8"),
    ("uniform:-1", "keep -1 of 8"),
    ("uniform:101%", "101%"),
    ("uniform:-3%", "-3%"),
    ("uniform:nan%", "nan"),
    ("uniform:inf%", "inf"),
    ("uniform:1e999%", "1e999"),
    ("uniform:", "no number"),
    ("uniform:%", "no number"),
    ("uniform:two", "'two' is no number"),
    ("uniform:2.5", "no number"),
    ("uniform:" + "9" * 5000, "policy"),
    ("kl:9", "keep 9 of 8"),
    ("ar:-1", "keep -1 of 8"),
    ("greedy:101%", "101%"),
    ("kl:", "no number"),
    ("kl", "unknown policy"),
    ("keep=", "no list"),
    ("keep=0,x", "no list"),
    ("keep=0,0", "twice"),
    ("keep=8", "has number"),
    ("keep=-1", "has number"),
    ("unifrom:2", "unknown policy\n  Try: did you mean uniform? policies: "),
    ("kept=2", "did you mean keep?"),
    ("", "unknown policy"),
    ("ALL", "unknown policy"),
]


@pytest.mark.parametrize("policy, message", BAD, ids=lambda v: v[:20])
def test_bad_policies_name_themselves_and_say_what_is_possible(policy, message):
    with pytest.raises(ConfigError) as e:
        choose(EIGHT, policy)
    assert e.value.where.startswith("--policy") and message in str(e.value)
    assert e.value.hint or "twice" in str(e.value)


@given(st.text(max_size=12) | st.from_regex(r"(uniform:|keep=)[0-9,.%einfa-]{0,12}", fullmatch=True))
def test_any_text_is_a_plan_or_a_config_error(policy):
    try:
        plan = choose(EIGHT, policy)
    except ConfigError:
        return
    assert sorted(plan.keep + plan.convert) == list(range(8))


def test_a_plan_survives_its_file(tmp_path):
    file = tmp_path / "plan.toml"
    for policy in ("uniform:3", "none", "all"):
        plan = choose(EIGHT, policy)
        file.write_text(plan_to_toml(plan, EIGHT), encoding="utf-8")
        assert plan_from_toml(file, EIGHT) == plan


def test_an_edit_is_followed(tmp_path):
    file = tmp_path / "plan.toml"
    text = plan_to_toml(choose(EIGHT, "none"), EIGHT)
    file.write_text(text.replace('mixer = "gdn"', 'mixer = "softmax"', 1))
    assert plan_from_toml(file, EIGHT).keep == (0,)


GOOD = plan_to_toml(choose(EIGHT, "none"), EIGHT)
EDITS = [
    ("", r"no \[\[site\]\]"),
    ("[[site", "cannot be read as a plan"),
    ("a = " + "[" * 5000, "cannot be read as a plan"),
    ("site = 3", r"no \[\[site\]\]"),
    ("site = [1, 2]", r"no \[\[site\]\]"),
    (GOOD + "\n[extra]\n", r"unknown keys \['extra'\]"),
    (GOOD.replace('= "gdn"', '= "gnd"', 1), "layer 0: mixer is 'gnd'"),
    (GOOD.replace('= "gdn"', "= [1]", 1), "layer 0: mixer is"),
    (GOOD.replace('mixer = "gdn"', "", 1), "layer 0: mixer is None"),
    (GOOD.replace("layer = 1", "layer = 0", 1), "layer 0 .*twice"),
    (GOOD.replace("layer = 1", "layer = true", 1), "layer True is no number"),
    (GOOD.replace("layer = 1", 'layer = "1"', 1), "layer '1' is no number"),
    (GOOD.replace("layer = 7", "layer = 8", 1), r"convertible sites are \[0, 1"),
    (plan_to_toml(choose(scan(0), "none"), scan(0)), r"names layers \[0\]"),
    (GOOD.replace('policy = "none"', "policy = 3"), "policy is 3"),
    (GOOD.replace('mixer = "gdn"', 'mixer = "gdn"\nmixr = "softmax"', 1), r"layer 0: unknown keys \['mixr'\]"),
]


@pytest.mark.parametrize("text, message", EDITS, ids=[m for _, m in EDITS])
def test_hostile_edits_are_config_errors(tmp_path, text, message):
    file = tmp_path / "plan.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as e:
        plan_from_toml(file, EIGHT)
    assert e.value.where == str(file)


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for file in (tmp_path / "missing", tmp_path, tmp_path / "binary"):
        with pytest.raises(ConfigError, match="cannot be read as a plan"):
            plan_from_toml(file, EIGHT)
