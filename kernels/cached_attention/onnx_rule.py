"""Cached attention in ONNX: com.microsoft GroupQueryAttention, or plain operators where its sizes do not fit.

GroupQueryAttention packs heads into the last dimension (query [B, T, H * D], key and value [B, T, K * D]), rotates q
and k itself, caps scores, adds a bias to them, counts attention sinks, and writes into the cache that it is given when
present and past are bound to the same memory. It finds a row's past in seqlens_k, the number of the row's last slot. In
ONNX Runtime on the CPU it takes several tokens behind a past for a batch of one only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tcal_compiler.kernels.scores import Scores

from .reference import attend, new_slots, rotate, write

if TYPE_CHECKING:
    from torch.export import ExportedProgram

OP = torch.ops.tcal.cached_attention.default
OP_TYPE = "GroupQueryAttention"
_INPUTS = (
    "query",
    "key",
    "value",
    "past_key",
    "past_value",
    "seqlens_k",
    "total_sequence_length",
    "cos_cache",
    "sin_cache",
    "position_ids",
    "attention_bias",
    "head_sink",
)
_REQUIRED = _INPUTS[:7]
_COUNTS = ("seqlens_k", "total_sequence_length")
_ATTRIBUTES = {
    "num_heads": "INT",
    "kv_num_heads": "INT",
    "scale": "FLOAT",
    "local_window_size": "INT",
    "do_rotary": "INT",
    "rotary_interleaved": "INT",
    "softcap": "FLOAT",
}


def is_fused(key_dim: int, value_dim: int) -> bool:
    """Whether GroupQueryAttention takes these sizes."""
    return key_dim == value_dim and key_dim % 8 == 0


def can_rotate(key_dim: int, rotated: int) -> bool:
    """Whether it also rotates the first `rotated` channels of q and k."""
    return key_dim % 16 == 0 and rotated % 16 == 0


def plain_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_lengths: Tensor,
    total: int,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    *flat: Any,
) -> Any:
    """The op in plain operators, for a cache of exactly the past's slots, which it copies and grows."""
    slots = new_slots(past_lengths, q.shape[2])
    if cos is not None and sin is not None:
        rows = [torch.nn.functional.embedding(slots, table)[:, None] for table in (cos, sin)]
        q, k = (rotate(x, *rows, interleaved=interleaved) for x in (q, k))
    keys, values = (write(torch.cat((old, new), 2), new, slots) for old, new in ((past_key, k), (past_value, v)))
    return attend(q, keys, values, slots, Scores(*flat)), keys, values


def decompose_plain(program: ExportedProgram, *, fused: bool) -> ExportedProgram:
    """Replaces cores by plain operators: all of them, or (fused) those that the fused operator does not take."""

    def plain(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Any:
        return NotImplemented if fused and is_fused(q.shape[-1], v.shape[-1]) else plain_form(q, k, v, *others)

    return program.run_decompositions({OP: plain})


def _group_query_attention() -> Any:
    """The op as a value that onnxscript records; its schema is not in onnx's registry."""
    import onnx
    from onnxscript import values

    schema = onnx.defs.OpSchema
    single, optional = schema.FormalParameterOption.Single, schema.FormalParameterOption.Optional

    def formal(name: str) -> Any:
        kind = "M" if name in _COUNTS else "I" if name == "position_ids" else "T"
        option = optional if name in _INPUTS and name not in _REQUIRED else single
        return schema.FormalParameter(name, kind, "", param_option=option)

    definition = schema(
        OP_TYPE,
        "com.microsoft",
        1,
        inputs=[formal(n) for n in _INPUTS],
        outputs=[formal(n) for n in ("output", "present_key", "present_value")],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], ""),
            ("M", ["tensor(int32)"], ""),
            ("I", ["tensor(int64)"], ""),
        ],
        attributes=[
            schema.Attribute(n, getattr(schema.AttrType, kind), "", required=False) for n, kind in _ATTRIBUTES.items()
        ],
    )
    return values.Op(values.Opset("com.microsoft", 1), OP_TYPE, definition)


def _packed(op: Any, x: Any) -> Any:
    """[B, H, T, D] -> [B, T, H * D]."""
    width = int(x.shape[1]) * int(x.shape[3])
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, width]))


