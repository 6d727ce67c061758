"""The conversion from teacher to deployed student: the only file that knows the order of the stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from .config import Config
from .conversion import Conversion
from .errors import ConfigError, TcalError
from .inputs import check_names
from .passes.capture import require_causal
from .passes.choose import check_policy
from .passes.make_stateful import require_states
from .passes.types import Plan
from .progress import Progress
from .recorded import check_sizes, reading
from .report import PLOTS_HINT, can_plot, render_report
from .runtime.distill_checks import check_processes
from .runtime.manifest import TeacherRecord, package_version
from .runtime.memory import is_out_of_memory, out_of_memory_error
from .runtime.onnx_export import check_supported
from .runtime.parallel import current
from .runtime.run_files import check_output
from .runtime.run_folder import RunFolder
from .runtime.sources import CalibrationText
from .runtime.tokenizer import find_tokenizer
from .scoring import Scoring, check_distilled_sets
from .source import Source, check_device, check_length, choose_plan, open_source

STAGES = ("plan", "calibrate", "align", "distill", "export")
T = TypeVar("T")
ASSETS = Path(__file__).parent / "assets"
CALIBRATION_TEXT = ASSETS / "text" / "calibration.txt"


def write_report(run: RunFolder, progress: Progress) -> None:
    """Renews report.md and, where matplotlib is installed, report.html from what the stages recorded."""
    inputs = {name: run.stage_hash(name) for name in run.manifest.stages if name != "report"}
    settings = {"html": can_plot(), "version": package_version()}
    with run.stage("report", config=settings, inputs=inputs) as stage:
        if not stage.done:
            with reading(run.path):
                text = render_report(run.manifest)
                page = render_report(run.manifest, html=True) if settings["html"] else ""
            (stage.dir / "report.md").write_text(text, encoding="utf-8")
            if page:
                (stage.dir / "report.html").write_text(page, encoding="utf-8")
    if not settings["html"]:
        progress.say(PLOTS_HINT)


def report_file(run: Path) -> Path:
    return page if (page := run / "report.html").is_file() else run / "report.md"


@dataclass(frozen=True)
class Job:
    """What a conversion starts from, all of it checked. chosen: None for a policy that measures the sites first."""

    source: Source
    record: TeacherRecord
    text: CalibrationText
    ids: Tensor
    chosen: Plan | None
    device: torch.device


def prepare(
    teacher: str,
    *,
    out: Path,
    config: Config,
    tokenizer: str | None,
    allow_pickle: bool,
    plan: Path | None,
    until: str,
    device: str,
    progress: Progress,
) -> Job:
    """Checks everything that a conversion is given, and reads it; writes nothing. Raises TcalError for bad input."""
    if until not in STAGES:
        raise ConfigError("until", f"unknown stage {until!r}", f"stages are {', '.join(STAGES)}")
    if STAGES.index(until) >= STAGES.index("distill"):
        check_processes(current(), config.distill)
    check_names(config.calib.text, teacher=teacher, tokenizer=tokenizer, out=out)
    place, calib = check_device(device), config.calib
    text = CalibrationText.of(calib.text, default=CALIBRATION_TEXT, repeats=calib.repeats)
    text.check()
    text.check_enough(count=calib.rows, length=calib.length, holdout=calib.holdout)
    find_tokenizer(None, tokenizer)
    if until == "export":
        check_supported(config.export)
    check_output(out)
    if config.policy is not None and plan is None and not (out / "plan.toml").exists():
        check_policy(config.policy)
    check_sizes(out, teacher, "another output folder with -o")
    source = open_source(teacher, tokenizer=tokenizer, allow_pickle=allow_pickle, progress=progress)
    source = source.with_local_window(config.local_window)
    assert source.tokenizer is not None
    record = TeacherRecord(source=source.teacher.source, fingerprint=source.capture.fingerprint)
    check_output(out, record)
    check_length(calib.length, source, "calib.length")
    ids = text.sequences(
        source.tokenizer, count=calib.rows, length=calib.length, holdout=calib.holdout, progress=progress.bar
    )
    chosen = choose_plan(source.scan, config, out, plan)
    if chosen is None:
        check_distilled_sets(config, source.scan)
    require_causal(source.capture, context=source.teacher.info.get("context_length"))
    if until == "export":
        require_states(source.scan, "tcal align or tcal distill --no-export, which stop before the ONNX model")
    return Job(source, record, text, ids, chosen, place)


def convert(
    teacher: str,
    *,
    out: str | Path,
    config: Config | None = None,
    tokenizer: str | None = None,
    allow_pickle: bool = False,
    plan: Path | None = None,
    until: str = "export",
    resume: bool = True,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Path:
    """Converts a teacher into the run folder `out`, going on from what is there; returns its path.

    Args:
        teacher: an exported program, a transformers folder, a .gguf file, module:factory, or "embedded".
        until: last stage to run, of STAGES.
        resume: False runs every stage anew.

    Raises:
        TcalError: bad input, before the folder is touched; or a stage that failed, with the last good stage kept.
    """
    config, progress, out = config or Config(), progress or Progress(quiet=True), Path(out)
    job = prepare(
        teacher,
        out=out,
        config=config,
        tokenizer=tokenizer,
        allow_pickle=allow_pickle,
        plan=plan,
        until=until,
        device=device,
        progress=progress,
    )
    source = job.source
    with RunFolder.create_or_open(
        out,
        teacher_fingerprint=job.record.fingerprint,
        teacher_source=job.record.source,
        teacher_kind=source.teacher.kind,
        vocab_size=source.capture.vocab_size,
        config_json=config.model_dump(mode="json"),
        resume=resume,
    ) as run:
        run.on_again = lambda stage, why: (
            None if stage == "report" else progress.say(f"stage {stage} runs again: {why}")
        )
        given = run, source, job.text, job.ids, config, job.device, progress
        chosen = job.chosen or _guarded("score", lambda: Scoring(*given).plan(reuse=resume))
        progress.say(
            f"{len(chosen.convert)} of {len(source.scan.sites)} sites become Gated DeltaNet, kept: {list(chosen.keep)}"
        )
        work = Conversion(source, chosen, job.ids, job.text, config, run, progress, job.device)
        for name in STAGES[: STAGES.index(until) + 1]:
            _guarded(name, getattr(work, name))
        _guarded("report", lambda: write_report(run, progress))
        if not run.ran:
            progress.say(f"{out}: every stage was complete already, nothing was to do")
    return out


def _guarded(name: str, stage: Callable[[], T]) -> T:
    """Out of memory becomes a typed error; everything else passes."""
    try:
        return stage()
    except TcalError:
        raise
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        raise out_of_memory_error(f"stage {name}", e) from e
