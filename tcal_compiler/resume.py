"""How a training stage of a run folder goes on after a stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .progress import Progress
from .runtime.run_folder import Stage
from .runtime.training import Checkpoint, Save, TrainState


@contextmanager
def resuming(stage: Stage, progress: Progress, steps: int) -> Iterator[tuple[TrainState | None, Save]]:
    """What a stopped run of the stage left, if any, and where to keep the state of this one.

    Both are told of: where it goes on, and when Ctrl-C stops it inside the block, what the next run goes on from.
    """
    checkpoint = Checkpoint(stage.scratch / f"{stage.name}.safetensors")
    state = checkpoint.load()
    kept = 0 if state is None else state.step
    if kept:
        progress.say(f"stage {stage.name} goes on from step {kept} of {steps}")

    def save(state: TrainState) -> None:
        nonlocal kept
        checkpoint.save(state)
        kept = state.step

    try:
        yield state, save
    except KeyboardInterrupt:
        what = f"is kept up to step {kept} of {steps}" if kept else "has no checkpoint yet: it begins anew"
        progress.say(f"stage {stage.name} {what}")
        raise