def _bias(op: Any, slopes: Any, past_lengths: Any, tokens: Any, total: Any) -> Any:
    """-slope distance [B, H, T, total]."""
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    new = op.Range(zero, op.Squeeze(tokens), one)
    own = op.Add(op.Unsqueeze(past_lengths, op.Constant(value_ints=[1])), new)
    ahead = op.Sub(op.Range(zero, op.Squeeze(total), one), op.Unsqueeze(own, op.Constant(value_ints=[2])))
    ahead = op.Unsqueeze(ahead, op.Constant(value_ints=[1]))
    return op.Mul(op.Reshape(slopes, op.Constant(value_ints=[1, -1, 1, 1])), op.CastLike(ahead, slopes))


def _visible(op: Any, scores: Scores, past_lengths: Any, tokens: Any, total: Any) -> Any:
    """0 for keys that a query sees, else -inf: [B, 1, T, total], behind the first ones a window."""
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    keys = op.Range(zero, op.Squeeze(total), one)
    own = op.Add(op.Unsqueeze(past_lengths, op.Constant(value_ints=[1])), op.Range(zero, op.Squeeze(tokens), one))
    distance = op.Unsqueeze(op.Sub(op.Unsqueeze(own, op.Constant(value_ints=[2])), keys), op.Constant(value_ints=[1]))
    far = op.GreaterOrEqual(distance, op.Constant(value_int=scores.window))
    hidden = op.And(far, op.GreaterOrEqual(keys, op.Constant(value_int=scores.first)))
    return op.Where(hidden, op.Constant(value_float=float("-inf")), op.Constant(value_float=0.0))


class _Counts:
    """T, the number of each row's last slot, and total: once for all layers that have one past."""

    def __init__(self, op: Any) -> None:
        self.op = op
        self.known: dict[Any, tuple[Any, Any, Any]] = {}

    def of(self, q: Any, past_lengths: Any, total: Any) -> tuple[Any, Any, Any]:
        import onnx

        op, int32 = self.op, onnx.TensorProto.INT32
        if (past_lengths, total) not in self.known:
            tokens = op.Shape(q, start=2, end=3)
            last = op.Sub(op.Add(past_lengths, tokens), op.Constant(value_ints=[1]))
            counts = tokens, op.Cast(last, to=int32), op.Squeeze(op.Cast(total, to=int32))
            self.known[past_lengths, total] = counts
        return self.known[past_lengths, total]


def translation_table() -> dict[Any, Callable[..., Any]]:
    """custom_translation_table of torch.onnx.export for the op."""
    import onnxscript

    op: Any = onnxscript.opset21  # its stubs do not know constants
    attention = _group_query_attention()
    counts = _Counts(op)

    def rule(
        q: Any,
        k: Any,
        v: Any,
        past_key: Any,
        past_value: Any,
        past_lengths: Any,
        total: Any,
        cos: Any,
        sin: Any,
        interleaved: bool,
        *flat: Any,
    ) -> Any:
        scores = Scores(*flat)
        heads, kv_heads, dim = int(q.shape[1]), int(k.shape[1]), int(q.shape[3])
        tokens, last, whole = counts.of(q, past_lengths, total)
        options: dict[str, Any] = {}
        if cos is not None:
            options |= {"do_rotary": 1, "rotary_interleaved": int(interleaved)}
        if scores.softcap:
            options["softcap"] = scores.softcap
        added = None if scores.slopes is None else _bias(op, scores.slopes, past_lengths, tokens, total)
        if scores.first and scores.window:
            seen = op.CastLike(_visible(op, scores, past_lengths, tokens, total), q)
            added = seen if added is None else op.Add(added, seen)
        elif scores.window:
            options["local_window_size"] = scores.window
        given = [cos, sin, None, added, scores.sinks]
        while given and given[-1] is None:
            given.pop()
        out, key, value = attention(
            _packed(op, q),
            _packed(op, k),
            _packed(op, v),
            past_key,
            past_value,
            last,
            whole,
            *given,
            num_heads=heads,
            kv_num_heads=kv_heads,
            scale=scores.scale,
            **options,
            _outputs=3,
        )
        split = op.Reshape(out, op.Constant(value_ints=[0, 0, heads, dim]))
        return op.Transpose(split, perm=[0, 2, 1, 3]), key, value

    return {OP: rule}
