"""Rotary embeddings written with complex numbers, against the same module run by PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tcal_compiler.errors import UnsupportedModelError
from tcal_compiler.passes.graph import from_program
from tcal_compiler.passes.lower_complex import without_complex


class Rotary(nn.Module):
    """As DeepSeek-V2 writes it."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        angles = positions[..., None].float() * torch.tensor([1.0, 0.1, 0.01])
        turns = torch.polar(torch.full_like(angles, 0.9), angles) * 1.5
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns.unsqueeze(1) * torch.arange(1.0, 4.0)).flatten(3)


class Conjugate(nn.Module):
    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))).abs().to(torch.complex64))


def graph_of(module: nn.Module) -> tuple[torch.fx.GraphModule, tuple[Tensor, Tensor]]:
    args = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0)), torch.arange(5).expand(2, 5)
    return from_program(torch.export.export(module.eval(), args)), args


def test_the_same_values_without_a_complex_tensor():
    gm, args = graph_of(Rotary())
    lowered = without_complex(gm)
    torch.testing.assert_close(lowered(*args), Rotary()(*args), rtol=1e-6, atol=1e-6)
    assert "complex" not in lowered.code and "polar" not in lowered.code and "polar" in gm.code
    assert without_complex(lowered) is lowered


def test_other_complex_operations_are_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"aten\.abs"):
        without_complex(graph_of(Conjugate())[0])
