"""A teacher becomes one graph of aten ops, accepted only when it equals the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from tcal_compiler.errors import UnsupportedModelError

from .base import run_passes
from .canonicalize import FreeViews, PlainCopies, RemoveNoOps
from .graph import (
    argument,
    aten,
    from_program,
    is_effect,
    is_mutation,
    is_tensor,
    module_path,
    output_node,
    placeholders,
    value,
)
from .inline import InlineParts
from .types import Capture, Check

LOGITS_HINT = "a forward(input_ids) that returns the logits of every token first, or by the name logits"
SHAPES = ((2, 24), (1, 1), (3, 7), (1, 70))
_DYNAMIC = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}


def example_ids(batch: int, length: int, vocab_size: int, seed: int = 0) -> Tensor:
    """Random token ids [batch, length] int64."""
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (batch, length), generator=gen)


def program_shapes(context: int) -> tuple[tuple[int, int], ...]:
    """(batch, length) that a student's program is compared at, within so many tokens."""
    return (2, min(24, context)), (1, 1)


def export_module(module: nn.Module, *, has_positions: bool, vocab_size: int) -> torch.export.ExportedProgram:
    """Exports with dynamic batch and length. AUTO would silently specialise a batch of 1, hence DYNAMIC and 2 x 8."""
    ids = example_ids(2, 8, vocab_size)
    args: tuple[Tensor, ...] = (ids,)
    named, positions = dict[str, Tensor](), torch.arange(8).expand(2, 8).contiguous()
    if has_positions and isinstance(module, GraphModule):  # a student's, called as Capture.inputs says
        args = (ids, positions)
    elif has_positions:
        named = {"position_ids": positions}
    shapes = (_DYNAMIC,) * (1 + has_positions)
    with torch.no_grad(), _attributes_kept(module):
        return torch.export.export(module, args, named, dynamic_shapes=shapes, strict=False)


@contextmanager
def _attributes_kept(module: nn.Module) -> Iterator[None]:
    """What the model's own code sets on its modules while it is exported is no tensor that it could go on with."""
    before = [(m, dict(vars(m)), dict(m._buffers)) for m in module.modules()]
    try:
        yield
    finally:
        for m, attributes, buffers in before:
            vars(m).clear()
            vars(m).update(attributes)
            m._buffers.clear()
            m._buffers.update(buffers)


@contextmanager
def _layer_by_layer() -> Iterator[None]:
    """Without the fused inference path of nn.TransformerEncoderLayer, which rounds otherwise than its own layers do."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def functional(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program without in-place writes, in which every value depends on its node's arguments alone."""
    if any(is_mutation(n) for n in program.graph.nodes):
        return program.run_decompositions({})
    return program


def canonical(program: torch.export.ExportedProgram, implementation: str) -> Capture:
    """The canonical graph of a program, compared with nothing.

    Raises UnsupportedModelError when it returns no logits [B, T, V].
    """
    gm = from_program(functional(program))
    run_passes(gm, [InlineParts()])
    _forget_writes(gm)
    for n in placeholders(gm):
        if not is_tensor(n) and not n.users:  # None, where a program was exported with one
            gm.graph.erase_node(n)
    ins = placeholders(gm)
    logits = output_node(gm).args[0]
    if isinstance(logits, tuple):  # caches, hidden states or a loss beside the logits
        logits = logits_of(torch.utils._pytree.tree_unflatten(logits, program.call_spec.out_spec))
        output_node(gm).args = (logits,)
    gm.graph.eliminate_dead_code(is_impure_node=is_effect)
    gm.recompile()
    run_passes(gm, [PlainCopies(), FreeViews(), RemoveNoOps()])
    shape = list(getattr(value(logits), "shape", ())) if isinstance(logits, Node) else []
    if [*map(str, shape[:-1])] != [*map(str, value(ins[0]).shape)] or not isinstance(shape[-1], int):
        what = (
            f"returns {[*map(str, shape)]}, want logits of all tokens: {[*map(str, value(ins[0]).shape), 'vocabulary']}"
        )
        raise UnsupportedModelError("teacher", what.replace("'", ""), LOGITS_HINT)
    return Capture(gm, len(ins) > 1, shape[-1], implementation, fingerprint="")


def _forget_writes(gm: GraphModule) -> None:
    """Every call starts from the buffers as they were exported: what a functional program writes back is left out."""
    for n in list(gm.graph.nodes):
        if n.target is aten.copy_.default and n.args[0].op == "get_attr" and not n.users:
            gm.graph.erase_node(n)


def logits_of(out: Any) -> Any:
    """What a model returns as its logits: what it calls so, else the first thing that is not None."""
    named = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
    leaves = torch.utils._pytree.tree_leaves(out if named is None else named)
    return next((leaf for leaf in leaves if leaf is not None), None)


