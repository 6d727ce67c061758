"""A module in memory: captured, compared with a run folder's teacher, converted on the spot. No file is written."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tcal_compiler.errors import DataError, UnsupportedModelError
from tcal_compiler.passes.capture import require_causal
from tcal_compiler.passes.choose import choose
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.passes.graph import move_to
from tcal_compiler.passes.local_windows import with_local_windows
from tcal_compiler.passes.rewrite_gdn import MIXERS
from tcal_compiler.passes.types import Capture

from .align import align
from .calibrate import initialise
from .capture_teacher import capture_teacher
from .config import LOCAL_WINDOW, AlignConfig, InitName
from .student import Student, make_student, require_sites
from .taps import collect_taps
from .teacher import live_teacher

WHERE = "the compiled model"
SHORTEST = 8  # tokens of a calibration sequence
BATCH = 8  # sequences in one forward of the teacher
BATCHES = "the calibration batches"
BATCHES_HINT = f"a list of int64 token ids [B, T] of one length T from {SHORTEST} on, at least 2 sequences together"


def device_of(module: nn.Module) -> torch.device:
    """The one device of all parameters and buffers. Raises UnsupportedModelError when there are none or several."""
    devices = {t.device for t in [*module.parameters(), *module.buffers()]}
    if len(devices) != 1:
        raise UnsupportedModelError(WHERE, f"its weights are on {sorted(map(str, devices))}", "a model on one device")
    return devices.pop()


def capture_live(module: nn.Module) -> Capture:
    """The captured graph of a module in memory, on the CPU, with its fingerprint; the module stays as it is.

    Raises UnsupportedModelError when it cannot be exported.
    """
    if device_of(module).type != "cpu":
        tensors = [*module.parameters(), *module.buffers()]
        here = {id(t): _on_cpu(t) for t in tensors}
        module = copy.deepcopy(module, dict(here))
    with _as_written(module):
        return capture_teacher(live_teacher(module, WHERE))


@contextmanager
def _as_written(module: nn.Module) -> Iterator[None]:
    """Without what module.compile() put in place of its forward, and of those of modules inside of it."""
    compiled = {m: m._compiled_call_impl for m in module.modules() if m._compiled_call_impl is not None}
    for m in compiled:
        m._compiled_call_impl = None
    try:
        yield
    finally:
        for m, call in compiled.items():
            m._compiled_call_impl = call


def _on_cpu(tensor: Tensor) -> Tensor:
    data = tensor.detach().cpu()
    return nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def student_of_batches(
    module: nn.Module,
    batches: Sequence[Tensor],
    *,
    policy: str,
    init: InitName = "closed-form",
    local_window: int = LOCAL_WINDOW,
    seed: int = 0,
    config: AlignConfig | None = None,
) -> Student:
    """A conversion in memory, on the module's device: plan, statistics, initial values, alignment.

    Args:
        batches: int64 token ids [B, T], all of one length T. The last eighth of the sequences only scores.
        local_window: tokens of the attention beside the states, see `with_local_windows`.

    Raises:
        TcalError: as a conversion does; DataError when the batches are no token ids of this model.
    """
    config = config or AlignConfig()
    if wrong := [f"{n} is {_describe(p)}" for n, p in module.named_parameters() if p.dtype != torch.float32]:
        raise UnsupportedModelError(WHERE, f"{wrong[0]}; float32 weights are converted", "model.float()")
    context = live_teacher(module, WHERE).info["context_length"]
    ids = _token_ids(batches, context)
    capture = capture_live(module)
    if int(ids.min()) < 0 or int(ids.max()) >= capture.vocab_size:
        what = f"hold ids {ids.min()} to {ids.max()}, but the vocabulary has {capture.vocab_size}"
        raise DataError(BATCHES, what, BATCHES_HINT)
    require_sites(scan := with_local_windows(find_attention(capture), local_window))
    student = make_student(capture, scan, choose(scan, policy))
    require_causal(capture, context=context)
    for gm in (capture.gm, student.gm):
        move_to(gm, device_of(module))
    if not student.converted:
        return student
    train = len(ids) - max(1, len(ids) // 8)
    groups = collect_taps(student, capture.gm, ids, batch=BATCH)
    seen = [replace(g, x=g.x[:, :train], y=g.y[:, :train]) for g in groups]
    student, _ = initialise(student, seen, init=init, seed=seed, batch=BATCH)
    if config.steps:
        student, _ = align(student, groups, train=train, config=config, seed=seed)
    return student


def _token_ids(batches: Sequence[Tensor], context: int | None) -> Tensor:
    """All sequences [N, T], on the CPU."""
    if any(t.dtype != torch.int64 or t.dim() != 2 for t in batches) or len({t.shape[1] for t in batches}) != 1:
        raise DataError(BATCHES, f"are {_some(map(_describe, batches)) or 'none'}", BATCHES_HINT)
    ids = torch.cat([t.cpu() for t in batches])
    if len(ids) < 2 or ids.shape[1] < SHORTEST:
        raise DataError(BATCHES, f"hold {len(ids)} sequences of {ids.shape[1]} tokens", BATCHES_HINT)
    if context is not None and ids.shape[1] > context:
        raise DataError(
            BATCHES, f"are {ids.shape[1]} tokens long, but the model's context holds {context}", BATCHES_HINT
        )
    return ids


def difference(capture: Capture, run: Path) -> str:
    """In which weights a model differs from the run's teacher: by name, dtype and shape, then by value.

    The run folder keeps the teacher's values of all weights that conversion left alone.
    """
    from safetensors import safe_open

    named = [*capture.gm.named_parameters(remove_duplicate=False), *capture.gm.named_buffers(remove_duplicate=False)]
    mine = dict(named)
    with safe_open(str(run / "initial.safetensors"), framework="pt") as f:
        changed = set(f.keys())
    with safe_open(str(run / "weights.safetensors"), framework="pt") as f:
        theirs = {n for n in f.keys() if not n.startswith(f"{MIXERS}.")}  # noqa: SIM118
        known = {id(mine[n]) for n in theirs & set(mine)}
        if missing := sorted(theirs - set(mine)):
            return f"it lacks {_some(missing)}; it has {_some(sorted(set(mine) - theirs)) or 'no others'}"
        if extra := sorted(n for n, t in named if id(t) not in known):
            return f"it has {_some(extra)} besides"
        for name in sorted(theirs):
            tensor, want = mine[name], f.get_tensor(name)
            if (tensor.shape, tensor.dtype) != (want.shape, want.dtype):
                return f"{name} is {_describe(tensor)}, its own is {_describe(want)}"
        for name in sorted(theirs - changed):
            if not torch.equal(mine[name], want := f.get_tensor(name)):
                return f"the values of {name} differ, by {(mine[name] - want).abs().max().item():.3g} at most"
    return f"values differ in layers that were converted, in some of {_some(sorted(changed & theirs))}"


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
