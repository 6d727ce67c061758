"""What alignment and distillation share: the schedule, the order of sequences, and the state that a stopped run resumes
from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tcal_compiler.errors import RunFolderError

from .config import TrainConfig
from .durable import write_atomic
from .teacher import fingerprint

_META, _HASH = "tcal", "sha256"


@dataclass
class TrainState:
    """What a stopped run resumes from. step: steps done. tensors: everything that decides later steps."""

    step: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    curve: list[dict[str, object]] = field(default_factory=list)


Save = Callable[[TrainState], None]


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
        from safetensors.torch import save

        tensors = {n: t.detach().cpu().contiguous() for n, t in state.tensors.items()}
        meta = json.dumps({"step": state.step, "curve": state.curve})
        write_atomic(self.path, save(tensors, metadata={_META: meta, _HASH: fingerprint(tensors, meta)}))

    def load(self) -> TrainState | None:
        """The state that was saved last; None when there is none.

        Raises RunFolderError when the file is damaged or its sha256 is not the one that it holds.
        """
        from safetensors import SafetensorError, safe_open

        if not self.path.is_file():
            return None
        try:
            with safe_open(str(self.path), framework="pt") as f:
                text, sha = f.metadata()[_META], f.metadata()[_HASH]
                tensors = {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118
            meta = json.loads(text)
            state = TrainState(int(meta["step"]), tensors, list(meta["curve"]))
            if fingerprint(tensors, text) != sha:
                raise ValueError("another sha256 than when it was written")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as e:
            what = f"cannot be read: {e}"
            raise RunFolderError(str(self.path), what, "delete it: the stage then starts over") from e
        return state
