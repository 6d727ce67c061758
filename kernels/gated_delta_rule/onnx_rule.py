"""The gated delta rule in ONNX: one row of LOWERINGS per profile, and a function body for runtimes without a kernel.

LinearAttention (com.microsoft 1; opset 27 in the standard domain) packs heads into the last dimension:
query and key [B, T, H * Dk], value [B, T, H * Dv], past_state [B, H, Dk, Dv], decay and beta [B, T, H]. It shares one
state among the query heads of a group; ours has a state per query head, so keys and values are repeated to H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import onnx

OP_TYPE = "LinearAttention"
NEWER = "tcal.newer"  # domain, until the model is whole, of a standard operator newer than what torch.onnx writes
_ATTRIBUTES = ("q_num_heads", "kv_num_heads", "update_rule", "scale")

# Scan over tokens; B batch, H heads. `keep` is exp(decay). Declared attributes that are unused fix the signature.
_FUNCTION = """
<domain: "com.microsoft", opset_import: ["" : OPSET]>
LinearAttention <q_num_heads, kv_num_heads, update_rule, scale>
(query, key, value, past_state, decay, beta) => (output, present_state)
{
  two_zeros = Constant <value_ints = [0, 0]> ()
  minus_one = Constant <value_ints = [-1]> ()
  one = Constant <value_ints = [1]> ()
  three = Constant <value_ints = [3]> ()
  four = Constant <value_ints = [4]> ()
  three_four = Constant <value_ints = [3, 4]> ()
  factor = Constant <value_float: float = @scale> ()
  heads = Constant <value_int: int = @kv_num_heads> ()
  heads_1d = Reshape (heads, one)
  by_head = Concat <axis = 0> (two_zeros, heads_1d, minus_one)
  packed = Concat <axis = 0> (two_zeros, minus_one)
  query_heads = Reshape (query, by_head)
  scaled = Mul (query_heads, factor)
  query_row = Unsqueeze (scaled, three)
  key_heads = Reshape (key, by_head)
  key_column = Unsqueeze (key_heads, four)
  value_heads = Reshape (value, by_head)
  value_row = Unsqueeze (value_heads, three)
  shrink = Exp (decay)
  keep = Unsqueeze (shrink, three_four)
  rate = Unsqueeze (beta, three_four)
  present_state, rows = Scan <num_scan_inputs = 5, scan_input_axes = [1, 1, 1, 1, 1], scan_output_axes = [1],
    body = one_token (float[b, h, dk, dv] s, float[b, h, one_q, dk] q, float[b, h, dk, one_k] k,
                      float[b, h, one_v, dv] v, float[b, h, one_a, one_b] a, float[b, h, one_c, one_d] r)
                  => (float[b, h, dk, dv] next, float[b, h, one_o, dv] o) {
      decayed = Mul (s, a)
      k_row = Transpose <perm = [0, 1, 3, 2]> (k)
      recalled = MatMul (k_row, decayed)
      error = Sub (v, recalled)
      write = Mul (error, r)
      update = MatMul (k, write)
      next = Add (decayed, update)
      o = MatMul (q, next)
    }> (past_state, query_row, key_column, value_row, keep, rate)
  output = Reshape (rows, packed)
}
"""


@dataclass(frozen=True)
class Lowering:
    """How one export profile writes the op: its domain and version, the graph opsets it goes with, and its fallback.

    runtime: the first ONNX Runtime that loads such a model. fused: whether com.microsoft operators are used elsewhere
    too. half: whether matrix products, attention and its caches are float16; recurrences and norms stay float32.
    """

    domain: str
    version: int
    opsets: tuple[int, int]
    function: Callable[[int], onnx.FunctionProto] | None
    runtime: tuple[int, int]
    fused: bool = True
    half: bool = False


def linear_attention_function(opset: int) -> onnx.FunctionProto:
    """com.microsoft::LinearAttention, gated_delta in float32, as a Scan: inlined where there is no kernel.

    opset: of the model that it goes into, which it must share.
    """
    import onnx.parser

    return onnx.parser.parse_function(_FUNCTION.replace("OPSET", str(opset)))


LOWERINGS = {
    "ort": Lowering("com.microsoft", 1, (21, 24), linear_attention_function, runtime=(1, 25)),
    "standard": Lowering("", 27, (27, 27), None, runtime=(1, 32), fused=False),
    "cuda": Lowering("com.microsoft", 1, (21, 24), linear_attention_function, runtime=(1, 25), half=True),
}


def _linear_attention(lowering: Lowering) -> Any:
    """The op as a value that onnxscript records; its schema is not in onnx's registry."""
    import onnx
    from onnxscript import values

    schema, domain = onnx.defs.OpSchema, lowering.domain or NEWER
    single, optional = schema.FormalParameterOption.Single, schema.FormalParameterOption.Optional
    kinds = {"q_num_heads": "INT", "kv_num_heads": "INT", "update_rule": "STRING", "scale": "FLOAT"}
    parameters = [("query", single), ("key", single), ("value", single)]
    parameters += [("past_state", optional), ("decay", optional), ("beta", optional)]
    float_types = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]

    def formal(name: str, option: Any) -> Any:
        return schema.FormalParameter(name, "S" if "state" in name else "T", "", param_option=option)

    definition = schema(
        OP_TYPE,
        domain,
        lowering.version,
        inputs=[formal(name, option) for name, option in parameters],
        outputs=[formal("output", single), formal("present_state", single)],
        type_constraints=[("T", float_types, ""), ("S", float_types, "")],
        attributes=[schema.Attribute(n, getattr(schema.AttrType, kinds[n]), "", required=False) for n in _ATTRIBUTES],
    )
    return values.Op(values.Opset(domain, lowering.version), OP_TYPE, definition)


def translation_table(profile: str) -> dict[Any, Callable[..., Any]]:
    """custom_translation_table of torch.onnx.export for a profile of LOWERINGS."""
    import onnxscript

    op: Any = onnxscript.opset21  # its stubs do not know constants

    attention = _linear_attention(LOWERINGS[profile])

    def packed(x: Any, heads: int) -> Any:
        """[B, T, K, D] -> [B, T, H * D], each head repeated H / K times."""
        have, dim = int(x.shape[2]), int(x.shape[3])
        if have != heads:
            x = op.Gather(x, op.Constant(value_ints=[h * have // heads for h in range(heads)]), axis=2)
        return op.Reshape(x, op.Constant(value_ints=[0, 0, heads * dim]))

    def rule(q: Any, k: Any, v: Any, g: Any, beta: Any, initial_state: Any, scale: float) -> Any:
        heads, value_dim = int(q.shape[2]), int(v.shape[3])
        out, state = attention(
            packed(q, heads),
            packed(k, heads),
            packed(v, heads),
            initial_state,
            g,
            beta,
            q_num_heads=heads,
            kv_num_heads=heads,
            update_rule="gated_delta",
            scale=scale,  # without it the op takes 1 / sqrt(Dk)
            _outputs=2,
        )
        return op.Reshape(out, op.Constant(value_ints=[0, 0, heads, value_dim])), state

    return {torch.ops.tcal.gated_delta_rule.default: rule}
