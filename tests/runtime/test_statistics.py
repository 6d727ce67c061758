"""Statistics of a site against attention rows one by one, and their sums. The ops: tests/kernels."""

from __future__ import annotations

import pytest
import torch
from tiny_models import DIM as D
from tiny_models import HEADS as H
from tiny_models import KV_HEADS as K
from tiny_models import lone_site as site

from tcal_compiler.kernels.attention_stats import OCTAVES
from tcal_compiler.runtime.statistics import (
    attention_statistics,
    half_life_rate,
    normal_sums,
    output_sums,
)

B, T = 2, 75


def draw(batch: int = B, length: int = T, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, h, length, D, generator=gen) for h in (H, K, K))


def full_map(q, k, v, *, window: int | None, scale: float, softcap=0.0, slopes=(0.0,) * H, sinks=None, first=0) -> dict:
    """The definition: one row per head and token, in float64. With sinks, rows are of what falls on tokens."""
    q, k, v = (x.double() for x in (q, k, v))
    length = q.shape[2]
    out = {"distance": torch.zeros(H), "entropy": torch.zeros(H), "mass": torch.zeros(H, OCTAVES)}
    out = {n: t.double() for n, t in out.items()}
    context = torch.zeros(len(q), length, H, D, dtype=torch.float64)
    for h in range(H):
        kh, vh = k[:, h // (H // K)], v[:, h // (H // K)]
        for t in range(length):
            seen = [s for s in range(t + 1) if window is None or s > t - window or s < first]
            scores = scale * torch.einsum("bd,bsd->bs", q[:, h, t], kh[:, seen])
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            scores = scores - slopes[h] * (t - torch.tensor(seen))
            a = scores.softmax(-1)
            share = 1.0 if sinks is None else torch.sigmoid(scores.logsumexp(-1, keepdim=True) - sinks[h])
            context[:, t, h] = torch.einsum("bs,bsd->bd", share * a, vh[:, seen])
            out["entropy"][h] -= (a * a.log()).sum()
            for weight, s in zip(a.sum(0), seen, strict=True):
                far = t - s
                out["distance"][h] += weight * max(far, 0.5)
                out["mass"][h, far.bit_length()] += weight
    tokens = len(q) * length
    return {n: t / tokens for n, t in out.items()} | {"context": context}


CAP, ALIBI = {"softcap": 1.5}, {"slopes": (0.5, 0.1, -0.2, 0.0)}
SINKS = {"sinks": (0.0, 3.0, -2.0, 1.0)}
SHAPED = [(None, 0.3, {}), (1, 3.0, {}), (7, 3.0, {}), (None, 3.0, CAP), (7, 0.3, ALIBI), (None, 3.0, SINKS)]


@pytest.mark.parametrize("window, scale, scores", [*SHAPED, (7, 0.3, CAP | SINKS), (7, 3.0, {"first": 2})], ids=str)
def test_statistics_are_those_of_each_row(window, scale, scores):
    data = draw(length=40)
    stats, context = attention_statistics(*data, site=site(window, scale, **scores))
    exact = full_map(*data, window=window, scale=scale, **scores)
    for name in ("distance", "entropy", "mass"):
        torch.testing.assert_close(getattr(stats, name), exact[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(context.double(), exact["context"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.mass.sum(1), torch.ones(H, dtype=torch.float64))
    assert stats.tokens == 2 * 40


def test_statistics_of_parts_merge_to_those_of_the_whole():
    data = [x.double() for x in draw(batch=5)]
    whole, context = attention_statistics(*data, site=site())
    parts = [attention_statistics(*(x[s] for x in data), site=site()) for s in (slice(0, 2), slice(2, 5))]
    merged = parts[0][0].merge(parts[1][0])
    assert merged.tokens == whole.tokens
    for name, value in whole.sums.items():
        torch.testing.assert_close(merged.sums[name], value, rtol=1e-12, atol=1e-10)
    rows = (slice(0, 5), slice(0, 2), slice(2, 5))
    sums = [output_sums(*(x[r] for x in data), context[r].flip(-1), site=site()) for r in rows]
    joined = sums[1].merge(sums[2])
    for name in ("tokens", "co", "oo", "cn", "nn", "rms"):
        torch.testing.assert_close(getattr(joined, name), getattr(sums[0], name), rtol=1e-12, atol=1e-12)
    z = context.flatten(2)
    normal = [normal_sums(c, c[..., :3]) for c in (z, z[:2], z[2:])]
    for name in ("zz", "zr"):
        both = getattr(normal[1].merge(normal[2]), name)
        torch.testing.assert_close(both, getattr(normal[0], name), rtol=1e-12, atol=1e-12)


def test_a_head_that_looks_at_itself_has_no_distance_and_no_entropy():
    q, k, v = draw()
    stats, context = attention_statistics(q, k, v, site=site(window=1))
    assert (stats.distance == 0.5).all() and stats.entropy.abs().max() == 0 and (stats.mass[:, 0] == 1).all()
    torch.testing.assert_close(context, v.repeat_interleave(H // K, 1).transpose(1, 2))
    assert half_life_rate(stats.distance).max() <= 5


def test_distance_beyond_the_last_octave_is_counted_there():
    assert 1 << (OCTAVES - 2) > 100_000  # bins reach further than any calibration length
