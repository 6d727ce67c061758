"""From a loaded teacher of any kind to its captured graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tcal_compiler.errors import TcalError, TeacherError, UnsupportedModelError
from tcal_compiler.passes.capture import SHAPES, canonical, capture_program, export_module, logits_of
from tcal_compiler.passes.graph import is_tensor, placeholders, value
from tcal_compiler.passes.positions import longest_positions
from tcal_compiler.passes.types import Capture

from .program_file import upper_bound
from .teacher import Teacher, fingerprint

_PART = 1 << 22  # values that are looked at together


class _Logits(nn.Module):
    """A transformers causal model as (input_ids, position_ids) -> logits, without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits


def _is_transformers(module: nn.Module) -> bool:
    return hasattr(module, "config") and any("PreTrainedModel" in c.__name__ for c in type(module).__mro__)


def _is_finite(p: Tensor) -> bool:
    """Part by part, since a sum in float64 makes a float64 copy first."""
    return all(bool(part.sum(dtype=torch.float64).isfinite()) for part in p.reshape(-1).split(_PART))


def _require_finite(model: nn.Module | torch.export.ExportedProgram, source: str) -> None:
    """Parameters only: a mask that is kept as a buffer may well hold infinities."""
    for name, p in model.named_parameters():
        if p.is_floating_point() and not _is_finite(p.detach()):
            bad = p.numel() - int(p.isfinite().sum())
            what = f"weight {name} has {bad} of {p.numel()} values that are NaN or infinite"
            raise TeacherError(source, what, "a checkpoint that was saved whole, from training that did not diverge")


def _program(teacher: Teacher) -> tuple[torch.export.ExportedProgram, Callable[..., Any]]:
    """The teacher as a program, and what to compare its graph with: (ids, positions if it takes them) -> its output."""
    if teacher.program is not None:
        return teacher.program, _as_exported(teacher.program, teacher.source)
    assert teacher.module is not None
    module = getattr(teacher.module, "_orig_mod", teacher.module)  # what torch.compile wraps
    has_positions = "position_ids" in inspect.signature(module.forward).parameters
    if _is_transformers(module):
        module, has_positions = _Logits(module).eval(), True
    vocab = teacher.info.get("vocab_size") or 2
    try:
        program = export_module(module, has_positions=has_positions, vocab_size=vocab)
    except TcalError:
        raise
    except Exception as e:  # torch.export fails in many ways, each with a type of its own
        raise UnsupportedModelError(
            teacher.source,
            f"torch.export cannot capture it: {type(e).__name__}: {_reason(e)}",
            "export it yourself with dynamic batch and length, torch.export.save, and pass the .pt2 file",
        ) from e
    return program, lambda ids, *positions: module(ids, **dict(zip(("position_ids",), positions, strict=False)))


def _reason(error: Exception) -> str:
    """Its message in one line, without the advice on how torch logs more."""
    lines = [line for line in str(error).splitlines() if not line.lstrip().startswith("For more information")]
    return " ".join(" ".join(lines).replace('For more information, run with TORCH_LOGS="+dynamic".', "").split())[:300]


def _as_exported(program: torch.export.ExportedProgram, source: str) -> Callable[..., Any]:
    """The program's module, called with tensors alone, whatever names it was exported with."""
    try:
        run, spec = program.module(), program.call_spec.in_spec
    except Exception as e:  # torch makes it from text of the file
        what = f"torch cannot run this exported program: {type(e).__name__}: {_reason(e)}"
        raise TeacherError(source, what, "export the model again with this version of torch") from e

    ids = {n.name for n in program.graph.nodes if n.op == "placeholder" and is_tensor(n)}

    def call(*tensors: Tensor) -> Any:
        given = iter(tensors)
        leaves = [next(given) if name in ids else name for name in program.graph_signature.user_inputs]
        args, kwargs = torch.utils._pytree.tree_unflatten(leaves, spec)
        return run(*args, **kwargs)

    return call


def _bound_context(teacher: Teacher, program: torch.export.ExportedProgram) -> None:
    """Lengths above which the model's code does something else than was captured are beyond its context."""
    ids = next(n for n in program.graph.nodes if n.name == program.graph_signature.user_inputs[0])
    _shorten(teacher, upper_bound(program, value(ids).shape[1]))


def _shorten(teacher: Teacher, bound: int | None) -> None:
    """No context longer than the bound."""
    known = teacher.info.get("context_length")
    if bound is not None and (known is None or bound < known):
        teacher.info["context_length"] = bound


def capture_teacher(teacher: Teacher, *, shapes: tuple[tuple[int, int], ...] = SHAPES) -> Capture:
    """Captures and checks the teacher's graph; its fingerprint covers names, shapes and bytes of all weights.

    Raises UnsupportedModelError when the teacher cannot be exported or its graph does not equal it, and TeacherError
    when a weight is not finite.
    """
    _require_finite(teacher.program or teacher.module, teacher.source)  # type: ignore[arg-type]
    program, run = _program(teacher)
    if teacher.module is not None:
        _bound_context(teacher, program)
    longest = teacher.info.get("context_length") or max(t for _, t in shapes)
    shapes = tuple((b, min(t, longest)) for b, t in shapes)
    capture = capture_program(
        program, teacher=lambda *args: logits_of(run(*args)), implementation=teacher.kind, shapes=shapes
    )
    if len(placeholders(capture.gm)) > 2:
        names = [n.name for n in placeholders(capture.gm)]
        raise UnsupportedModelError(teacher.source, f"takes {names}; want input_ids and at most position_ids")
    _shorten(teacher, longest_positions(capture))
    weights = dict(capture.gm.named_parameters()) | dict(capture.gm.named_buffers())
    return replace(capture, fingerprint=fingerprint(weights, ""))


def capture_shell(teacher: Teacher) -> Capture:
    """The graph of a teacher without weights (`shell_teacher`), compared with nothing: there is nothing to compute.

    Raises UnsupportedModelError when the teacher cannot be exported.
    """
    return canonical(_program(teacher)[0], teacher.kind)
