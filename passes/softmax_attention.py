"""The form that softmax attention is brought to where scaled_dot_product_attention has no words for it."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from tcal_compiler.kernels.scores import Scores

from .graph import argument, aten
from .masks import Evaluator
from .types import Capture


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Scores.weights(..) value, [B, H, T, Dv], with key and value [B, K, S, D] of H / K query heads each.

    A node of analysed graphs only: those that are run or exported hold the teacher's spelling, mixers or cached
    attention in its place.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = Scores(scale, softcap=softcap, sinks=sinks)  # window and slopes are in the mask
    return scores.weights(query, key, attn_mask) @ value


ANCHORS = (aten.scaled_dot_product_attention.default, softmax_attention)


def sinks_of(capture: Capture, anchor: Node) -> Tensor | None:
    """The sinks [H] of an anchor of the capture's graph, or None."""
    node = argument(anchor, "sinks")
    return None if node is None else Evaluator(capture, 2)(node)
