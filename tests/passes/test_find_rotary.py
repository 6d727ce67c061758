"""Rotary positions are found by what they compute: tables against the formula, and near misses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcal_compiler.errors import UnsupportedModelError
from tcal_compiler.passes.capture import capture_program, export_module
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.passes.find_rotary import Rotary, find_rotary

VOCAB, HEADS, DIM, ROWS = 32, 2, 16, 100


def angles(tokens: int, rotated: int) -> Tensor:
    return torch.arange(tokens)[:, None] * 100.0 ** -torch.arange(0, 1, 2 / rotated)


def half_split(x: Tensor, rotated: int = DIM, stretch: float = 1.0) -> Tensor:
    """x [B, H, T, D]; stretch scales the turned channels, as YaRN does."""
    a, rest = angles(x.shape[2], rotated), x[..., rotated:]
    first, second = x[..., :rotated].chunk(2, -1)
    cos, sin = a.cos() * stretch, a.sin() * stretch
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


def interleaved(x: Tensor) -> Tensor:
    a = angles(x.shape[2], DIM)
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * a.cos() - odd * a.sin(), odd * a.cos() + even * a.sin()), -1).flatten(-2)


def before_heads(x: Tensor) -> Tensor:
    """The same on [B, T, H, D]."""
    y, a = x.transpose(1, 2).contiguous(), angles(x.shape[2], DIM)[:, None]
    first, second = y.chunk(2, -1)
    turned = torch.cat((first * a.cos() - second * a.sin(), second * a.cos() + first * a.sin()), -1)
    return turned.transpose(1, 2)


def slower_when_long(x: Tensor) -> Tensor:
    """Half the angles for sequences of more than 60 tokens, as longrope does."""
    steps = torch.arange(x.shape[2])
    a = angles(x.shape[2], DIM) * torch.where(steps.max() > 60, 0.5, 1.0)
    first, second = x.chunk(2, -1)
    return torch.cat((first * a.cos() - second * a.sin(), second * a.cos() + first * a.sin()), -1)


TURNS = {
    "half split": half_split,
    "interleaved": interleaved,
    "before heads": before_heads,
    "stretched": lambda x: half_split(x, stretch=1.3),
    "no positions": lambda x: x * 2,
    "added": lambda x: x + angles(x.shape[2], 2 * DIM).sin(),
    "scaled by position": lambda x: x * (1 + angles(x.shape[2], 2 * DIM)),
    "head dependent": lambda x: torch.cat((half_split(x[:, :1]), x[:, 1:]), 1),
    "norm behind": lambda x: F.normalize(half_split(x), dim=-1),
    "slower when long": slower_when_long,
    "8 of 16 channels": lambda x: half_split(x, 8),
}


class Model(nn.Module):
    def __init__(self, turn_q: str, turn_k: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = HEADS * DIM
        self.turns = TURNS[turn_q], TURNS[turn_k]
        self.embed, self.norm = nn.Embedding(VOCAB, width), nn.RMSNorm(DIM)
        self.qkv, self.out, self.head = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        b, t = input_ids.shape
        q, k, v = (z.view(b, t, HEADS, DIM).transpose(1, 2) for z in self.qkv(self.embed(input_ids)).chunk(3, -1))
        q, k = self.turns[0](self.norm(q)), self.turns[1](self.norm(k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(self.out(y.transpose(1, 2).reshape(b, t, -1)))


def found(turn_q: str, turn_k: str | None = None) -> Rotary | None:
    model = Model(turn_q, turn_k or turn_q).eval()
    program = export_module(model, has_positions=False, vocab_size=VOCAB)
    capture = capture_program(program, teacher=model, implementation="test", shapes=((2, 9),))
    (site,) = find_attention(capture).sites
    return find_rotary(capture, site, rows=ROWS)


@pytest.mark.parametrize("turn", ["half split", "interleaved", "before heads", "stretched"])
def test_tables_are_those_of_the_formula(turn: str):
    rotary = found(turn)
    assert rotary is not None
    assert rotary.interleaved == (turn == "interleaved") and rotary.token_axis == (1 if turn == "before heads" else 2)
    factor = 1.3 if turn == "stretched" else 1.0
    torch.testing.assert_close(rotary.cos, angles(ROWS, DIM).cos() * factor)
    torch.testing.assert_close(rotary.sin, angles(ROWS, DIM).sin() * factor)


@pytest.mark.parametrize(
    "turn", ["no positions", "added", "scaled by position", "head dependent", "norm behind", "8 of 16 channels"]
)
def test_near_misses(turn: str):
    assert found(turn) is None


def test_q_and_k_must_turn_alike():
    assert found("half split", "stretched") is None and found("half split", "no positions") is None
    assert math.prod((ROWS, DIM // 2)) == found("half split").cos.numel()  # type: ignore[union-attr]


def test_angles_that_change_with_the_length_are_no_table():
    with pytest.raises(
        UnsupportedModelError, match=r"angles change with the length of the sequence, .*48 and 100"
    ) as e:
        found("slower when long")
    assert "max_length" in e.value.hint
