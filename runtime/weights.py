"""Weights of a student in safetensors: every tensor once, tied names resolved."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from tcal_compiler.errors import RunFolderError
from tcal_compiler.passes.types import AttentionSite

from .hashed_tensors import save_tensors
from .mixer import GdnMixer
from .student import Student


def unique_state(student: Student) -> dict[str, Tensor]:
    """Parameters and persistent tensors by their first name, each once."""
    seen: dict[tuple[int, int], str] = {}
    out: dict[str, Tensor] = {}
    for name, tensor in student.state_dict().items():
        key = tensor.untyped_storage()._cdata, int(tensor.storage_offset())  # tensors without values have no data_ptr
        if key in seen and tensor.numel() and out[seen[key]].shape == tensor.shape:
            continue
        seen[key] = name
        out[name] = tensor.contiguous().cpu()
    return out


def save_weights(student: Student, path: Path, *, only: set[str] | None = None) -> None:
    """Writes all weights, or those named."""
    state = unique_state(student)
    save_tensors(path, {n: t.clone() for n, t in state.items() if only is None or n in only})


def load_weights(student: Student, path: Path) -> None:
    """Sets the student's weights from a file that save_weights wrote.

    Raises RunFolderError when the file is damaged, does not fit, or lacks a weight of a mixer.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(str(path))
    except (OSError, MemoryError, SafetensorError) as e:
        raise RunFolderError(str(path), f"cannot be read: {e}", "run tcal-compile again") from e
    own = student.state_dict()
    for name, tensor in state.items():
        if name not in own or own[name].shape != tensor.shape:
            shape = tuple(own[name].shape) if name in own else "no such weight"
            what = f"{name} is {tuple(tensor.shape)}, the student has {shape}"
            raise RunFolderError(str(path), what, _as_made(name))
    for name in _mixer_names(student):
        if name not in state:
            what = f"has no {name}, which the student has as {tuple(own[name].shape)}"
            raise RunFolderError(str(path), what, _as_made(name))
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)


def _mixer_names(student: Student) -> list[str]:
    """Weights that no teacher has: they are in every file of weights."""
    mixers = [(name, m) for name, m in student.gm.named_modules() if isinstance(m, GdnMixer)]
    return [f"{name}.{part}" for name, m in mixers for part, _ in m.named_parameters()]


def _as_made(name: str) -> str:
    """What to try when a file's weights are not the student's."""
    hint = "the tcal-compile command of this run with --restart, or with -o for another folder"
    if name.endswith(".local_scale"):  # of the attention over the last tokens
        hint += "; --local-window says whether there is one, versions before that option made none (0)"
    return hint


def site_names(student: Student, sites: Iterable[AttentionSite]) -> set[str]:
    """Weights between x and y of the sites in the student's graph, a mixer's included."""
    from tcal_compiler.passes.site_program import cut_program

    names: set[str] = set()
    for s in sites:
        names |= set(cut_program(student.gm, inputs_from=[s.x], outputs=[s.y]).params.values())
    return names


def changed_names(student: Student) -> set[str]:
    """Weights that conversion may change: mixers, and what lies between a converted site's x and y."""
    return site_names(student, student.converted)
