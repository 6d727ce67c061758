"""tcal::cached_attention against attention over the whole sequence, row by row, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tcal_compiler.kernels.cached_attention import cached_attention, cached_attention_reference
from tcal_compiler.kernels.cached_attention.onnx_rule import is_fused, plain_form

HEADS, KV_HEADS, DIM, SCALE = 4, 2, 16, 0.3
ROWS = [[5, 1, 3], [2, 0, 9]]  # real tokens of each row in each chunk


def complex_rope(x: Tensor, rotated: int, interleaved: bool) -> Tensor:
    """Rotary positions of x [T, D] as products of complex numbers."""
    angles = torch.arange(len(x), dtype=x.dtype)[:, None] * rates(rotated)
    head = x[:, :rotated]
    pairs = head.unflatten(1, (-1, 2)) if interleaved else torch.stack(head.chunk(2, 1), -1)
    turned = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    )
    flat = turned.flatten(1) if interleaved else torch.cat(turned.unbind(-1), 1)
    return torch.cat((flat, x[:, rotated:]), 1)


def rates(rotated: int) -> Tensor:
    return 50.0 ** -torch.arange(0, 1, 2 / rotated, dtype=torch.float64)


def whole(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attention of one row, q [H, T, D], k and v [K, T, D], token by token."""
    out = torch.zeros(HEADS, q.shape[1], v.shape[2], dtype=q.dtype)
    for h in range(HEADS):
        for t in range(q.shape[1]):
            first = max(0, t + 1 - window) if window else 0
            keys, values = (x[h * KV_HEADS // HEADS, first : t + 1] for x in (k, v))
            out[h, t] = F.softmax(keys @ q[h, t] * SCALE, 0) @ values
    return out


@pytest.mark.parametrize("slots", [0, 40], ids=["grows", "one buffer"])
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("rotated, interleaved", [(0, False), (16, False), (16, True), (8, False)])
def test_ragged_chunks_are_single_whole_rows(slots: int, window: int, rotated: int, interleaved: bool):
    gen = torch.Generator().manual_seed(0)
    lengths = [sum(r) for r in ROWS]
    full = [torch.randn(2, n, 12, DIM, generator=gen, dtype=torch.float64) for n in (HEADS, KV_HEADS, KV_HEADS)]
    tables = {}
    if rotated:
        angles = torch.arange(60, dtype=torch.float64)[:, None] * rates(rotated)
        tables = {"cos": angles.cos(), "sin": angles.sin(), "interleaved": interleaved}
    past = torch.zeros(2, dtype=torch.int64)
    caches = [torch.full((2, KV_HEADS, slots, DIM), 77.0, dtype=torch.float64) for _ in range(2)]
    found, total = torch.zeros(2, HEADS, 12, DIM, dtype=torch.float64), 0
    for chunk in range(3):
        tokens = max(r[chunk] for r in ROWS)
        total += tokens
        new = [torch.randn(2, x.shape[1], tokens, DIM, generator=gen, dtype=torch.float64) for x in full]
        for b, row in enumerate(ROWS):
            for part, x in zip(new, full, strict=True):
                part[b, :, : row[chunk]] = x[b, :, past[b] : past[b] + row[chunk]]
        out, *caches = cached_attention(*new, *caches, past, total=total, scale=SCALE, window=window, **tables)
        assert caches[0].shape[2] == max(slots, total)
        for b, row in enumerate(ROWS):
            found[b, :, past[b] : past[b] + row[chunk]] = out[b, :, : row[chunk]]
        past = past + torch.tensor([r[chunk] for r in ROWS])
    for b, length in enumerate(lengths):
        q, k, v = (x[b, :, :length] for x in full)
        if rotated:
            q, k = (torch.stack([complex_rope(h, rotated, interleaved) for h in x]) for x in (q, k))
        torch.testing.assert_close(found[b, :, :length], whole(q, k, v, window), rtol=0, atol=1e-12)


def arguments(tokens: int = 3, value_dim: int = DIM) -> tuple[Tensor, ...]:
    gen = torch.Generator().manual_seed(1)
    shapes = [(2, HEADS, tokens, DIM), (2, KV_HEADS, tokens, DIM), (2, KV_HEADS, tokens, value_dim)]
    shapes += [(2, KV_HEADS, 5, DIM), (2, KV_HEADS, 5, value_dim)]
    return (*(torch.randn(s, generator=gen) for s in shapes), torch.tensor([5, 2]))


def test_the_op_keeps_pytorch_rules():
    tables = (torch.rand(9, 8), torch.rand(9, 8), False)
    torch.library.opcheck(torch.ops.tcal.cached_attention, (*arguments(), 8, SCALE, 0, *tables))
    torch.library.opcheck(
        torch.ops.tcal.cached_attention, (*arguments()[:5], torch.tensor([2, 1]), 5, SCALE, 3, None, None, False)
    )


def test_the_plain_form_is_the_op_and_leaves_what_is_fused():
    args = arguments(value_dim=12)
    assert not is_fused(DIM, 12)
    expected = cached_attention_reference(*args, total=8, scale=SCALE, window=4)
    for a, b in zip(plain_form(*args, 8, SCALE, 4, None, None, False), expected, strict=True):
        torch.testing.assert_close(a[0], b[0])
        torch.testing.assert_close(a[1, :, :5], b[1, :, :5])  # what lies behind the last token is free
    assert plain_form(*arguments(), 8, SCALE, 4, None, None, False) is NotImplemented


def test_shapes_that_do_not_fit():
    q, *rest = arguments()
    with pytest.raises(ValueError, match="want q"):
        cached_attention(q[:, :3], *rest, total=8, scale=SCALE)
