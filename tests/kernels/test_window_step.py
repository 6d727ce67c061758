"""tcal::window_rows and tcal::window_step: chunk by chunk what attention over the whole row gives, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcal_compiler.kernels.local_attention import (
    WindowRows,
    window_rows,
    window_rows_reference,
    window_step,
    window_step_reference,
)
from tcal_compiler.kernels.local_attention.onnx_rule import translation_table

SCALE = 0.7
ROWS = [[5, 1, 3, 150, 1], [2, 0, 9, 1, 140], [0, 1, 1, 70, 200]]  # real tokens of each row in each chunk
FORMS = [  # window, whether it sees the first token, slots of the state and whether one is for a first token
    (4, False, 3, False),
    (4, True, 4, True),
    (5, False, 9, True),
    (1, False, 1, False),
    (1, True, 2, True),
    (90, True, 90, True),
    (200, False, 260, True),
]
HEADS = [(4, 2, 8, 8), (3, 3, 8, 6), (4, 1, 4, 8)]  # query heads, key heads, channels of keys and values


def sizes(form: tuple[Any, ...], heads: int, kv_heads: int) -> dict[str, Any]:
    return dict(zip(("window", "first", "slots", "front"), form, strict=True)) | {"heads": heads, "kv_heads": kv_heads}


def inputs(shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float64, rows: int = 3) -> list[Tensor]:
    heads, kv_heads, key_dim, value_dim = shape
    gen = torch.Generator().manual_seed(count)
    parts = (heads, key_dim), (kv_heads, key_dim), (kv_heads, value_dim)
    return [torch.randn(rows, h, count, d, generator=gen, dtype=torch.float64).to(dtype) for h, d in parts]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_ragged_chunks_are_whole_rows(form: tuple[Any, ...], shape: tuple[int, ...]):
    heads, kv_heads, key_dim, value_dim = shape
    whole = inputs(shape, max(map(sum, ROWS)))
    steps = torch.arange(whole[0].shape[2])
    behind = steps[:, None] - steps
    seen = (behind >= 0) & ((behind < form[0]) | (steps < form[1]))
    exact = F.scaled_dot_product_attention(*whole, attn_mask=seen, scale=SCALE, enable_gqa=True)
    past = torch.zeros(3, dtype=torch.int64)
    state = torch.full((3, 2 * form[2], kv_heads * max(key_dim, value_dim)), 77.0, dtype=torch.float64)
    for chunk in range(len(ROWS[0])):
        new_lengths = torch.tensor([row[chunk] for row in ROWS])
        tokens = torch.zeros(3, int(new_lengths.max()))
        new = [torch.full((3, x.shape[1], tokens.shape[1], x.shape[3]), 99.0).double() for x in whole]
        for b, count in enumerate(new_lengths.tolist()):
            for part, x in zip(new, whole, strict=True):
                part[b, :, :count] = x[b, :, past[b] : past[b] + count]
        rows = window_rows(tokens, past, new_lengths, state, **sizes(form, heads, kv_heads))
        found, state = window_step(*new, state, rows, SCALE)
        for b, count in enumerate(new_lengths.tolist()):
            expected = exact[b, :, past[b] : past[b] + count]
            torch.testing.assert_close(found[b, :, :count], expected, rtol=0, atol=1e-12)
        past = past + new_lengths


def test_a_long_chunk_is_not_quadratic():
    rows = window_rows_reference(
        torch.zeros(1, 5000), torch.tensor([3]), torch.tensor([5000]), torch.zeros(1), **sizes(FORMS[0], 4, 2)
    )
    assert rows.mask.shape == (1, 79, 1, 128, 67) and rows.keys.shape == (1, 79, 2, 67)
    one = window_rows_reference(
        torch.zeros(1, 1), torch.tensor([3]), torch.tensor([1]), torch.zeros(1), **sizes(FORMS[0], 4, 2)
    )
    assert one.mask.shape == (1, 1, 1, 2, 4)


def test_ops():
    tokens, past, new = torch.zeros(2, 3), torch.tensor([1, 9]), torch.tensor([3, 2])
    state = torch.zeros(2, 8, 16)
    args = (tokens, past, new, state, *sizes(FORMS[1], 4, 2).values())
    torch.library.opcheck(torch.ops.tcal.window_rows.default, args)
    rows = window_rows_reference(*args[:4], **sizes(FORMS[1], 4, 2))
    qkv = inputs(HEADS[0], 3, torch.float32, rows=2)
    torch.library.opcheck(torch.ops.tcal.window_step.default, (*qkv, state, *rows, SCALE))
    found = window_step(*qkv, state, rows, SCALE)
    torch.testing.assert_close(found, window_step_reference(*qkv, state, rows=rows, scale=SCALE))
    with pytest.raises(ValueError, match="want q"):
        window_step(qkv[0][:, :3], *qkv[1:], state, rows, SCALE)


class TwoChunks(nn.Module):
    """Some of FORMS, a chunk and another behind it, of rows with padding at their ends."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, more: Tensor) -> tuple[Tensor, ...]:
        found: list[Any] = []
        for form in (FORMS[0], FORMS[2], FORMS[5]):
            state = q.new_zeros(1, 2 * form[2], k.shape[1] * max(k.shape[3], v.shape[3])).expand(q.shape[0], -1, -1)
            past = torch.zeros_like(lengths)
            for count in (lengths, more):
                like = q[:, 0, :, 0]
                rows = window_rows(like, past, count, state, **sizes(form, q.shape[1], k.shape[1]))
                out, state = window_step(q, k, v, state, WindowRows(*rows), SCALE)
                past = past + count
                found += [out, state]
        return tuple(found)


@pytest.mark.parametrize("shape", HEADS[:2], ids=str)
def test_onnx_runtime_gives_the_same(tmp_path, shape: tuple[int, ...]):
    import onnxruntime

    path, batch, length = tmp_path / "model.onnx", torch.export.Dim("batch"), torch.export.Dim("length")
    traced = (*inputs(shape, 6, torch.float32), torch.tensor([5, 6, 0]), torch.tensor([6, 1, 2]))
    dims = ({0: batch, 2: length},) * 3 + ({0: batch},) * 2
    program = torch.export.export(TwoChunks(), traced, dynamic_shapes=dims, strict=False)
    exported = torch.onnx.export(
        program, (), None, dynamo=True, opset_version=21, custom_translation_table=translation_table(), verbose=False
    )
    assert exported is not None
    exported.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    for count, lengths in (
        (6, ([5, 6, 0], [6, 1, 2])),
        (1, ([1, 0, 1], [1, 1, 0])),
        (170, ([90, 3, 170], [64, 170, 2])),
    ):
        args = (*inputs(shape, count, torch.float32), *map(torch.tensor, lengths))
        found = session.run(None, dict(zip(names, (a.numpy() for a in args), strict=True)))
        for mine, expected in zip(found, TwoChunks()(*args), strict=True):
            torch.testing.assert_close(torch.from_numpy(mine), expected, rtol=0, atol=3e-6)
