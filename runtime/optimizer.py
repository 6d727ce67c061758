"""Muon for stacks of matrices: every site's matrix is orthogonalised on its own, all of them in one batched product."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# Five steps of x <- a x + (b x x^T + c (x x^T)^2) x bring singular values from (0, 1] to about 0.7..1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalize(matrices: Tensor, *, products: torch.dtype | None = None) -> Tensor:
    """The nearest semi-orthogonal matrices U V^T of matrices = U S V^T [L, R, C], roughly, by Newton-Schulz iteration.

    Coefficients: Keller Jordan et al., Muon (2024). Singular values of the result lie in about 0.7 to 1.2, and those
    far below the largest are smaller still; an all-zero matrix stays zero.

    products: their dtype; by default bfloat16 on CUDA, which turns the result by some hundredths of its norm and leaves
    its singular values in that range, else that of matrices.
    """
    a, b, c = QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-30)
    x = x.to(products or (torch.bfloat16 if x.is_cuda else x.dtype))
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class StackedMuon(torch.optim.Optimizer):
    """Per matrix W [R, C] of a stack [L, R, C], with gradient G:

        M <- momentum M + G
        W <- (1 - lr weight_decay) W - lr s sqrt(max(R, C)) orthogonalize(G + momentum M)

    An entry's root mean square step is lr s, with a size s of each matrix [L], so that a step is as large a part of a
    matrix whatever the scale of a model's weights is. torch.optim.Muon takes single matrices only, and would
    orthogonalise one site after another.

    Args:
        params: stacks, each with its sizes.
    """

    def __init__(
        self, params: Iterable[tuple[Tensor, Tensor]], lr: float, momentum: float, weight_decay: float
    ) -> None:
        groups = [{"params": [p], "size": size} for p, size in params]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                m = state["momentum"].mul_(group["momentum"]).add_(p.grad)
                update = orthogonalize(p.grad + group["momentum"] * m)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                step = group["lr"] * group["size"] * max(p.shape[1:]) ** 0.5
                p.sub_(update * step.view(-1, 1, 1))
