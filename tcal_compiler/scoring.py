"""The stages score-kl, score-ar, score-greedy and score-forward of a run folder: what these policies choose by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import DEFAULT_POLICY, Config
from .passes.choose import FORWARD, choose, scored_by
from .passes.graph import move_to
from .passes.types import Plan
from .progress import Progress
from .recorded import reading
from .runtime.manifest import hash_json
from .runtime.run_folder import RunFolder
from .runtime.score_sites import Trials, initial_student, score_sites
from .runtime.select_sites import Sets, SetScores, forward_path, sets_from_rows
from .runtime.student import Student

if TYPE_CHECKING:
    from .source import Source


class Scoring:
    """What the policies measure: a teacher and its text. ids: calibration sequences, the held-out ones last."""

    def __init__(
        self, run: RunFolder, source: Source, ids: Tensor, config: Config, device: torch.device, progress: Progress
    ) -> None:
        self.run, self.source, self.ids, self.config = run, source, ids, config
        self.device, self.progress = device, progress
        self.policy = DEFAULT_POLICY if config.policy is None else config.policy
        tokens = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
        self.inputs = {"teacher": source.capture.fingerprint, "tokens": tokens}
        self.settings: dict[str, Any] = {"sequences": config.score.sequences}
        if scored_by(self.policy) != "ar":
            self.settings |= {"init": config.init, "seed": config.seed, "calib": config.calib.sequences}
        self.measured_on = ids[-config.score.sequences :]

    def initial(self, scratch: Path) -> Student:
        """Every site converted and initialised, kept in scratch while the stage runs."""
        return initial_student(
            self.source.capture,
            self.source.scan,
            self.ids[: self.config.calib.sequences],
            init=self.config.init,
            seed=self.config.seed,
            batch=self.config.calib.batch,
            cache=scratch / "initial.safetensors",
            progress=self.progress.bar,
        )

    def ranked_plan(self) -> Plan:
        """One model a site, measured once for a teacher, text and initialisation, whatever the budget."""
        policy = scored_by(self.policy)
        assert policy is not None
        with self.run.stage(f"score-{policy}", config=self.settings, inputs=self.inputs) as stage:
            if not stage.done:
                move_to(self.source.capture.gm, self.device)
                initial = None if policy == "ar" else self.initial(stage.scratch)
                scores = score_sites(
                    Trials(self.source.capture, self.source.scan, policy, initial),
                    self.measured_on,
                    batch=self.config.calib.batch,
                    cache=stage.scratch / "scores.json",
                    progress=self.progress.bar(f"scores for {policy}: one model a site"),
                )
                stage.evidence = {"sites": [asdict(s) for s in scores]}
                _write(stage.dir, policy, stage.evidence["sites"])
            found: Any = stage.evidence["sites"]
        return choose(self.source.scan, self.policy, {s["index"]: s["value"] for s in found})

    def forward_plan(self, *, reuse: bool) -> Plan:
        """Forward selection; with reuse, sets that another budget had measured are not measured again."""
        scan, made_from = self.source.scan, hash_json([self.settings, self.inputs])
        known = self._known(made_from) if reuse else {}
        settings = self.settings | {"policy": self.policy}
        with self.run.stage(f"score-{FORWARD}", config=settings, inputs=self.inputs) as stage:
            if stage.done:
                with reading(self.run.path):
                    return choose(scan, self.policy, path=_path(stage.evidence["path"]))
            move_to(self.source.capture.gm, self.device)
            scores = SetScores(
                self.source.capture,
                scan,
                self.measured_on,
                initial=lambda: self.initial(stage.scratch),
                batch=self.config.calib.batch,
                cache=stage.scratch / "sets.json",
                known=known,
            )
            path: list[tuple[tuple[int, ...], float]] = []
            plan = choose(scan, self.policy, path=_noted(forward_path(scores, self.progress.bar), path.append))
            stage.evidence = {
                "made_from": made_from,
                "sets": scores.rows(),
                "path": [{"keep": list(keep), "kl": kl} for keep, kl in path],
            }
            _write(stage.dir, FORWARD, stage.evidence["sets"])
        return plan

    def _known(self, made_from: str) -> Sets:
        record = self.run.manifest.stages.get(f"score-{FORWARD}")
        with reading(self.run.path):
            if record is None or record.evidence["made_from"] != made_from:
                return {}
            rows: Any = record.evidence["sets"]
            return sets_from_rows(rows)


def _path(rows: Any) -> list[tuple[tuple[int, ...], float]]:
    return [(tuple(row["keep"]), row["kl"]) for row in rows]


def _noted(path: Any, note: Callable[[Any], None]) -> Any:
    for item in path:
        note(item)
        yield item


def _write(folder: Path, policy: str, rows: Any) -> None:
    file = folder / "scores" / f"{policy}.json"
    file.parent.mkdir()
    file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def scored_plan(
    run: RunFolder,
    source: Source,
    ids: Tensor,
    config: Config,
    device: torch.device,
    progress: Progress,
    *,
    reuse: bool = True,
) -> Plan:
    """The plan of a policy that measures sites, on the last config.score.sequences of ids."""
    scoring = Scoring(run, source, ids, config, device, progress)
    return scoring.forward_plan(reuse=reuse) if scored_by(scoring.policy) == FORWARD else scoring.ranked_plan()
