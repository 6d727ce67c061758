"""Divergence of two models' logits without either's full matrix: the last linear map runs on a few tokens at a time.

B sequences, T tokens, C width, V vocabulary, N counted predictions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from tcal_compiler.passes.graph import argument, aten, inputs, output_node
from tcal_compiler.passes.site_program import cut_program, tap_graph

_POINTWISE = {
    aten.add.Tensor,
    aten.clone.default,
    aten.contiguous.default,
    aten.div.Tensor,
    aten.mul.Tensor,
    aten.tanh.default,
    aten.to.dtype,
    aten._to_copy.default,
}


@dataclass(frozen=True)
class SplitModel:
    """A graph in two: body(*inputs) -> hidden [B, T, C]; head(hidden) -> logits [B, T, V]. Parameters are shared.

    head is None where the logits are not a linear map, with pointwise operations behind it, of one tensor: then hidden
    is the logits themselves, and the full matrix is made after all.
    """

    body: Callable[..., tuple[Tensor, ...]]
    head: GraphModule | None

    def hidden(self, args: tuple[Tensor, ...]) -> Tensor:
        return self.body(*args)[0]

    def logits(self, rows: Tensor) -> Tensor:
        """rows [N, C] -> [N, V] in float32 at least."""
        out = rows if self.head is None else self.head(rows[None])[0]
        return out.to(torch.promote_types(out.dtype, torch.float32))


def split_model(gm: GraphModule) -> SplitModel:
    """Cuts a captured model before its last linear map."""
    logits = output_node(gm).args[0]
    assert isinstance(logits, Node)
    node = logits
    while node.target in _POINTWISE:
        tensors = [i for i in inputs(node) if i.op != "get_attr"]
        if len(tensors) != 1:
            break
        node = tensors[0]
    if node.target is aten.linear.default and argument(node, "weight").op == "get_attr":
        hidden = argument(node, "input")
        head = cut_program(gm, inputs_from=[hidden.name], outputs=[logits.name])
        return SplitModel(tap_graph(gm, [hidden.name]), head.gm)
    return SplitModel(tap_graph(gm, [logits.name]), None)


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """sum_v p (log p - log q) per row [N], p = softmax(teacher / temperature), q = softmax(student / temperature).

    student, teacher: logits [N, V]. A token that the teacher rules out (-inf) adds 0, as p log p does in the limit.
    """
    log_p, log_q = F.log_softmax(teacher / temperature, -1), F.log_softmax(student / temperature, -1)
    return torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q)).sum(-1)


@dataclass(frozen=True)
class Losses:
    """Sums over `count` predictions in float64: of the forward KL, and of the negative log likelihood, in nats."""

    kl: Tensor
    nll: Tensor
    count: int

    def __add__(self, other: Losses) -> Losses:
        return Losses(self.kl + other.kl, self.nll + other.nll, self.count + other.count)


def compare(
    student: SplitModel,
    teacher: SplitModel,
    args: tuple[Tensor, ...],
    counts: Tensor,
    *,
    chunk: int,
    temperature: float = 1.0,
    cross_entropy: float = 0.0,
    backward: bool = False,
) -> Losses:
    """KL(teacher || student) at a temperature, and the student's NLL, of the predictions that count.

    args: the graphs' arguments, token ids [B, T] first. counts [B, T - 1] bool: prediction t, of token t + 1, counts;
    the others (of padding, of another document's first token) take no part. chunk: predictions whose logits exist at
    once. backward: adds the gradient of (temperature^2 KL + cross_entropy NLL) / N to the student's parameters; each
    chunk's backward follows its forward, so that memory never holds the logits of two. nll is 0 where nothing needs it.
    """
    target = args[0][:, 1:][counts]
    with torch.no_grad():
        reference = teacher.hidden(args)[:, :-1][counts]
    with torch.set_grad_enabled(backward):
        hidden = student.hidden(args)[:, :-1][counts]
        kl = nll = torch.zeros((), dtype=torch.float64, device=hidden.device)
        gradients = []
        for h, r, t in zip(*(x.split(chunk) for x in (hidden.detach(), reference, target)), strict=True):
            with torch.no_grad():
                soft = teacher.logits(r)
            hard = student.logits(h.requires_grad_(backward))
            kl_sum = forward_kl(hard, soft, temperature).sum()
            loss = temperature**2 * kl_sum
            if cross_entropy or not backward:
                nll_sum = F.cross_entropy(hard, t, reduction="sum")
                nll, loss = nll + nll_sum.detach(), loss + cross_entropy * nll_sum
            kl = kl + kl_sum.detach()
            if backward:
                (loss / max(1, len(target))).backward()
                gradients.append(h.grad)
        if gradients and hidden.requires_grad:
            hidden.backward(torch.cat(gradients))
    return Losses(kl, nll, len(target))
