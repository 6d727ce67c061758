"""The gates against their formulas and their gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support import assert_within_budget

from tcal_compiler.kernels.gated_rms_norm import gated_rms_norm
from tcal_compiler.kernels.gates import decay_gate, l2_normalize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_decay_gate_is_its_formula():
    a, a_log, bias = randn(2, 5, 3), randn(3, seed=1), randn(3, seed=2)
    g = decay_gate(a, a_log, bias)
    for h in range(3):
        expected = -math.exp(a_log[h]) * math.log1p(math.exp(a[1, 4, h] + bias[h]))
        assert g[1, 4, h].item() == pytest.approx(expected, rel=1e-12)
    assert (g <= 0).all()


def test_decay_gate_does_not_overflow():
    g = decay_gate(torch.tensor([[200.0], [-200.0]]), torch.zeros(1), torch.zeros(1))
    assert g.flatten().tolist() == [-200.0, 0.0]


def test_l2_normalize():
    x = randn(3, 7)
    torch.testing.assert_close(l2_normalize(x), F.normalize(x, dim=-1), rtol=1e-6, atol=0)
    assert l2_normalize(torch.zeros(2, 4)).count_nonzero() == 0
    half = torch.full((1, 64), 60000.0, dtype=torch.float16)  # its square is beyond float16
    torch.testing.assert_close(l2_normalize(half), torch.full((1, 64), 0.125))


def test_gated_rms_norm_is_its_formula():
    o, gate, weight = randn(2, 5, 3, 8), randn(2, 5, 3, 8, seed=1), randn(3, 8, seed=2)
    rms = (o.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(gated_rms_norm(o, gate, weight), o / rms * weight * gate * gate.sigmoid())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulation_is_float32_at_least(dtype):
    o, gate, weight = (x.to(dtype) for x in (randn(2, 5, 3, 8), randn(2, 5, 3, 8, seed=1), randn(3, 8, seed=2)))
    exact = gated_rms_norm(o.double(), gate.double(), weight.double())
    actual = gated_rms_norm(o, gate, weight)
    assert actual.dtype == torch.float32 and exact.dtype == torch.float64
    assert_within_budget("gated_rms_norm", actual=actual, exact=exact, naive=actual.double(), factor=1)
    exact, actual = decay_gate(o.double(), weight[0].double(), weight[1].double()), decay_gate(o, weight[0], weight[1])
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-7)


def test_gradients():
    def leaf(*shape: int, seed: int) -> torch.Tensor:
        return randn(*shape, seed=seed).requires_grad_()

    assert torch.autograd.gradcheck(decay_gate, (leaf(1, 3, 2, seed=0), leaf(2, seed=1), leaf(2, seed=2)))
    assert torch.autograd.gradcheck(l2_normalize, (leaf(2, 4, seed=0),))
    norm = (leaf(2, 2, 4, seed=0), leaf(2, 2, 4, seed=1), leaf(2, 4, seed=2))
    assert torch.autograd.gradcheck(gated_rms_norm, norm)
