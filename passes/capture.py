"""A teacher becomes one graph of aten ops, accepted only when it equals the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tcal_compiler.errors import UnsupportedModelError

from .base import run_passes
from .canonicalize import FreeViews, PlainCopies, RemoveNoOps
from .graph import from_program, is_effect, is_mutation, output_node, placeholders, value
from .types import Capture, Check

SHAPES = ((2, 24), (1, 1), (3, 7), (1, 70))
_DYNAMIC = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}


def example_ids(batch: int, length: int, vocab_size: int, seed: int = 0) -> Tensor:
    """Random token ids [batch, length] int64."""
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (batch, length), generator=gen)


def export_module(module: nn.Module, *, has_positions: bool, vocab_size: int) -> torch.export.ExportedProgram:
    """Exports with dynamic batch and length. AUTO would silently specialise a batch of 1, hence DYNAMIC and 2 x 8."""
    ids = example_ids(2, 8, vocab_size)
    args: tuple[Tensor, ...] = (ids, torch.arange(8).expand(2, 8).contiguous()) if has_positions else (ids,)
    with torch.no_grad():
        return torch.export.export(module, args, dynamic_shapes=(_DYNAMIC,) * len(args), strict=False)


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
    """The canonical graph of a program, compared with nothing. Raises UnsupportedModelError for an open vocabulary."""
    gm = from_program(functional(program))
    ins = placeholders(gm)
    logits = output_node(gm).args[0]
    if isinstance(logits, tuple):  # caches or hidden states beside the logits
        output_node(gm).args = (logits[0],)
        logits = logits[0]
    gm.graph.eliminate_dead_code(is_impure_node=is_effect)
    gm.recompile()
    run_passes(gm, [PlainCopies(), FreeViews(), RemoveNoOps()])
    vocab = value(logits).shape[-1]  # type: ignore[arg-type]
    if not isinstance(vocab, int):
        raise UnsupportedModelError("teacher", f"its last output dimension is not a constant vocabulary: {vocab}")
    return Capture(gm, len(ins) > 1, vocab, implementation, fingerprint="")


def _equals_when_exporting(gm: GraphModule, teacher: Callable[..., Tensor], args: tuple[Tensor, ...]) -> bool:
    """Whether the teacher has the graph's logits when it is told that it is being exported."""
    with torch.no_grad(), _layer_by_layer(), mock.patch.object(torch.compiler, "is_exporting", lambda: True):
        try:
            return torch.equal(gm(*args), teacher(*args))
        except Exception:  # outside of an export that way may well fail; the difference is reported all the same
            return False


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
        except (AssertionError, IndexError, RuntimeError) as e:
            if any("flex_attention" in str(n.target) for n in gm.graph.nodes):
                what = "calls flex_attention, whose mask and score functions torch.export does not keep"
                raise UnsupportedModelError("teacher", what, "the same model with scaled_dot_product_attention") from e
            what = f"fails on {batch} x {length} tokens: {type(e).__name__}: {str(e).splitlines()[0][:200]}"
            raise UnsupportedModelError("teacher", what, "a model for any batch, and for 70 tokens at least") from e
        if not bool(expected.isfinite().all()):
            what = f"its logits are not finite on {batch} x {length} random tokens"
            raise UnsupportedModelError("teacher", what, "a model whose own forward works in float32")
        checks.append(Check(f"capture equals teacher at B={batch} T={length}", error, 0.0, implementation))
        if not checks[-1].passed:
            what = f"the captured graph differs from the model: {checks[-1].name} by {error:.3g} (allowed 0)"
            if _equals_when_exporting(gm, teacher, args):
                what += "; its code asks torch.compiler.is_exporting() and then computes something else"
            hint = "export the model yourself with dynamic batch and length and pass the .pt2 file"
            raise UnsupportedModelError("teacher", what, hint)
    return replace(capture, checks=tuple(checks))


def require_causal(capture: Capture, *, length: int = 48) -> Check:
    """Changes the last tokens and compares the logits before them: they may differ by 1e-5 of the largest logit.

    Raises UnsupportedModelError when an earlier token's logits see a later token, wherever that happens in the model.
    """
    first = length // 3
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
