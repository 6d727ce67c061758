"""Whether ONNX Runtime here has the operators of com.microsoft that students use, and computes them right.

B = 1 row, T tokens, H heads, D head dim; states [B, H, D, D], caches [B, H, tokens, D].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tcal_compiler.kernels.gated_delta_rule import gated_delta_rule_reference
from tcal_compiler.kernels.self_check import relative_errors

TOKENS, HEADS, DIM = 9, 2, 16
SCALE = DIM**-0.5
Case = tuple[dict[str, Tensor], dict[str, Any], list[str], list[Tensor]]  # inputs, attributes, outputs, exact ones


def _packed(x: Tensor) -> Tensor:
    """[B, T, H, D] -> [B, T, H * D]."""
    return x.flatten(2)


def _linear_attention(draw: Callable[..., Tensor]) -> Case:
    q, k = (torch.nn.functional.normalize(draw(1, TOKENS, HEADS, DIM), dim=-1) for _ in range(2))
    v, state = draw(1, TOKENS, HEADS, DIM), draw(1, HEADS, DIM, DIM)
    g, beta = -draw(1, TOKENS, HEADS).abs(), draw(1, TOKENS, HEADS).sigmoid()
    out, last = gated_delta_rule_reference(q, k, v, g, beta, state, scale=SCALE)
    inputs = {"query": _packed(q), "key": _packed(k), "value": _packed(v), "past": state, "decay": g, "beta": beta}
    kinds = {"q_num_heads": HEADS, "kv_num_heads": HEADS, "update_rule": "gated_delta", "scale": SCALE}
    return inputs, kinds, ["output", "state"], [_packed(out), last]


def _grouped_attention(draw: Callable[..., Tensor]) -> Case:
    q, k, v = (draw(1, TOKENS, HEADS, DIM) for _ in range(3))
    q1, k1, v1 = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q1, k1, v1, is_causal=True, scale=SCALE)
    inputs = {"query": _packed(q), "key": _packed(k), "value": _packed(v)}
    inputs |= {"past_key": q.new_empty(1, HEADS, 0, DIM), "past_value": q.new_empty(1, HEADS, 0, DIM)}
    inputs |= {"last": torch.tensor([TOKENS - 1], dtype=torch.int32), "total": torch.tensor(TOKENS, dtype=torch.int32)}
    kinds = {"num_heads": HEADS, "kv_num_heads": HEADS, "scale": SCALE}
    return inputs, kinds, ["output", "keys", "values"], [_packed(out.transpose(1, 2)), k1, v1]


CASES = {"LinearAttention": _linear_attention, "GroupQueryAttention": _grouped_attention}


def _model(op: str, inputs: dict[str, Any], kinds: dict[str, Any], outputs: list[str]) -> bytes:
    from onnx import TensorProto, helper

    node = helper.make_node(op, list(inputs), outputs, domain="com.microsoft", **kinds)
    given = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape) for n, x in inputs.items()
    ]
    made = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "probe", given, made)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def operator_errors(op: str) -> dict[str, float]:
    """rms error over rms of each result of an operator in float32 against float64, on the CPU.

    Raises what ONNX Runtime raises where it has no such operator; its types share no base.
    """
    import onnxruntime as ort

    gen = torch.Generator().manual_seed(0)
    inputs, kinds, outputs, exact = CASES[op](lambda *size: torch.randn(*size, generator=gen, dtype=torch.float64))
    feeds = {n: (x.float() if x.is_floating_point() else x).numpy() for n, x in inputs.items()}
    options = ort.SessionOptions()
    options.log_severity_level = 4
    providers = ["CPUExecutionProvider"]
    session = ort.InferenceSession(_model(op, feeds, kinds, outputs), options, providers=providers, enable_fallback=0)
    return relative_errors(outputs, [torch.from_numpy(x) for x in session.run(None, feeds)], exact)
