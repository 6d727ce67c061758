"""Divergence of two models' logits without either's full matrix: the last linear map runs on a few tokens at a time.

B sequences, T tokens, C width, V vocabulary, N counted predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from tcal_compiler.errors import StageError
from tcal_compiler.passes.graph import argument, aten, inputs, output_node
from tcal_compiler.passes.site_program import cut_program, tap_graph

from .divergence import FORWARD_KL, Objective, forward_kl, hidden_distance

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
    """A graph in two: body(*inputs) -> hidden [B, T, C], taps [B, T, C'] ...; head(hidden) -> logits [B, T, V].

    Parameters are shared with the whole graph.

    head is None where the logits are not a linear map, with pointwise operations behind it, of one tensor: then hidden
    is the logits themselves, and the full matrix is made after all.
    """

    body: Callable[..., tuple[Tensor, ...]]
    head: GraphModule | None

    def hidden(self, args: tuple[Tensor, ...]) -> Tensor:
        return self.body(*args)[0]

    def counted(self, args: tuple[Tensor, ...], counts: Tensor) -> list[Tensor]:
        """hidden and taps at the tokens whose predictions count: [N, C], [N, C'] ..., for counts [B, T - 1] bool."""
        return [x[:, :-1][counts] for x in self.body(*args)]

    def with_hidden(self, hidden: Tensor) -> SplitModel:
        """The same with hidden states that are known already in place of its body; no taps."""
        return replace(self, body=lambda *_: (hidden,))

    def logits(self, rows: Tensor) -> Tensor:
        """rows [N, C] -> [N, V] in float32 at least."""
        out = rows if self.head is None else self.head(rows[None])[0]
        return out.to(torch.promote_types(out.dtype, torch.float32))


def split_model(gm: GraphModule, taps: Sequence[str] = ()) -> SplitModel:
    """Cuts a captured model before its last linear map. taps: names of nodes that the body also gives."""
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
        return SplitModel(tap_graph(gm, [hidden.name, *taps]), head.gm)
    return SplitModel(tap_graph(gm, [logits.name, *taps]), None)


def in_bfloat16(model: SplitModel, whose: str) -> SplitModel:
    """The same with the matrix products and attention of its body in bfloat16, by autocast; the head stays as it is.

    Weights and gradients keep their dtype. Logits rounded to bfloat16 would be off by more than a good student is.
    Running it raises StageError when the graph does not take mixed dtypes. whose: "teacher" or "student".
    """

    def body(*args: Tensor) -> tuple[Tensor, ...]:
        try:
            with torch.autocast(args[0].device.type, torch.bfloat16):
                hidden, *taps = model.body(*args)
        except RuntimeError as e:
            if isinstance(e, torch.OutOfMemoryError) or "allocate memory" in str(e):
                raise
            what = f"the {whose} does not run in bfloat16: {str(e).splitlines()[0]}"
            raise StageError("distill", what, f'distill.{whose}_dtype = "captured"') from e
        if model.head is not None:
            hidden = hidden.to(next(chain(model.head.parameters(), model.head.buffers())).dtype)
        return hidden, *taps

    return replace(model, body=body)


def compiled(model: SplitModel, whose: str) -> SplitModel:
    """The same with its body compiled by Inductor when it first runs, in one graph; the head stays as it is.

    Running it raises StageError when it cannot be compiled here. whose: "teacher" or "student".
    """
    forward = torch.compile(model.body, fullgraph=True)

    def body(*args: Tensor) -> tuple[Tensor, ...]:
        try:
            return forward(*args)
        except torch._dynamo.exc.TorchDynamoException as e:
            what = f"the {whose} cannot be compiled: {str(e).strip().splitlines()[0]}"
            raise StageError("distill", what, "distill.compile = false; on a CPU Inductor needs a C++ compiler") from e

    return replace(model, body=body)


CHUNK = 1024  # predictions whose logits exist at once where models are scored
SUMS = ("divergence", "kl", "nll", "hidden")


@dataclass(frozen=True)
class Losses:
    """Sums over `count` predictions in float64, in nats.

    divergence: that of the objective. kl: forward KL at its temperature. nll: the student's negative log likelihood.
    hidden: hidden_distance of a batch, times its predictions. Where `compare` trains, kl and nll are 0 unless the
    objective needs them; without taps hidden is 0.
    """

    divergence: Tensor
    kl: Tensor
    nll: Tensor
    hidden: Tensor
    count: int

    @classmethod
    def none(cls, device: torch.device) -> Losses:
        """Of no prediction."""
        return cls(**{n: torch.zeros((), dtype=torch.float64, device=device) for n in SUMS}, count=0)

    def __add__(self, other: Losses) -> Losses:
        sums = {n: getattr(self, n) + getattr(other, n) for n in SUMS}
        return Losses(**sums, count=self.count + other.count)

    def detach(self) -> Losses:
        return replace(self, **{n: getattr(self, n).detach() for n in SUMS})

    def means(self) -> dict[str, float]:
        """Each sum per counted prediction."""
        return {n: getattr(self, n).item() / max(1, self.count) for n in SUMS}


def _chunk_losses(hard: Tensor, soft: Tensor, target: Tensor, objective: Objective, *, all_of_them: bool) -> Losses:
    """Losses of logits [N, V]; all_of_them: also those that the objective does not need."""
    divergence = objective.rows(hard, soft).sum()
    kl = nll = hard.new_zeros(())
    if objective.divergence == "forward-kl":
        kl = divergence
    elif all_of_them:
        kl = forward_kl(hard, soft, objective.temperature).sum()
    if objective.cross_entropy or all_of_them:
        nll = F.cross_entropy(hard, target, reduction="sum")
    return Losses(divergence, kl, nll, hard.new_zeros(()), len(target))


def compare(
    student: SplitModel,
    teacher: SplitModel,
    args: tuple[Tensor, ...],
    counts: Tensor,
    *,
    chunk: int,
    objective: Objective = FORWARD_KL,
    backward: bool = False,
    total: int | None = None,
) -> Losses:
    """Divergence of student from teacher, and the student's NLL, of the predictions that count.

    args: the graphs' arguments, token ids [B, T] first. counts [B, T - 1] bool: prediction t, of token t + 1, counts;
    the others (of padding, of another document's first token) take no part. chunk: predictions whose logits exist at
    once. backward: adds the gradient of the objective to the student's parameters; each chunk's backward follows its
    forward, so that memory never holds the logits of two. Both models have the same taps, or none. total: predictions
    that the gradient is a mean over, where they are more than those here; default: those here.
    """
    target = args[0][:, 1:][counts]
    with torch.no_grad():
        reference, *aims = teacher.counted(args, counts)
    with torch.set_grad_enabled(backward):
        hidden, *states = student.counted(args, counts)
        losses = Losses.none(hidden.device)
        distance = hidden_distance(states, aims) if states else losses.hidden
        losses = replace(losses, hidden=distance.detach() * len(target))
        gradients = []
        for h, r, t in zip(*(x.split(chunk) for x in (hidden.detach(), reference, target)), strict=True):
            with torch.no_grad():
                soft = teacher.logits(r)
            hard = student.logits(h.requires_grad_(backward))
            part = _chunk_losses(hard, soft, t, objective, all_of_them=not backward)
            losses += part.detach()
            if backward:
                loss = objective.temperature**2 * part.divergence
                if objective.cross_entropy:
                    loss = loss + objective.cross_entropy * part.nll
                (loss / max(1, len(target) if total is None else total)).backward()
                gradients.append(h.grad)
        if backward:
            ends = [(hidden, torch.cat(gradients)), (objective.hidden * distance, None)]
            if ends := [(x, g) for x, g in ends if x.requires_grad]:
                torch.autograd.backward([x for x, _ in ends], [g for _, g in ends])
    return losses


def compare_all(model: SplitModel, teacher: SplitModel, args: tuple[Tensor, ...]) -> Losses:
    """`compare` of every prediction."""
    return compare(model, teacher, args, torch.ones_like(args[0][:, 1:], dtype=torch.bool), chunk=CHUNK)
