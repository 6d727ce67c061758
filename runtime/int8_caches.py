"""Keys and values of a student's caches as int8: a quarter of the bytes, and of what a step reads of its context.

GroupQueryAttention takes such caches, with a scale for every channel of a head:

    value = scale * round(clip(value / scale, -128, 127)), scale = MARGIN max |value| / 127 over the tokens of a text.

Windows, and attention in plain operators, keep float32. A value beyond MARGIN times what the text came to is clipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .session import OnnxSession

MARGIN = 1.3
ATTENTION = "GroupQueryAttention"
_SCALES = 12  # index of the first of its two inputs for scales


def quantize_caches(model: Any, source: Path, ids: NDArray[np.int64]) -> int:
    """Changes the model, loaded from `source`, in place; returns the number of layers whose caches are int8.

    ids [N, T]: the tokens of the text.

    Raises ExportError when the model in `source` cannot be run.
    """
    import onnx

    inputs = {i.name: i for i in model.graph.input}
    outputs = {o.name: o for o in model.graph.output}
    layers = [
        n
        for n in model.graph.node
        if n.op_type == ATTENTION and {*n.input[3:5]} <= inputs.keys() and {*n.output[1:3]} <= outputs.keys()
    ]
    largest = _largest(source, ids) if layers else {}
    for node in layers:
        node.input.extend([""] * (_SCALES - len(node.input)))
        for past, present in zip(node.input[3:5], node.output[1:3], strict=True):
            scales = (MARGIN / 127 * np.maximum(largest[past], np.finfo(np.float16).tiny)).astype(np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(scales[None, :, None], f"{past}.scale"))
            node.input.append(f"{past}.scale")
            for v in (inputs[past], outputs[present]):
                v.type.tensor_type.elem_type = onnx.TensorProto.INT8
        options = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        node.attribute.extend(onnx.helper.make_attribute(k, v) for k, v in options.items())
    return len(layers)


def _largest(source: Path, ids: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
    """Of every state [1, K, S, D] of a student, the largest |value| of each channel [K, D] over the tokens."""
    session = OnnxSession(source, threads=1)
    found: dict[str, NDArray[np.float32]] = {}
    for row in ids:
        session.reset()
        session.forward(row[None])
        for name, value in zip(session.state_names, session.snapshot().values, strict=True):
            if name.endswith((".key", ".value")):
                seen = np.abs(value[0]).max(1)
                found[name] = np.maximum(found.get(name, seen), seen)
    return found