def _equals_when_exporting(gm: GraphModule, teacher: Callable[..., Tensor], args: tuple[Tensor, ...]) -> bool:
    """Whether the teacher has the graph's logits when it is told that it is being exported."""
    with torch.no_grad(), _layer_by_layer(), mock.patch.object(torch.compiler, "is_exporting", lambda: True):
        try:
            return torch.equal(gm(*args), teacher(*args))
        except Exception:  # outside of an export that way may well fail; the difference is reported all the same
            return False


def _random(gm: GraphModule) -> str:
    """The first operator of a graph that draws random numbers, and where; "" where there is none."""
    for n in gm.graph.nodes:
        drop = argument(n, "dropout_p" if "attention" in str(n.target) else "p", 0.0) if n.op == "call_function" else 0
        off = n.op != "call_function" or torch.Tag.nondeterministic_seeded not in getattr(n.target, "tags", ())
        dropout = "dropout" in str(n.target) or "attention" in str(n.target)
        if off or (dropout and (not drop or argument(n, "train", True) is False)):
            continue
        return f"{n.target} in {module_path(n) or 'the model'}" + f", dropout {drop}, also in eval mode" * dropout
    return ""


def capture_program(
    program: torch.export.ExportedProgram,
    *,
    teacher: Callable[..., Tensor],
    implementation: str,
    shapes: Sequence[tuple[int, int]] = SHAPES,
) -> Capture:
    """The canonical graph of a program, compared with `teacher(*inputs) -> logits` at several (batch, length).

    Raises UnsupportedModelError when the graph's logits differ from the teacher's by one bit.
    """
    capture = canonical(program, implementation)
    gm, vocab = capture.gm, capture.vocab_size
    checks = []
    for batch, length in shapes:
        args = capture.inputs(example_ids(batch, length, vocab))
        try:
            with torch.no_grad(), _layer_by_layer():
                expected = teacher(*args)
                error = (gm(*args) - expected).abs().max().item()
        except Exception as e:  # what a model's own code and a program's guards raise has any type
            if any("flex_attention" in str(n.target) for n in gm.graph.nodes):
                what = "calls flex_attention, whose mask and score functions torch.export does not keep"
                raise UnsupportedModelError("teacher", what, "the same model with scaled_dot_product_attention") from e
            what = f"fails on {batch} x {length} tokens: {type(e).__name__}: {str(e).partition(chr(10))[0][:200]}"
            raise UnsupportedModelError("teacher", what, "a model for any batch, and for 70 tokens at least") from e
        if not bool(expected.isfinite().all()):
            what = f"its logits are not finite on {batch} x {length} random tokens"
            raise UnsupportedModelError("teacher", what, "a model whose own forward works in float32")
        checks.append(Check(f"capture equals teacher at B={batch} T={length}", error, 0.0, implementation))
        if not checks[-1].passed:
            what = f"the captured graph differs from the model: {checks[-1].name} by {error:.3g} (allowed 0)"
            hint = "export the model yourself with dynamic batch and length and pass the .pt2 file"
            if random := _random(gm):
                what += f"; it draws random numbers: {random}"
                hint = "model.eval() before it is exported, and F.dropout(x, p, self.training) in its code"
            elif written := sorted(functional(program).graph_signature.buffers_to_mutate.values()):
                what += f"; it writes to its buffer {written[0]}, so that one call depends on those before"
            elif _equals_when_exporting(gm, teacher, args):
                what += "; its code asks torch.compiler.is_exporting() and then computes something else"
            raise UnsupportedModelError("teacher", what, hint)
    return replace(capture, checks=tuple(checks))


def require_causal(capture: Capture, *, context: int | None = None) -> Check:
    """Changes the last of 48 tokens, or of as many as the context holds, and compares the logits before them: they may
    differ by 1e-5 of the largest logit.

    Raises UnsupportedModelError when an earlier token's logits see a later token, wherever that happens in the model.
    """
    length = min(48, context or 48)
    first = max(1, length // 3)
    ids = example_ids(1, length, capture.vocab_size)
    other = ids.clone()
    other[:, first:] = (other[:, first:] + 1) % capture.vocab_size
    with torch.no_grad():
        before, after = (capture.gm(*capture.inputs(i))[0, :first].float() for i in (ids, other))
    per_token = (before - after).abs().amax(-1)
    check = Check("logits do not see later tokens", per_token.max().item(), 1e-5 * before.abs().max().item())
    if not check.passed:
        raise UnsupportedModelError(
            "teacher",
            f"is not causal: changing the tokens from {first} on changes the logits of token {int(per_token.argmax())} "
            f"by {check.measured:.3g} (allowed {check.allowed:.3g})",
            "a decoder-only language model, in which no token sees a later one",
        )
    return check
