"""Weights of a student in safetensors: every tensor once, tied names resolved."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from tcal_compiler.errors import RunFolderError

from .align import AlignState
from .durable import write_atomic
from .student import Student
from .teacher import fingerprint

_META, _HASH = "tcal", "sha256"


def unique_state(student: Student) -> dict[str, Tensor]:
    """Parameters and persistent tensors by their first name, each once."""
    seen: dict[int, str] = {}
    out: dict[str, Tensor] = {}
    for name, tensor in student.state_dict().items():
        if tensor.data_ptr() in seen and tensor.numel() and out[seen[tensor.data_ptr()]].shape == tensor.shape:
            continue
        seen[tensor.data_ptr()] = name
        out[name] = tensor.contiguous().cpu()
    return out


def save_weights(student: Student, path: Path, *, only: set[str] | None = None) -> None:
    """Writes all weights, or those named."""
    from safetensors.torch import save_file

    state = unique_state(student)
    save_file({n: t.clone() for n, t in state.items() if only is None or n in only}, str(path))


def load_weights(student: Student, path: Path) -> None:
    """Sets the student's weights from a file that save_weights wrote.

    Raises RunFolderError when the file is damaged or does not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(str(path))
    except (OSError, SafetensorError) as e:
        raise RunFolderError(str(path), f"cannot be read: {e}", "run tcal-compile again") from e
    own = student.state_dict()
    for name, tensor in state.items():
        if name not in own or own[name].shape != tensor.shape:
            shape = tuple(own[name].shape) if name in own else "no such weight"
            raise RunFolderError(str(path), f"{name} is {tuple(tensor.shape)}, the student has {shape}")
        with torch.no_grad():
            own[name].copy_(tensor)


def changed_names(student: Student) -> set[str]:
    """Weights that conversion may change: mixers, and what lies between a converted site's x and y."""
    from tcal_compiler.passes.site_program import cut_program

    names: set[str] = set()
    for s in student.converted:
        names |= set(cut_program(student.gm, inputs_from=[s.x], outputs=[s.y]).params.values())
    return names


def save_align_state(state: AlignState, path: Path) -> None:
    """One file, replaced atomically, that a training stage can resume from; it holds the sha256 of what it says."""
    from safetensors.torch import save

    tensors = {n: t.detach().cpu().contiguous() for n, t in state.tensors.items()}
    meta = json.dumps({"step": state.step, "curve": state.curve})
    write_atomic(path, save(tensors, metadata={_META: meta, _HASH: fingerprint(tensors, meta)}))


def load_align_state(path: Path) -> AlignState | None:
    """The state of a stopped alignment or distillation; None when there is none.

    Raises RunFolderError when the file is damaged or its sha256 is not the one that it holds.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as f:
            text, sha = f.metadata()[_META], f.metadata()[_HASH]
            tensors = {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118
        meta = json.loads(text)
        state = AlignState(int(meta["step"]), tensors, list(meta["curve"]))
        if fingerprint(tensors, text) != sha:
            raise ValueError("another sha256 than when it was written")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as e:
        raise RunFolderError(str(path), f"cannot be read: {e}", "delete it: the stage then starts over") from e
    return state
