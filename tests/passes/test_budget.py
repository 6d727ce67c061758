"""Budgets of policies: counts, bytes of states and caches, and a bound on the KL."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcal_compiler.errors import ConfigError
from tcal_compiler.passes.budget import memory
from tcal_compiler.passes.choose import budget_of, candidates, choose
from tcal_compiler.passes.types import AttentionSite, SiteScan


def site(index: int, kv_heads: int = 2, window: int | None = None) -> AttentionSite:
    names = dict.fromkeys(("anchor", "q", "k", "v", "x", "y"), f"n{index}")
    sizes = {"num_heads": 4, "num_kv_heads": kv_heads, "key_dim": 8, "value_dim": 16, "hidden": 32}
    facts = {"scale": 0.5, "window": window, "rope": True, "proof": "is_causal"}
    return AttentionSite(index=index, layer=f"layer.{index}", **names, **sizes, **facts)


EIGHT = SiteScan(tuple(map(site, range(8))), ())
CACHE, STATE = 2 * (8 + 16) * 4, 4 * 8 * 16 * 4  # bytes of one site: a token's k and v, and S [4, 8, 16]


def bytes_of(kept: int, tokens: int) -> int:
    return kept * CACHE * tokens + (8 - kept) * STATE


def test_memory_is_that_of_caches_and_states():
    assert memory(EIGHT, (), 10**9) == 8 * STATE and memory(EIGHT, range(8), 100) == 800 * CACHE
    mixed = SiteScan((site(0, kv_heads=4), site(3)), ())
    assert memory(mixed, (0,), 100) == 200 * CACHE + STATE and memory(mixed, (3,), 100) == STATE + 100 * CACHE


def test_a_window_keeps_what_it_can_still_see():
    windowed = SiteScan((site(0, window=33), site(1)), ())
    assert [memory(windowed, (0, 1), n) for n in (20, 33, 10**6)] == [
        40 * CACHE,
        (32 + 33) * CACHE,
        (32 + 10**6) * CACHE,
    ]


@given(st.integers(0, 400_000), st.integers(0, 700))
def test_as_many_sites_are_kept_as_fit(size, tokens):
    fitting = [n for n in range(9) if bytes_of(n, tokens) <= size]
    policy = f"uniform:{size}B@{tokens}"
    if not fitting:
        with pytest.raises(ConfigError, match=f"at least {min(bytes_of(0, tokens), bytes_of(8, tokens))}"):
            choose(EIGHT, policy)
    else:
        keep = choose(EIGHT, policy).keep
        assert len(keep) == fitting[-1] and keep == choose(EIGHT, f"uniform:{len(keep)}").keep


def test_units_of_size():
    exact = {"64000B": 64000, "64KB": 64000, "62.5KiB": 64000, "0.064MB": 64000, "1MiB": 2**20, "0.001GiB": 1073741}
    for text, size in {**exact, "1.5MB": 1_500_000, "2GB": 2 * 10**9}.items():
        assert budget_of(EIGHT, f"kl:{text}@100").most == size
    kept = [
        len(choose(EIGHT, f"ar:{text}@100", dict.fromkeys(range(8), 0.0)).keep) for text in ("16384B", "64KB", "1MB")
    ]
    assert kept == [0, max(n for n in range(9) if bytes_of(n, 100) <= 64000), 8]


def test_a_ranking_is_kept_from_its_top_while_it_fits():
    scores = dict(enumerate([0.1, 0.9, 0.2, 0.8, 0.3, -0.5, 0.0, 0.4]))
    plan = choose(EIGHT, f"greedy:{bytes_of(3, 64) + 1}B@64", scores)
    assert plan.keep == (1, 3, 7) and plan.scores == scores


def counted(values: list[float]):
    """The path 5, 3, 0, 1, 2, 4, 6, 7 with these KLs, and how many sets of it were asked for."""
    order, asked = [5, 3, 0, 1, 2, 4, 6, 7], []

    def path():
        for n, kl in enumerate(values):
            asked.append(n)
            yield tuple(sorted(order[:n])), kl

    return path(), asked


KLS = [3.0, 1.0, 0.6, 0.7, 0.2, 0.1, 0.05, 0.01, 0.0]


@pytest.mark.parametrize(
    "budget, keep, sets",
    [
        ("5nats", [], 1),
        ("0.7nats", [3, 5], 3),
        ("0.2nats", [0, 1, 3, 5], 5),
        ("1e-3nats", list(range(8)), 9),
        ("0nats", list(range(8)), 9),
        ("0", [], 1),
        ("25%", [3, 5], 3),
        (f"{bytes_of(3, 64)}B@64", [0, 3, 5], 5),
        ("1GB@64", list(range(8)), 9),
    ],
)
def test_a_path_is_taken_as_far_as_the_budget_needs(budget, keep, sets):
    path, asked = counted(KLS)
    plan = choose(EIGHT, f"forward:{budget}", path=path)
    assert list(plan.keep) == keep and len(asked) == sets
    assert plan.scores == {i: KLS[n] for n, i in enumerate([5, 3, 0, 1, 2, 4, 6, 7], start=1) if i in keep}


SECONDS = {i: (0.004, 0.001) for i in range(8)}


@pytest.mark.parametrize(
    "budget, kept", [("8ms", 0), ("13.9ms", 1), ("14001us", 2), ("0.0321s", 8), ("9s", 8)], ids=lambda v: str(v)
)
def test_as_many_sites_are_kept_as_the_decode_step_has_time_for(budget, kept):
    policy = f"uniform:{budget}@8192"
    assert budget_of(EIGHT, policy).timed and budget_of(EIGHT, policy).tokens == 8192
    keep = choose(EIGHT, policy, seconds=SECONDS).keep
    assert keep == choose(EIGHT, f"uniform:{kept}").keep
    scores = {i: float(i) for i in range(8)}
    assert choose(EIGHT, f"ar:{budget}@8192", scores, seconds=SECONDS).keep == tuple(range(8 - kept, 8))
    found = candidates(EIGHT, f"kl:{budget}@8192", {"kl": scores, "greedy": scores}, SECONDS)
    assert {len(keep) for keep in found.values()} == {kept}


def test_a_site_that_is_faster_as_softmax_is_kept_within_less_time():
    seconds = SECONDS | {0: (0.001, 0.002)}
    with pytest.raises(ConfigError, match=r"7\.9ms behind 5 tokens are too few: .* at least 8 ms") as e:
        choose(EIGHT, "uniform:7.9ms@5", seconds=seconds)
    assert e.value.hint == "8.8ms@5 or more"
    assert choose(EIGHT, "uniform:8ms@5", seconds=seconds).keep == (0,)


def test_time_that_was_not_measured_is_refused():
    with pytest.raises(ConfigError, match="needs the decode step of every site measured"):
        choose(EIGHT, "uniform:12ms@8192")


BAD = [
    ("uniform:12ms", "no number"),
    ("uniform:12min@5", "no number"),
    (f"uniform:1ms@{'9' * 5000}", "no time"),
    ("uniform:2MB", "'2MB' is no number"),
    ("uniform:2TB@10", "no number"),
    ("uniform:-2MB@10", "no number"),
    ("uniform:MB@10", "no number"),
    ("uniform:2MB@", "no number"),
    ("kl:1B@8192", "1 bytes behind 8192 tokens are too few: these sites need at least 16384"),
    ("kl:0.05nats", "bounds a KL, which kl does not measure"),
    ("uniform:1nats", "bounds a KL"),
    ("forward:-1nats", "no number"),
    ("forward:nats", "no number"),
    ("forward:9", "asks to keep 9 of 8"),
    ("forward:", "no number"),
    (f"ar:{'9' * 400}MB@1", "no size"),
    (f"uniform:1MB@{'9' * 5000}", "no size"),
]


@pytest.mark.parametrize("policy, message", BAD, ids=lambda v: v[:20])
def test_bad_budgets(policy, message):
    with pytest.raises(ConfigError) as e:
        budget_of(EIGHT, policy)
    assert message in str(e.value) and e.value.where.startswith("--policy") and e.value.hint


def test_what_is_missing_is_said():
    with pytest.raises(ConfigError, match="needs every site measured"):
        choose(EIGHT, "forward:2")
    with pytest.raises(ConfigError, match="no set of sites"):
        choose(EIGHT, "forward:2", path=[((), 1.0)])


def test_sites_whose_cache_is_smaller_than_a_state():
    small = SiteScan((site(0), replace(site(1), key_dim=64, value_dim=64)), ())
    assert choose(small, "uniform:1MB@4").keep == (0, 1)
    with pytest.raises(ConfigError, match="too few"):
        choose(small, f"uniform:{4 * CACHE}B@4")
