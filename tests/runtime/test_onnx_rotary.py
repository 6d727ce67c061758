"""Rotary positions of an exported graph: one operator, in ONNX Runtime with torch's numbers; near misses stay."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from tcal_compiler.runtime.onnx_rotary import fuse_rotary

HEADS, DIM = 3, 8


def angles(positions: Tensor, channels: int) -> Tensor:
    return positions[..., None].float() * 100.0 ** (-torch.arange(channels) / channels)


def turn(x: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat((-right, left), -1)


def turn_by_slices(x: Tensor) -> Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)


class Rotated(nn.Module):
    """Queries [B, T, H D] of heads, and keys that come with heads apart, with the tables of one call."""

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        half = angles(positions, DIM // 2)
        both = torch.cat((half, half), -1)
        cos, sin = 1.5 * both.cos()[:, None], 1.5 * both.sin()[:, None]
        q, k = (2 * x).view(*x.shape[:2], HEADS, DIM).transpose(1, 2), x.unflatten(2, (HEADS, DIM)).transpose(1, 2) + 1
        return (q * cos + turn(q) * sin).transpose(1, 2), (turn_by_slices(k) * sin + cos * k) / 3


class UnequalHalves(nn.Module):
    """Every channel with an angle of its own: no rotation."""

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        cos, sin = (f(angles(positions, DIM))[:, None] for f in (torch.cos, torch.sin))
        q = x.view(*x.shape[:2], HEADS, DIM).transpose(1, 2)
        return ((q * cos + turn(q) * sin) / 3,)


class WrongTurn(nn.Module):
    """[x2, -x1] and [-x2, x2] are not what the operator computes."""

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        half = angles(positions, DIM // 2)
        cos, sin = (f(torch.cat((half, half), -1))[:, None] for f in (torch.cos, torch.sin))
        q = x.view(*x.shape[:2], HEADS, DIM).transpose(1, 2)
        left, right = q.chunk(2, -1)
        turned = torch.cat((right, -left), -1), torch.cat((-right, right), -1)
        return tuple((q * cos + t * sin) / 3 for t in turned)


def exported(model: nn.Module, folder: Path) -> tuple[list[np.ndarray], list[Tensor], Counter[str], int]:
    """Outputs in ONNX Runtime and of torch in float64, the model's operators, and the number of rotations found."""
    x = torch.randn(2, 5, HEADS * DIM, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3, 4], [900, 7, 7, 2, 0]])  # in no order, and other ones in each row
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    shapes = ({0: batch, 1: tokens}, {0: batch, 1: tokens})
    program = torch.export.export(model, (x, positions), dynamic_shapes=shapes)
    onnx_program = torch.onnx.export(program, dynamo=True, opset_version=21, verbose=False)
    assert onnx_program is not None
    count = fuse_rotary(onnx_program.model)
    path = folder / "model.onnx"
    onnx_ir.save(onnx_program.model, path)
    onnx.checker.check_model(str(path))
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    fed = {i.name: v.numpy() for i, v in zip(session.get_inputs(), (x, positions), strict=True)}
    ops = Counter(n.op_type for n in onnx.load(path).graph.node)
    return session.run(None, fed), list(model(x.double(), positions)), ops, count


def test_every_rotation_is_one_operator_at_any_positions(tmp_path: Path):
    found, exact, ops, count = exported(Rotated(), tmp_path)
    assert count == ops["RotaryEmbedding"] == 2 and ops["Neg"] == 0
    for got, want in zip(found, exact, strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", [UnequalHalves(), WrongTurn()], ids=["unequal halves", "wrong turn"])
def test_what_is_no_rotation_stays(model: nn.Module, tmp_path: Path):
    found, exact, ops, count = exported(model, tmp_path)
    assert count == ops["RotaryEmbedding"] == 0
    for got, want in zip(found, exact, strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-5, atol=1e-5)
