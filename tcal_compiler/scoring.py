"""The stages score-kl, score-ar and score-greedy of a run folder: what the policies of these names rank by."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import DEFAULT_POLICY, Config
from .passes.choose import choose, scored_by
from .passes.graph import move_to
from .passes.types import Plan
from .progress import Progress
from .runtime.run_folder import RunFolder
from .runtime.score_sites import Trials, initial_student, score_sites

if TYPE_CHECKING:
    from .api import Source


def scored_plan(
    run: RunFolder, source: Source, ids: Tensor, config: Config, device: torch.device, progress: Progress
) -> Plan:
    """The plan of a policy that ranks sites; their scores are measured once for a teacher, text and initialisation.

    ids: the calibration sequences, the held-out ones last; the last config.score.sequences are measured on.
    """
    chosen = config.policy or DEFAULT_POLICY
    policy, calib, capture, scan = scored_by(chosen), config.calib, source.capture, source.scan
    assert policy is not None
    settings: dict[str, Any] = {"sequences": config.score.sequences}
    if policy != "ar":
        settings |= {"init": config.init, "seed": config.seed, "calib": calib.sequences}
    tokens = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    inputs = {"teacher": capture.fingerprint, "tokens": tokens}
    with run.stage(f"score-{policy}", config=settings, inputs=inputs) as stage:
        if not stage.done:
            move_to(capture.gm, device)
            initial = None
            if policy != "ar":
                initial = initial_student(
                    capture,
                    scan,
                    ids[: calib.sequences],
                    init=config.init,
                    seed=config.seed,
                    batch=calib.batch,
                    cache=stage.scratch / "initial.safetensors",
                    progress=progress.bar,
                )
            scores = score_sites(
                Trials(capture, scan, policy, initial),
                ids[-config.score.sequences :],
                batch=calib.batch,
                cache=stage.scratch / "scores.json",
                progress=progress.bar(f"scores for {policy}: one model a site"),
            )
            rows = [asdict(s) for s in scores]
            file = stage.dir / "scores" / f"{policy}.json"
            file.parent.mkdir()
            file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            stage.evidence = {"sites": rows}
        found: Any = stage.evidence["sites"]
    return choose(scan, chosen, {s["index"]: s["value"] for s in found})
