"""Changes of layout that undo each other, left out of an exported graph.

What torch.onnx writes for one operator knows nothing of the next one's: a projection is split into heads and transposed
for one reader, transposed back and packed for another. A step of one token is many small operators, so that their
number counts.
"""

from __future__ import annotations

from typing import Any

from .onnx_graph import constant, producer


def merge_layouts(model: Any) -> int:
    """Makes readers of a model whose values still have shapes read what was there before; returns how many nodes went.

    A Reshape to the shape that its input has, two transpositions that undo each other, Reshapes that come back to the
    shape they started from, and a Reshape behind a Reshape whose own sizes say all.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    before = len(model.graph)
    for node in list(model.graph):
        if node.op_type not in ("Reshape", "Transpose") or node.domain or node.outputs[0].is_graph_output():
            continue
        if (source := _same_as(node)) is not None:
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
        elif node.op_type == "Reshape" and (above := producer(node.inputs[0], "Reshape")) is not None:
            sizes = constant(node.inputs[1])
            if sizes is not None and sizes.all():
                node.replace_input_with(0, above.inputs[0])
    RemoveUnusedNodesPass()(model)
    return before - len(model.graph)


def _same_as(node: Any) -> Any:
    """A value that the node's result is equal to, or None."""
    x, above = node.inputs[0], producer(node.inputs[0], node.op_type)
    if node.op_type == "Transpose":
        perms = [list(n.attributes["perm"].as_ints()) for n in (above, node) if n is not None]
        undone = len(perms) == 2 and [perms[0][i] for i in perms[1]] == sorted(perms[0])
        return above.inputs[0] if undone else None
    sources = (x, above.inputs[0]) if above is not None else (x,)
    return next((s for s in sources if _equal_shapes(s, node.outputs[0])), None)


def _equal_shapes(x: Any, y: Any) -> bool:
    """Whether two values are known to have one shape."""
    if x.shape is None or y.shape is None or list(x.shape) != list(y.shape):
        return False
    return all(isinstance(size, int) or size.value is not None for size in x.shape)
