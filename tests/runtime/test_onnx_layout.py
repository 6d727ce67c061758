"""Layouts that undo each other go, what only looks like it stays, and ONNX Runtime computes the same."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from tcal_compiler.runtime.onnx_layout import merge_layouts

HEADER = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[b, t, 12] x) => (float[b, t, 12] y)
<int64[4] heads = {0, 0, 3, 4}, int64[3] packed = {0, 0, 12}, int64[2] rows = {-1, 4}, int64[3] pairs = {0, -1, 6}>
"""
# what is written, and what is left of it
UNDONE = """{
  split = Reshape (x, heads)  turned = Transpose <perm = [0, 2, 1, 3]> (split)
  back = Transpose <perm = [0, 2, 1, 3]> (turned)  joined = Reshape (back, packed)
  same = Reshape (joined, packed)  y = Neg (same)
}"""
BY_ROWS = """{
  split = Reshape (x, heads)  flat = Reshape (split, rows)  z = Neg (flat)
  shape = Shape (x)  y = Reshape (z, shape)
}"""
STAYS = """{
  split = Reshape (x, heads)  turned = Transpose <perm = [0, 2, 1, 3]> (split)
  other = Transpose <perm = [0, 1, 3, 2]> (turned)  joined = Reshape (other, pairs)
  z = Neg (joined)  shape = Shape (x)  y = Reshape (z, shape)
}"""
LAST = """{
  z = Neg (x)  split = Reshape (z, heads)  y = Reshape (split, packed)
}"""


def merged(body: str) -> Counter[str]:
    """Operators behind the pass, on a model whose values have shapes."""
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(HEADER + body))
    x = np.random.default_rng(0).standard_normal((2, 5, 12)).astype(np.float32)
    (before,) = ort.InferenceSession(proto.SerializeToString()).run(None, {"x": x})
    model = ir.serde.deserialize_model(proto)
    count = merge_layouts(model)
    after = ir.serde.serialize_model(model)
    np.testing.assert_array_equal(ort.InferenceSession(after.SerializeToString()).run(None, {"x": x})[0], before)
    assert count == len(proto.graph.node) - len(after.graph.node)
    return Counter(n.op_type for n in after.graph.node)


def test_what_comes_back_is_not_written():
    assert merged(UNDONE) == {"Neg": 1}


def test_rows_are_read_from_before_the_heads():
    assert merged(BY_ROWS) == {"Reshape": 2, "Neg": 1, "Shape": 1}


def test_other_transpositions_and_sizes_that_copy_stay():
    assert merged(STAYS) == {"Reshape": 3, "Transpose": 2, "Neg": 1, "Shape": 1}


def test_what_leaves_the_graph_stays():
    assert merged(LAST) == {"Neg": 1, "Reshape": 2}
