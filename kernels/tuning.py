"""Launch settings that were measured on a card: `tuning.json`, which `--tune` of the benchmarks (`bench`) writes.

{"NVIDIA H200, Triton 3.6": {"gated_delta_rule, bfloat16, 64, 64": {"solve_warps": 2}}}: a card as PyTorch names it and
the Triton that compiled, then operator, dtype and head dims; fields that are not there are as without a table. An entry
holds for its own card and Triton alone, since another compiler may need more of the card, or be wrong.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("tuning.json")
Fields = dict[str, int]


@cache
def table() -> dict[str, dict[str, Fields]]:
    """The whole table, read once."""
    return json.loads(TABLE.read_text())


def tuned(op: str, dtype: torch.dtype, device: torch.device, *dims: int) -> Fields:
    """Fields for tensors of these head dims; none where nothing was measured."""
    return table().get(place(device), {}).get(key(op, dtype, *dims), {}) if device.type == "cuda" else {}


@cache
def place(device: torch.device) -> str:
    return f"{torch.cuda.get_device_name(device)}, Triton {'.'.join(version('triton').split('.')[:2])}"


def key(op: str, dtype: torch.dtype, *dims: int) -> str:
    return ", ".join([op, str(dtype).removeprefix("torch."), *map(str, dims)])
