"""What a decode step costs at a site: measured once for each size, and used by policies with a budget of time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from tiny_models import lone_site

from tcal_compiler.errors import ConfigError
from tcal_compiler.passes.types import AttentionSite, SiteScan
from tcal_compiler.runtime import step_seconds as module
from tcal_compiler.runtime.step_seconds import policy_seconds, step_seconds

SITE = replace(lone_site(), num_heads=4, num_kv_heads=2, key_dim=16, value_dim=16, hidden=32)


def scan(*sites: AttentionSite) -> SiteScan:
    return SiteScan(tuple(replace(s, index=i) for i, s in enumerate(sites)), ())


def test_softmax_costs_more_behind_more_tokens_and_the_state_does_not():
    few, many = (step_seconds(scan(SITE, SITE), n, threads=1)[0] for n in (16, 60_000))
    assert all(s > 0 for s in (*few, *many))
    assert many[0] > 10 * few[0] and many[0] > 10 * many[1]


def test_every_size_is_measured_once_and_a_window_counts_what_it_holds(monkeypatch):
    asked: list[tuple[int, int, int]] = []

    def measure(site: AttentionSite, held: int, sites: int, threads: int | None) -> tuple[float, float]:
        asked.append((site.num_kv_heads, held, sites))
        return 1e-3 * len(asked), 5e-4

    monkeypatch.setattr(module, "_measure", measure)
    windowed, wide = replace(SITE, window=9), replace(SITE, num_kv_heads=4)
    found = step_seconds(scan(SITE, windowed, SITE, wide, windowed), 100)
    assert asked == [(2, 100, 2), (2, 8, 2), (4, 100, 1)]
    assert [pair[0] for pair in found.values()] == [1e-3, 2e-3, 1e-3, 3e-3, 2e-3]
    asked.clear()
    for policy in ("keep=0", "none", "kl:50%", "uniform:2MB@10", "forward:0.1nats"):
        assert policy_seconds(scan(SITE), policy) is None
    assert policy_seconds(scan(SITE), "ar:2ms@70") == {0: (1e-3, 5e-4)} and asked == [(2, 70, 1)]


def test_sizes_that_the_operator_does_not_take_are_refused():
    for sizes in ({"key_dim": 12, "value_dim": 12}, {"key_dim": 8}):
        with pytest.raises(ConfigError, match="no decode time is measured") as e:
            step_seconds(scan(SITE, replace(SITE, **sizes)), 100)
        assert "SIZE@TOKENS" in str(e.value.hint)


def test_more_tokens_than_memory_holds_are_refused():
    with pytest.raises(ConfigError, match="the cache of 1000000000000 tokens is 256000000000000 bytes"):
        step_seconds(scan(SITE), 10**12)
    assert min(step_seconds(scan(SITE), 0)[0]) > 0


def test_copies_do_not_share_memory():
    step = module._Step(*module._softmax(SITE, 5), 3, 1)
    addresses: Iterable[int] = [x.ctypes.data for x in step._memory]
    assert len(step._bindings) == 3 and len(set(addresses)) == len(list(addresses)) == 3 * 7


def test_a_window_beside_the_state_is_measured_as_it_is_deployed():
    """Its nodes give attention over what is held and the new token."""
    site = replace(SITE, local=9, local_first=1, scale=0.3)
    nodes, inputs, _ = module._window(site)
    gen = np.random.default_rng(0)
    for name in ("past", "key", "value", "query"):
        inputs[name] = gen.standard_normal(inputs[name].shape).astype(np.float32)
    step = module._Step(nodes, inputs, {}, 1, 1)
    step.seconds()
    found = dict(zip(step._results, (o.numpy() for o in step._bindings[0].get_outputs()), strict=True))
    keys, values = (
        np.concatenate([x, inputs[n]], 1) for x, n in ((inputs["past"][:, :9], "key"), (inputs["past"][:, 9:], "value"))
    )
    for h in range(4):
        k, v = (x.reshape(10, 2, 16)[:, h // 2] for x in (keys, values))
        scores = np.exp(0.3 * k @ inputs["query"].reshape(4, 16)[h])
        np.testing.assert_allclose(found["output"][0, 0, h], scores @ v / scores.sum(), atol=1e-5)
    np.testing.assert_array_equal(found["held"], np.delete(np.concatenate([keys, values], 1), [1, 11], 1))
    both = step_seconds(scan(site, SITE), 16, threads=1)
    assert both[0][1] > both[1][1]
