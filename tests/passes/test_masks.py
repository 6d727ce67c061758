"""A mask means what it evaluates to."""

from __future__ import annotations

import pytest
import torch
from tiny_models import TinyModel, capture_of, scanned

from tcal_compiler.passes.graph import argument, by_name
from tcal_compiler.passes.masks import Evaluator, classify_mask, probe_mask

STEPS = torch.arange(12)
FAR = STEPS[:, None] - STEPS[None, :]
CAUSAL = FAR >= 0
LEAST = torch.finfo(torch.float32).min


def additive(seen: torch.Tensor, hidden: float = LEAST) -> torch.Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, hidden)


CASES = [
    (CAUSAL, "causal", None, "lower triangle at 12"),
    (CAUSAL[None, None], "causal", None, ""),
    (additive(CAUSAL), "causal", None, ""),
    (additive(CAUSAL, float("-inf"))[None, None].half(), "causal", None, ""),
    (CAUSAL & (FAR < 4), "causal", 4, "window of 4"),
    (CAUSAL & (FAR < 1), "causal", 1, "window of 1"),
    (torch.ones_like(CAUSAL), "none", None, "hides nothing"),
    (FAR >= -1, "other", None, "T=12 row 0 sees column 1"),
    (FAR <= 0, "other", None, "sees column"),
    (CAUSAL & (FAR % 3 == 0), "other", None, "no window"),
    (CAUSAL & (FAR < 4) | (CAUSAL & (STEPS < 1)), "causal", 4, "window of 4 and the first 1"),  # an attention sink
    (CAUSAL & (FAR < 4) | (CAUSAL & (STEPS > 0) & (STEPS < 2)), "other", None, "no window"),
    (CAUSAL & (FAR < 4) | (CAUSAL & (STEPS < 1) & (FAR < 8)), "other", None, "no window"),
    (additive(CAUSAL) - 0.01 * FAR.clamp_min(0).square(), "bias", None, "adds values"),
    (additive(CAUSAL) + torch.where(FAR == 3, 0.1, 0.0), "bias", None, "adds values"),
    (additive(CAUSAL) - 0.01 * FAR.clamp_min(0), "causal", None, "lower triangle at 12 tokens, with alibi slopes"),
    (additive(CAUSAL & (FAR < 4)) - 0.5 * FAR.clamp_min(0), "causal", 4, "window of 4"),
    (additive(CAUSAL) + torch.where(FAR > 10, 1e-4, 0.0) - 0.01 * FAR.clamp_min(0), "bias", None, "no multiple"),
    (additive(FAR >= -1) - 0.01 * FAR, "other", None, "row 0 sees column 1"),  # alibi all the same
    (torch.stack([CAUSAL, CAUSAL & (FAR < 4)]), "other", None, "differs between heads"),
    (additive(CAUSAL).masked_fill(FAR == 2, float("nan")), "other", None, ""),
]


@pytest.mark.parametrize("mask, kind, window, detail", CASES)
def test_classification(mask, kind, window, detail):
    facts = classify_mask(mask)
    assert (facts.kind, facts.window) == (kind, window) and detail in facts.detail


def mask_node(core):
    capture, _ = scanned(core, layers=1)
    return capture, attention_mask(capture)


def attention_mask(capture):
    node = next(n for n in capture.gm.graph.nodes if "scaled_dot_product" in str(n.target))
    return argument(node, "attn_mask")


def test_a_window_longer_than_the_first_probe_is_seen():
    from tiny_models import CORES, masked

    CORES["window of 60"] = masked(lambda d: (d >= 0) & (d < 60))
    capture, node = mask_node("window of 60")
    assert classify_mask(Evaluator(capture, 48)(node)).window is None  # a short probe alone would be fooled
    assert probe_mask(capture, node).window == 60


def test_a_window_behind_first_tokens_that_hides_nothing_at_the_usual_lengths():
    from tiny_models import CORES, window_and_first

    CORES["window of 600 and 5"] = window_and_first(600, 5)
    capture, node = mask_node("window of 600 and 5")
    facts = probe_mask(capture, node)
    assert (facts.window, facts.first) == (600, 5)


@pytest.mark.parametrize("window, first, seen", [(600, 600, 600), (5000, 4000, None)])
def test_as_many_first_tokens_as_the_window_has(window: int, first: int, seen: int | None):
    from tiny_models import CORES, window_and_first

    CORES["equal"] = window_and_first(window, first)
    capture = capture_of(TinyModel("equal", layers=1))
    facts = probe_mask(capture, attention_mask(capture))
    assert facts.window == seen and ("beyond the probe" in facts.detail) == (seen is None), facts


def test_no_mask_is_evaluated_far_beyond_the_limit(monkeypatch):
    from tiny_models import CORES, window_and_first

    from tcal_compiler.passes import masks

    lengths: list[int] = []

    class Counted(Evaluator):
        def __init__(self, capture, length, *args, **options):
            lengths.append(length)
            super().__init__(capture, length, *args, **options)

    monkeypatch.setattr(masks, "Evaluator", Counted)
    monkeypatch.setattr(masks, "MAX_PROBE", 900)
    for window, first, longest in ((800, 500, 803), (800, 90, 893)):
        name = f"window of {window} and {first}"
        CORES[name] = window_and_first(window, first)
        assert probe_mask(*mask_node(name)).kind == "causal"
        assert max(lengths) == longest
        lengths.clear()


def test_slopes_that_are_rounded_are_seen_further_out():
    from tiny_models import CORES, distances, sdpa

    def rounded(q, k, v):
        bias = (0.25 * torch.arange(q.shape[2]).bfloat16()).float().expand(q.shape[2], -1)
        return sdpa(q, k, v, attn_mask=bias.masked_fill(distances(q) < 0, float("-inf")), enable_gqa=True)

    CORES["rounded alibi"] = rounded
    capture, node = mask_node("rounded alibi")
    assert classify_mask(Evaluator(capture, 48)(node)).slopes == (0.25,)
    assert probe_mask(capture, node).kind == "bias"


def test_only_what_a_node_needs_is_evaluated():
    capture, node = mask_node("mask")
    evaluator = Evaluator(capture, 6)
    assert torch.equal(evaluator(node), torch.ones(6, 6, dtype=torch.bool).tril())
    names = {n.name for n in evaluator._env}
    assert not any("linear" in n or "attention" in n for n in names)
    assert len(names) < len(by_name(capture.gm))
