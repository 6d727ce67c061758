"""Muon over a stack: semi-orthogonal steps, each matrix on its own."""

from __future__ import annotations

import pytest
import torch

from tcal_compiler.runtime.optimizer import StackedMuon, orthogonalize


@pytest.mark.parametrize("shape", [(3, 24, 40), (3, 40, 24), (2, 16, 16)])
def test_orthogonalize_keeps_the_singular_vectors_and_levels_the_values(shape):
    gen = torch.Generator().manual_seed(0)
    matrices = torch.randn(*shape, generator=gen)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalize(matrices)
    inner = u.mT @ found @ vh.mT  # diagonal when the singular vectors are the same
    values = inner.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(inner, torch.diag_embed(values), rtol=0, atol=1e-3)
    assert values[:, :-2].min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("shape", [(3, 48, 96), (2, 64, 64)])
def test_bfloat16_products_turn_the_result_a_little(shape):
    matrices = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    exact = orthogonalize(matrices, products=torch.float64)
    found = orthogonalize(matrices, products=torch.bfloat16)
    assert found.dtype == torch.float32 and exact.dtype == torch.float32
    assert 1e-4 < (found - exact).norm() / exact.norm() < 0.03
    assert (torch.linalg.svdvals(found) - torch.linalg.svdvals(exact)).abs().max() < 0.03


def test_orthogonalize_ignores_scale_and_keeps_zero():
    matrices = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(orthogonalize(1e-6 * matrices), orthogonalize(matrices), rtol=1e-3, atol=1e-4)
    assert orthogonalize(torch.zeros(1, 8, 12)).eq(0).all()


def test_a_step_is_the_formula_and_sites_do_not_touch():
    gen = torch.Generator().manual_seed(2)
    start, grads = torch.randn(2, 6, 10, generator=gen), [torch.randn(2, 6, 10, generator=gen) for _ in range(2)]
    lr, momentum, decay = 0.1, 0.7, 0.3
    stack, size = start.clone().requires_grad_(), torch.tensor([0.5, 2.0])
    optimizer = StackedMuon([(stack, size)], lr=lr, momentum=momentum, weight_decay=decay)
    for g in grads:
        stack.grad = g.clone()
        optimizer.step()
    for site in range(2):
        w, m = start[site].clone(), torch.zeros(6, 10)
        for g in grads:
            m = momentum * m + g[site]
            update = orthogonalize((g[site] + momentum * m)[None])[0]
            w = (1 - lr * decay) * w - lr * size[site] * 10**0.5 * update
        torch.testing.assert_close(stack[site], w, rtol=1e-4, atol=1e-5)
