"""What alignment and distillation share: the schedule, the order of sequences, and the state that a stopped run resumes
from.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tcal_compiler.errors import RunFolderError
from tcal_compiler.passes.json_text import read_json

from .config import TrainConfig
from .hashed_tensors import load_hashed, save_hashed


@dataclass
class TrainState:
    """What a stopped run resumes from. step: steps done. tensors: everything that decides later steps."""

    step: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    curve: list[dict[str, object]] = field(default_factory=list)


Save = Callable[[TrainState], None]


@contextlib.contextmanager
def products_for(device: torch.device) -> Iterator[None]:
    """Inside, float32 matrix products on CUDA may round their factors to TensorFloat32; elsewhere nothing changes."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Factor of the peak rate: linear warm-up, then half a cosine to zero."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    return warm * 0.5 * (1 + math.cos(math.pi * step / max(1, config.steps)))


def batch_indices(step: int, *, sequences: int, batch: int, seed: int) -> Tensor:
    """Sequences of a step: each epoch is a new permutation, a function of seed and step alone, so resuming is exact."""
    per_epoch = max(1, sequences // batch)
    gen = torch.Generator().manual_seed(seed * 1_000_003 + step // per_epoch)
    start = step % per_epoch * batch
    return torch.randperm(sequences, generator=gen)[start : start + min(batch, sequences)]


@dataclass(frozen=True)
class Checkpoint:
    """The file of a training stage's state, replaced atomically; it holds the sha256 of what it says."""

    path: Path

    def save(self, state: TrainState) -> None:
        save_hashed(self.path, state.tensors, json.dumps({"step": state.step, "curve": state.curve}))

    def load(self) -> TrainState | None:
        """The state that was saved last; None when there is none.

        Raises RunFolderError when the file is damaged or its sha256 is not the one that it holds.
        """
        if not self.path.is_file():
            return None
        hint = "delete it: the stage then starts over"
        tensors, text = load_hashed(self.path, hint=hint)
        try:
            meta = read_json(text)
            state = TrainState(int(meta["step"]), tensors, [dict(p) for p in meta["curve"]])
            if not state.curve or state.step < 0 or not all(type(p["step"]) is int for p in state.curve):
                raise ValueError(f"no state of a training: step {state.step}, a curve of {len(state.curve)} points")
            return state
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as e:
            raise RunFolderError(str(self.path), f"cannot be read: {e}", hint) from e
