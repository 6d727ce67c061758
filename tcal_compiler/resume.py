"""How a training stage of a run folder goes on after a stop."""

from __future__ import annotations

from .progress import Progress
from .runtime.run_folder import Stage
from .runtime.training import Checkpoint, Save, TrainState


def resume_stage(stage: Stage, progress: Progress) -> tuple[TrainState | None, Save]:
    """What a stopped run of the stage left, if any, and where to keep the state of this one."""
    checkpoint = Checkpoint(stage.scratch / f"{stage.name}.safetensors")
    state = checkpoint.load()
    if state is not None:
        progress.say(f"stage {stage.name} goes on from step {state.step}")
    return state, checkpoint.save
