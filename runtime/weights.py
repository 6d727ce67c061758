"""Weights of a student in safetensors: every tensor once, tied names resolved."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from tcal_compiler.errors import RunFolderError
from tcal_compiler.passes.types import AttentionSite

from .hashed_tensors import save_tensors
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

    Raises RunFolderError when the file is damaged or does not fit.
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
            raise RunFolderError(str(path), f"{name} is {tuple(tensor.shape)}, the student has {shape}")
        with torch.no_grad():
            own[name].copy_(tensor)


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
