"""Attention with a window as state in ONNX: plain operators, of which those for `window_rows` stand there once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .step import BLOCK


def translation_table() -> dict[Any, Callable[..., Any]]:
    """custom_translation_table of torch.onnx.export for tcal::window_rows and tcal::window_step, in float32."""
    import onnxscript

    op: Any = onnxscript.opset21  # its stubs do not know constants
    return {
        torch.ops.tcal.window_rows.default: lambda *args: _Rows(op, *args).all(),
        torch.ops.tcal.window_step.default: lambda *args: _step(op, *args),
    }


class _Rows:
    """`window_rows_reference` with few operators, each of which every step runs; sizes are scalars."""

    def __init__(
        self,
        op: Any,
        tokens: Any,
        past_lengths: Any,
        new_lengths: Any,
        like: Any,
        window: int,
        first: bool,
        slots: int,
        front: bool,
        heads: int,
        kv_heads: int,
    ) -> None:
        self.op, self.past_lengths, self.new_lengths = op, past_lengths, new_lengths
        self.window, self.first, self.slots, self.front = window, first, slots, front
        self.heads, self.kv_heads, self.group = heads, kv_heads, heads // kv_heads
        shape = op.Shape(tokens)
        self.length = op.Gather(shape, self.number(1))
        self.size = op.Min(self.length, self.number(max(slots + 1, BLOCK)))
        self.last = op.Sub(self.length, self.number(1))
        self.start = self.unsqueeze(self.range(self.length, self.size), 1, 2)
        self.column = self.range(op.Add(self.size, self.number(slots)))
        self.source = op.Add(self.start, self.column)
        self.inner = self.range(op.Mul(self.size, self.number(self.group)))
        self.in_block = op.Mod(self.inner, self.size)
        self.row = self.range(op.Gather(shape, self.number(0)))
        self.all_slots = op.Add(self.length, self.number(slots))

    def number(self, n: int) -> Any:
        return self.op.Constant(value_int=n)

    def vector(self, *n: int) -> Any:
        return self.op.Constant(value_ints=list(n))

    def range(self, end: Any, step: Any = None) -> Any:
        return self.op.Range(self.number(0), end, self.number(1) if step is None else step)

    def unsqueeze(self, x: Any, *axes: int) -> Any:
        return self.op.Unsqueeze(x, self.vector(*axes))

    def all(self) -> tuple[Any, ...]:
        op, slots = self.op, self.number(self.slots)
        place = op.Min(self.source, op.Add(self.last, slots))
        kept = self.vector(*range(self.slots))
        held = op.Add(self.unsqueeze(self.new_lengths, 1), kept)
        if self.front:
            own = op.Where(op.Greater(self.past_lengths, self.number(0)), self.number(0), slots)
            place = op.Where(op.Less(self.column, self.number(1)), self.unsqueeze(own, 1, 2, 3), place)
            held = op.Where(op.Less(kept, self.number(1)), self.unsqueeze(own, 1), held)
        keys, values = self.keys_and_values(place)
        return keys, values, self.queries(), self.context(), self.held(held), self.mask()

    def head(self) -> Any:
        return self.unsqueeze(self.vector(*range(self.kv_heads)), 1)

    def keys_and_values(self, place: Any) -> Iterator[Any]:
        """place [B or 1, nb, 1, J]."""
        op, kv_heads, slots = self.op, self.number(self.kv_heads), self.number(self.slots * self.kv_heads)
        half = op.Mul(self.all_slots, kv_heads)
        row = op.Mul(self.unsqueeze(self.row, 1, 2, 3), op.Mul(half, self.number(2)))
        base = op.Add(op.Add(op.Mul(place, kv_heads), self.head()), row)
        new = op.GreaterOrEqual(place, self.number(self.slots))
        yield op.Add(base, op.Where(new, slots, self.number(0)))
        yield op.Add(base, op.Where(new, half, slots))

    def held(self, place: Any) -> Any:
        op, slots = self.op, self.number(self.slots)
        new = op.GreaterOrEqual(place, slots)
        shifts = op.Where(new, slots, self.number(0)), op.Where(new, self.all_slots, slots)
        return self.unsqueeze(op.Concat(*(op.Add(place, s) for s in shifts), axis=1), 2)

    def queries(self) -> Any:
        op = self.op
        row = op.Mul(self.unsqueeze(self.row, 1, 2, 3), self.length)
        token = op.Add(row, op.Min(op.Add(self.start, self.in_block), self.last))
        heads = op.Add(op.Mul(self.head(), self.number(self.group)), op.Div(self.inner, self.size))
        return op.Add(op.Mul(token, self.number(self.heads)), heads)

    def context(self) -> Any:
        """Token t is number t - size c of block c, and a block has size results of each head."""
        op = self.op
        token = self.range(self.length)
        ahead = op.Mul(op.Div(token, self.size), op.Mul(self.size, self.number(self.heads - 1)))
        blocks = op.Gather(op.Shape(self.start), self.number(0))
        results = op.Mul(op.Mul(blocks, self.size), self.number(self.heads))
        heads = op.Mul(self.vector(*range(self.heads)), self.size)
        row = op.Mul(self.unsqueeze(self.row, 1, 2), results)
        return op.Add(op.Add(row, self.unsqueeze(op.Add(token, ahead), 1)), heads)

    def mask(self) -> Any:
        op = self.op
        behind = op.Sub(self.unsqueeze(op.Add(self.in_block, self.number(self.slots)), 1), self.column)
        recent = op.And(op.GreaterOrEqual(behind, self.number(0)), op.Less(behind, self.number(self.window)))
        oldest = op.Sub(self.number(self.slots + int(self.first)), self.unsqueeze(self.past_lengths, 1, 2, 3))
        seen = op.And(recent, op.GreaterOrEqual(self.source, oldest))
        if self.first:
            seen = op.Or(seen, op.Less(self.column, self.number(1)))
        hidden, shown = op.Constant(value_float=float("-inf")), op.Constant(value_float=0.0)
        return self.unsqueeze(op.Where(seen, shown, hidden), 2)


def _step(
    op: Any,
    q: Any,
    k: Any,
    v: Any,
    past: Any,
    keys: Any,
    values: Any,
    queries: Any,
    context: Any,
    held: Any,
    mask: Any,
    scale: float,
) -> tuple[Any, Any]:
    dim, value_dim = int(past.shape[2]) // int(k.shape[1]), int(v.shape[3])

    def by_token(x: Any) -> Any:
        """[B, H, T, D] -> [B, T, H, dim]."""
        if more := dim - int(x.shape[3]):
            x = op.Pad(x, op.Constant(value_ints=[0, 0, 0, 0, 0, 0, 0, more]))
        return op.Transpose(x, perm=[0, 2, 1, 3])

    rows = op.Constant(value_ints=[-1, dim])
    packed = op.Constant(value_ints=[0, 0, int(past.shape[2])])
    slots = op.Concat(past, *(op.Reshape(by_token(x), packed) for x in (k, v)), axis=1)
    table = op.Reshape(slots, rows)
    taken = op.Gather(op.Reshape(by_token(q), rows), queries)
    scores = op.MatMul(taken, op.Transpose(op.Gather(table, keys), perm=[0, 1, 2, 4, 3]))
    scores = op.Add(op.Mul(scores, op.Constant(value_float=scale)), mask)
    results = op.MatMul(op.Softmax(scores, axis=-1), op.Gather(table, values))
    out = op.Gather(op.Reshape(results, rows), context)
    if value_dim < dim:
        out = op.Slice(out, *(op.Constant(value_ints=[n]) for n in (0, value_dim, 3)))
    return op.Transpose(out, perm=[0, 2, 1, 3]), op.GatherND(slots, held, batch_dims=1)
