"""tcal::cached_attention against attention over the whole sequence, row by row, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tcal_compiler.kernels.cached_attention import cached_attention, cached_attention_reference
from tcal_compiler.kernels.cached_attention.onnx_rule import decompose_plain, is_fused, plain_form, translation_table
from tcal_compiler.kernels.scores import Scores

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


SHAPED = {
    "softcap": 1.5,
    "slopes": torch.tensor([0.5, 0.1, -0.2, 0.0], dtype=torch.float64),
    "sinks": torch.tensor([0.0, 3.0, -2.0, 1.0], dtype=torch.float64),
    "first": 2,
}


def whole(q: Tensor, k: Tensor, v: Tensor, window: int, softcap=0.0, slopes=None, sinks=None, first=0) -> Tensor:
    """Attention of one row, q [H, T, D], k and v [K, T, D], token by token."""
    out = torch.zeros(HEADS, q.shape[1], v.shape[2], dtype=q.dtype)
    for h in range(HEADS):
        for t in range(q.shape[1]):
            seen = torch.tensor([s for s in range(t + 1) if not window or s > t - window or s < first])
            keys, values = (x[h * KV_HEADS // HEADS, seen] for x in (k, v))
            scores = keys @ q[h, t] * SCALE
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            scores = scores if slopes is None else scores - slopes[h] * (t - seen)
            share = 1.0 if sinks is None else torch.sigmoid(scores.logsumexp(0) - sinks[h])
            out[h, t] = share * F.softmax(scores, 0) @ values
    return out


ROTATIONS = [(0, False), (16, False), (16, True), (8, False)]
PLAIN = [(slots, window, *r, ()) for slots in (0, 40) for window in (0, 4) for r in ROTATIONS]
OTHERS = [(0, 0, 0, False, ("softcap",)), (40, 4, 16, False, ("slopes",)), (40, 4, 0, False, ("sinks",))]
OTHERS += [(40, 4, 16, False, ("first",)), (0, 0, 0, False, ("first",))]


@pytest.mark.parametrize(
    "slots, window, rotated, interleaved, shaped", [*PLAIN, *OTHERS, (0, 4, 16, True, tuple(SHAPED))], ids=str
)
def test_ragged_chunks_are_single_whole_rows(
    slots: int, window: int, rotated: int, interleaved: bool, shaped: tuple[str, ...]
):
    scores = {name: SHAPED[name] for name in shaped}
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
        out, *caches = cached_attention(
            *new, *caches, past, total=total, scores=Scores(SCALE, window, **scores), **tables
        )
        assert caches[0].shape[2] == max(slots, total)
        for b, row in enumerate(ROWS):
            found[b, :, past[b] : past[b] + row[chunk]] = out[b, :, : row[chunk]]
        past = past + torch.tensor([r[chunk] for r in ROWS])
    for b, length in enumerate(lengths):
        q, k, v = (x[b, :, :length] for x in full)
        if rotated:
            q, k = (torch.stack([complex_rope(h, rotated, interleaved) for h in x]) for x in (q, k))
        torch.testing.assert_close(found[b, :, :length], whole(q, k, v, window, **scores), rtol=0, atol=1e-12)


def arguments(tokens: int = 3, value_dim: int = DIM) -> tuple[Tensor, ...]:
    gen = torch.Generator().manual_seed(1)
    shapes = [(2, HEADS, tokens, DIM), (2, KV_HEADS, tokens, DIM), (2, KV_HEADS, tokens, value_dim)]
    shapes += [(2, KV_HEADS, 5, DIM), (2, KV_HEADS, 5, value_dim)]
    return (*(torch.randn(s, generator=gen) for s in shapes), torch.tensor([5, 2]))


def test_the_op_keeps_pytorch_rules():
    tables = (torch.rand(9, 8), torch.rand(9, 8), False)
    torch.library.opcheck(torch.ops.tcal.cached_attention, (*arguments(), 8, *tables, SCALE))
    values = (1.5, torch.rand(HEADS), torch.rand(HEADS), 2)
    torch.library.opcheck(torch.ops.tcal.cached_attention, (*arguments(), 8, *tables, SCALE, 0, *values))
    torch.library.opcheck(
        torch.ops.tcal.cached_attention, (*arguments()[:5], torch.tensor([2, 1]), 5, None, None, False, SCALE, 3)
    )


def test_the_plain_form_is_the_op():
    args = arguments(value_dim=12)
    assert not is_fused(DIM, 12)
    expected = cached_attention_reference(*args, total=8, scores=Scores(SCALE, 4))
    for a, b in zip(plain_form(*args, 8, None, None, False, SCALE, 4), expected, strict=True):
        torch.testing.assert_close(a[0], b[0])
        torch.testing.assert_close(a[1, :, :5], b[1, :, :5])  # what lies behind the last token is free


class TwoChunks(torch.nn.Module):
    """q [1, 4, 8, D] in chunks of 3 and 5, for cores that ONNX Runtime fuses and for one that it does not."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        outs = []
        f32: dict[str, Any] = {name: x.float() if isinstance(x, Tensor) else x for name, x in SHAPED.items()}
        fused = [(name,) for name in f32] + [("slopes", "first")]
        for names, dim in (*((n, DIM) for n in fused), (tuple(f32), 12)):
            caches = [k.new_zeros(1, KV_HEADS, 0, d) for d in (DIM, dim)]
            for new, past in ((slice(0, 3), 0), (slice(3, 8), 3)):
                parts = (q[:, :, new], k[:, :, new], v[:, :, new, :dim])
                scores = Scores(SCALE, 4, **{name: f32[name] for name in names})
                total = past + q[:, :, new].shape[2]
                out, *caches = cached_attention(*parts, *caches, torch.tensor([past]), total=total, scores=scores)
                outs.append(out)
        return tuple(outs)


def test_onnx_runtime_gives_the_same(tmp_path):
    import onnx
    import onnxruntime

    gen = torch.Generator().manual_seed(2)
    args = tuple(torch.randn(1, n, 8, DIM, generator=gen) for n in (HEADS, KV_HEADS, KV_HEADS))
    program = decompose_plain(torch.export.export(TwoChunks(), args), fused=True)
    path = tmp_path / "model.onnx"
    exported = torch.onnx.export(
        program, (), None, dynamo=True, opset_version=21, custom_translation_table=translation_table(), verbose=False
    )
    exported.save(path)
    nodes = [n for n in onnx.load(path).graph.node if n.op_type == "GroupQueryAttention"]
    assert len(nodes) == 10 and {len(n.input) for n in nodes} == {7, 11, 12}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    found = session.run(None, dict(zip(names, (a.numpy() for a in args), strict=True)))
    for mine, expected in zip(found, TwoChunks()(*args), strict=True):
        torch.testing.assert_close(torch.from_numpy(mine), expected, rtol=0, atol=2e-6)


def test_shapes_that_do_not_fit():
    q, *rest = arguments()
    with pytest.raises(ValueError, match=r"want sinks \[H\].*got \(3,\)"):
        cached_attention(q, *rest, total=8, scores=Scores(SCALE, sinks=torch.zeros(3)))
    with pytest.raises(ValueError, match="want q"):
        cached_attention(q[:, :3], *rest, total=8, scores=Scores(SCALE))
