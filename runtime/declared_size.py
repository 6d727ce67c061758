"""A checkpoint's configuration says how large a model to build; its files say how large it can be.

Far more layers or parameters than the files hold are refused before memory is taken for them. Nearer than that,
transformers itself says which weights are missing or have another shape.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tcal_compiler.errors import TeacherError

_SLACK = 1 << 20  # parameters
_PER_VALUE, _PER_PACKED = 2, 16  # parameters for a stored value, and for one that may hold several
_TABLES = 1 << 26  # values of tables that are computed, such as positions
_PER_BYTE = 8  # parameters for a byte of GGUF; its smallest types have 1.5 bits for one


def check_folder(config: Any, folder: Path) -> None:
    """Compares a transformers configuration with the folder's weight files.

    Raises TeacherError, or what safetensors raises for a damaged file.
    """
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    safe, others = list(folder.glob("*.safetensors")), list(folder.glob("*.bin"))
    if not safe and not others:
        return  # transformers says which files it wants
    tensors = values = sum(p.stat().st_size for p in others)  # at most so many
    for path in safe:
        with safe_open(str(path), framework="pt") as f:
            shapes = [f.get_slice(name).get_shape() for name in f.keys()]  # noqa: SIM118
        tensors, values = tensors + len(shapes), values + sum(map(math.prod, shapes))
    _check_layers(config, tensors, folder)
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config)
    packed = getattr(config, "quantization_config", None) is not None
    _check_parameters(shell, (_PER_PACKED if packed else _PER_VALUE) * values, folder)


def gguf_shell(config: Any, model_class: Any, path: Path) -> nn.Module:
    """The model of a configuration that was read from a GGUF file, without memory. Raises TeacherError."""
    with path.open("rb") as f:
        _check_layers(config, int.from_bytes(f.read(16)[8:], "little"), path)
    with torch.device("meta"):
        shell = model_class(config)
    _check_parameters(shell, _PER_BYTE * path.stat().st_size, path)
    return shell


def _check_layers(config: Any, tensors: int, where: Path) -> None:
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > tensors:
        _refuse(where, f"the configuration says {layers} layers, the files hold {tensors} tensors")


def _check_parameters(shell: nn.Module, most: int, where: Path) -> None:
    wanted = sum(p.numel() for p in shell.parameters())
    if wanted > most + _SLACK:
        _refuse(where, f"the configuration says {wanted} parameters, the files can hold {most}")
    if (tables := sum(b.numel() for b in shell.buffers())) > most + _TABLES:
        _refuse(where, f"the configuration says tables of {tables} values, the files can hold {most} parameters")


def _refuse(where: Path, what: str) -> None:
    raise TeacherError(str(where), what, "a complete checkpoint, with the configuration that it was saved with")
