"""tcal-compile --dry-run: the plan, and time, memory and disk of each stage, before anything is written."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .api import STAGES, prepare
from .config import DEFAULT_POLICY, Config
from .errors import ConfigError
from .passes.choose import FORWARD, JOINT, RULES, budget_of, candidates, choose, scored_by
from .passes.types import Plan, SiteScan
from .progress import Parts, Progress, clock
from .report.conclusion import within_windows
from .runtime.distill_checks import check_short, check_train
from .runtime.meter import Meter, Time
from .runtime.step_seconds import policy_seconds
from .trial import StageCost, Trial

# Shares of the pieces, the capture of the teacher being 1
REPORT = "report"
PIECES = {"calibrate": 0.8, "align": 2.0, "distill": 2.5, "export": 2.0, REPORT: 0.2}


@dataclass(frozen=True)
class DryRun:
    """sites, refused: as tcal inspect. stages: in the order in which they run, loading first. trial: what this cost.

    exact: the plan is the one that the run will have; else as many sites stay softmax, but the policy measures which.
    idle: stages that have nothing to do; the process holds memory in them all the same.
    note: what is wrong with the settings, in a sentence without its full stop; empty where nothing is.
    """

    teacher: str
    sites: list[dict[str, Any]]
    refused: list[dict[str, Any]]
    plan: Plan
    exact: bool
    stages: list[StageCost]
    trial: Time
    idle: tuple[str, ...] = ()
    note: str = ""

    @property
    def total(self) -> StageCost:
        """Times added up, the largest memory, all files, and the largest of the scratch files."""
        time = sum((s.time for s in self.stages), Time())
        peak, scratch = (max(getattr(s, n) for s in self.stages) for n in ("peak", "scratch"))
        return StageCost("in all", time, peak, sum(s.files for s in self.stages), scratch)

    def as_json(self) -> dict[str, Any]:
        def row(cost: StageCost) -> dict[str, Any]:
            values = {"peak_bytes": cost.peak, "file_bytes": cost.files, "scratch_bytes": cost.scratch}
            return {"stage": cost.stage} | {k: round(v, 3) for k, v in asdict(cost.time).items()} | values

        plan = {"policy": self.plan.policy, "keep": list(self.plan.keep), "convert": list(self.plan.convert)}
        return {
            "teacher": self.teacher,
            "sites": self.sites,
            "refused": self.refused,
            "plan": plan | {"exact": self.exact},
            "stages": [row(s) for s in self.stages],
            "total": row(self.total),
            "dry_run": asdict(self.trial),
            "note": self.note,
        }

    def text(self) -> str:
        """For a reader."""
        kept, turned = self.plan.keep, len(self.plan.convert)
        which = f"layers {list(kept)}" if self.exact else f"{len(kept)} layers that the policy has yet to measure"
        lines = [
            f"{self.teacher}: {len(self.sites)} attention cores can be converted, {len(self.refused)} cannot.",
            f"{self.plan.policy}: {turned} become Gated DeltaNet, {which} stay softmax.\n",
            _row("stage", "time", "CPU time", "peak memory", "files", "temporary"),
        ]
        for s in [*self.stages, self.total]:
            sizes = map(size_text, (s.peak, s.files, s.scratch))
            times = map(_time, (s.time.seconds, s.time.cpu_seconds))
            lines.append(_row(s.stage, *("-" * 5 if s.stage in self.idle else (*times, *sizes))))
        note = [f"{self.note}."] if self.note else []
        took = f"Measured in {clock(self.trial.seconds)} on a piece of each stage. Nothing was written."
        return "\n".join([*lines, "", *note, took])


def _row(name: str, *cells: str) -> str:
    return f"{name:10}" + "".join(c.rjust(13) for c in cells)


def _time(seconds: float) -> str:
    return clock(seconds) if seconds >= 10 else f"{seconds:.1f} s"


def size_text(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB" if count else "-"


def stand_in(scan: SiteScan, policy: str) -> tuple[Plan, int]:
    """A plan of as many sites at even distances, and the trial models of a policy that measures them.

    For a bound on the KL nothing is known: no site stays softmax, and every set that forward may ask for is counted.
    Raises ConfigError where every site stays softmax.
    """
    seconds, sites = policy_seconds(scan, policy), len(scan.sites)
    budget = budget_of(scan, policy, seconds)
    if budget.nats is not None:
        kept, asked = 0, sites
    else:
        sets = ((tuple(range(n)), math.nan) for n in range(sites + 1))
        kept = asked = len(budget.pick(scan, ((tuple(scan.sites[i].index for i in k), kl) for k, kl in sets))[-1][0])
    if kept == sites:
        what = f"{policy} keeps all {sites} sites, so that no piece of its scores can be run"
        raise ConfigError("--policy", what, "all, the same plan without scores")
    models, measure = sites, scored_by(policy)
    if measure == FORWARD:
        models = 1 + sum(range(sites - asked + 1, sites + 1))
    elif measure == JOINT:
        ranks = {rule: {s.index: 0.0 for s in scan.sites} for rule in RULES}
        models = len(RULES) * sites + len(candidates(scan, policy, ranks, seconds))
    even = choose(scan, f"uniform:{kept}")
    return Plan(even.keep, even.convert, policy), models


def dry_run(
    teacher: str,
    *,
    out: str | Path,
    config: Config | None = None,
    tokenizer: str | None = None,
    allow_pickle: bool = False,
    plan: Path | None = None,
    until: str = "export",
    device: str = "cpu",
    progress: Progress | None = None,
) -> DryRun:
    """What `convert` with the same arguments would do and cost on this machine, all stages anew; writes nothing.

    One batch of every stage is run in memory and counted up (see trial.py). Raises what convert raises for bad input,
    and ConfigError for a device other than the CPU, whose memory is not measured.
    """
    config, progress = config or Config(), progress or Progress(quiet=True)
    if device != "cpu":
        raise ConfigError("--dry-run", f"measures on the CPU, not on {device}", "no --device; tcal inspect says less")
    with Meter() as whole:
        with Meter() as load:
            job = prepare(
                teacher,
                out=Path(out),
                config=config,
                tokenizer=tokenizer,
                allow_pickle=allow_pickle,
                plan=plan,
                until=until,
                device=device,
                progress=progress,
            )
        scan, policy, models = job.source.scan, config.policy or DEFAULT_POLICY, 0
        chosen = job.chosen
        if chosen is None:
            chosen, models = stand_in(scan, policy)
        check_train(config.distill, chosen)
        check_short(config.distill, config.calib.length)
        stages = [StageCost("load", load.time, load.peak)]
        trial = Trial(job.source, chosen, job.ids, config)
        names = STAGES[: STAGES.index(until) + 1]
        pieces = {*names, REPORT} - ({"distill"} if not config.distill.active else set())
        shares = {n: share for n, share in PIECES.items() if n in pieces}
        parts = Parts(progress, "dry run, pieces of the stages", shares, unit=job.source.capture_seconds)
        for name in names:
            if name in shares:
                parts.begin(name)
            stages.append(trial.stage(name))
            if name == "calibrate" and models:
                stages.insert(1, trial.score(models))
        parts.begin(REPORT)
        stages.append(trial.report())
    sites = [s.summary() | {"becomes": "softmax" if s.index in chosen.keep else "gated delta net"} for s in scan.sites]
    refused = [asdict(r) for r in scan.rejected]
    idle = () if config.distill.active and chosen.convert else ("distill",)
    note = within_windows(config.calib.length, [s for s in scan.sites if s.index in chosen.convert])
    return DryRun(job.source.teacher.source, sites, refused, chosen, not models, stages, whole.time, idle, note)
