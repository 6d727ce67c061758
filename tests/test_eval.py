"""tcal eval of a distilled run scores the aligned copy beside the student."""

from __future__ import annotations

import json

import pytest
from command_line import HELD_OUT, done


@pytest.mark.slow
def test_a_distilled_run_is_scored_beside_its_aligned_copy(finished):
    score = ("tcal", "eval", finished, "--text", HELD_OUT, "--length", 48, "--sequences", 4, "--quiet", "--json")
    before = json.loads(done(*score))
    assert "aligned" not in before
    done("tcal", "distill", finished, "--steps", "4", "--quiet")
    after = json.loads(done(*score))
    assert list(after) == ["teacher", "naive", "initialised", "aligned", "student"]
    for name in ("kl", "perplexity"):
        was = before["student"][name]  # by the exported program; the copy runs as a graph
        assert after["aligned"][name] == pytest.approx(was, rel=1e-4)
        assert abs(after["student"][name] - was) > 1e-3 * was
