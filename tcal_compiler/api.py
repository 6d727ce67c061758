"""The conversion from teacher to deployed student: the only file that knows the order of the stages."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .config import DEFAULT_POLICY, Config
from .distillation import distill_stage, student_weights
from .errors import ConfigError, ParityError, TcalError, UnsupportedModelError
from .inputs import check_names
from .passes.capture import capture_program, require_causal
from .passes.choose import budget_of, choose, plan_from_toml, plan_to_toml, scored_by
from .passes.find_attention import find_attention
from .passes.graph import move_to
from .passes.make_stateful import make_stateful
from .passes.types import Capture, Check, Plan, SiteScan
from .progress import Progress
from .recorded import reading
from .report import PLOTS_HINT, can_plot, render_report
from .resume import resume_stage
from .runtime.align import align
from .runtime.calibrate import half_lives, initialise
from .runtime.capture_teacher import capture_teacher
from .runtime.distill import check_train
from .runtime.manifest import TeacherRecord, package_version
from .runtime.onnx_export import check_supported, context_length, export_onnx
from .runtime.onnx_parity import check_parity
from .runtime.program_file import save_program
from .runtime.run_files import check_output
from .runtime.run_folder import RunFolder
from .runtime.sources import CalibrationText
from .runtime.student import Student, make_student
from .runtime.taps import LivePairs, SiteGroup, collect_taps
from .runtime.teacher import Teacher, load_teacher, load_tokenizer
from .runtime.tokenizer import TokenizerLike
from .runtime.weights import changed_names, load_weights, save_weights
from .scoring import scored_plan

STAGES = ("plan", "calibrate", "align", "distill", "export")
T = TypeVar("T")
ASSETS = Path(__file__).parent / "assets"
CALIBRATION_TEXT = ASSETS / "text" / "calibration.txt"


@dataclass(frozen=True)
class Source:
    """A loaded and captured teacher with its tokenizer."""

    teacher: Teacher
    tokenizer: TokenizerLike | None
    capture: Capture
    scan: SiteScan


def open_source(
    spec: str, *, tokenizer: str | None = None, allow_pickle: bool = False, need_tokenizer: bool = True
) -> Source:
    """Loads, captures and scans a teacher. Raises TcalError for whatever is wrong with it."""
    teacher = load_teacher(spec, tokenizer=tokenizer, allow_pickle=allow_pickle)
    found = load_tokenizer(teacher) if need_tokenizer else None
    capture = capture_teacher(teacher)
    return Source(teacher, found, capture, find_attention(capture))


def check_device(name: str) -> torch.device:
    """Raises ConfigError for a device that is unknown or not here."""
    count = torch.cuda.device_count()
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError("--device", f"unknown device {name!r}", "cpu or cuda")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(
            "--device", f"{name} is not here: {count} CUDA devices are seen", "cpu; tcal doctor says more"
        )
    return device


def check_length(length: int, source: Source, where: str) -> None:
    """Raises ConfigError when sequences are longer than the teacher's context, where that is known."""
    context = source.teacher.info.get("context_length")
    if context is not None and length > context:
        option = {"calib.length": f"--calib-length {context}"}.get(where, f"{where} {context}")
        raise ConfigError(where, f"is {length} tokens, but the teacher's context holds {context}", option)


def choose_plan(scan: SiteScan, config: Config, out: Path, plan_file: Path | None) -> Plan | None:
    """The plan of an explicit file, of the run's edited plan.toml, or of the policy, in this order.

    The run's own plan.toml counts unless another policy than the one it was made from is asked for. None when the
    policy is a good one that needs the sites measured first.
    """
    if not scan.sites:
        reasons = "; ".join(f"{r.layer or r.node}: {r.reason}" for r in scan.rejected[:4])
        what = f"no attention core can be converted ({reasons or 'the model has no softmax attention'})"
        raise UnsupportedModelError("teacher", what, "tcal inspect TEACHER shows every core with its reason")
    own = out / "plan.toml"
    if plan_file is not None:
        return plan_from_toml(plan_file, scan)
    if own.is_file() and (out / "tcal.json").is_file():
        plan = plan_from_toml(own, scan)
        if config.policy in (None, plan.policy):
            return plan
    policy = DEFAULT_POLICY if config.policy is None else config.policy
    if scored_by(policy) is None:
        return choose(scan, policy)
    budget_of(scan, policy)
    return None


class Conversion:
    """One run folder being worked on; each method is a stage that is skipped when it is done."""

    def __init__(
        self,
        source: Source,
        plan: Plan,
        ids: Tensor,
        text: CalibrationText,
        config: Config,
        run: RunFolder,
        progress: Progress,
        device: torch.device,
    ) -> None:
        check_train(config.distill, plan)
        self.source, self.chosen, self.ids, self.text = source, plan, ids, text
        self.config, self.run, self.progress = config, run, progress
        self.device = device
        self.train = config.calib.sequences

    @cached_property
    def student(self) -> Student:
        """The student in memory, as far as the stages have come."""
        move_to(self.source.capture.gm, self.device)
        student = make_student(self.source.capture, self.source.scan, self.chosen)
        move_to(student.gm, self.device)
        return student

    @cached_property
    def groups(self) -> list[SiteGroup]:
        if not self.chosen.convert:
            return []
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return collect_taps(
            self.student,
            self.source.capture.gm,
            torch.cat([self.ids[: self.config.calib.kept], self.ids[self.train :]]),
            batch=self.config.calib.batch,
            dtype=dtype,
            spill=self.run.path,
            progress=self.progress.bar("teacher over the calibration text"),
        )

    def plan(self) -> None:
        chosen = {"keep": list(self.chosen.keep), "convert": list(self.chosen.convert), "policy": self.chosen.policy}
        inputs = {
            "teacher": self.source.capture.fingerprint,
            "tokenizer": self.source.teacher.info.get("tokenizer"),
        }
        with self.run.stage("plan", config=chosen, inputs=inputs) as stage:
            if stage.done:
                return
            (stage.dir / "plan.toml").write_text(plan_to_toml(self.chosen, self.source.scan), encoding="utf-8")
            stage.plan = chosen
            stage.evidence = {
                "sites": [s.summary() for s in self.source.scan.sites],
                "refused": [asdict(r) for r in self.source.scan.rejected],
                "checks": [asdict(c) for c in self.source.capture.checks],
                "info": self.source.teacher.info,
                "tokenizer_dir": str(folder) if (folder := self.source.teacher.tokenizer_dir) else None,
                "scores": self.chosen.scores,
            }

    def calibrate(self) -> None:
        calib = self.config.calib
        settings = {
            "init": self.config.init,
            "seed": self.config.seed,
            "sequences": calib.sequences,
            "length": calib.length,
        } | ({} if calib.init_sequences is None else {"init_sequences": calib.init_sequences})
        tokens = hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()  # of another tokenizer: another calibration
        inputs = {"plan": self.run.stage_hash("plan"), "text": self.text.identity(), "tokens": tokens}
        with self.run.stage("calibrate", config=settings, inputs=inputs) as stage:
            if stage.done:
                return
            train = [replace(g, x=g.x[:, : calib.kept], y=g.y[:, : calib.kept]) for g in self.groups]
            bar = self.progress.bar(f"statistics and {self.config.init} init of each site")
            _, reports = initialise(
                self.student, train, init=self.config.init, seed=self.config.seed, batch=calib.batch, progress=bar
            )
            save_weights(self.student, stage.dir / "initial.safetensors", only=changed_names(self.student))
            stage.evidence = {
                "sites": [asdict(r) for r in reports],
                "text": self.text.sha256(),
                "hashes": self.text.hashes(),
                "tokens": calib.kept * calib.length,
                "device": str(self.device),
            }

    def align(self) -> None:
        settings = {
            "align": self.config.align.model_dump(),
            "seed": self.config.seed,
            "holdout": self.config.calib.holdout,
        }
        with self.run.stage("align", config=settings, inputs={"calibrate": self.run.stage_hash("calibrate")}) as stage:
            if stage.done:
                return
            load_weights(self.student, self.run.path / "initial.safetensors")
            curve: list[dict[str, object]] = []
            stage.evidence = {"device": str(self.device)}
            if self.config.align.steps and self.chosen.convert:
                resume, save = resume_stage(stage, self.progress)
                every = self.config.calib.init_sequences is None
                _, curve = align(
                    self.student,
                    self.groups,
                    train=self.config.calib.kept,
                    live=None if every else LivePairs(self.student, self.groups, self.ids[: self.train]),
                    config=self.config.align,
                    seed=self.config.seed,
                    resume=resume,
                    save=save,
                    progress=self.progress.bar(f"alignment of {len(self.chosen.convert)} sites"),
                )
                stage.evidence["half_life"] = half_lives(self.student, self.groups, batch=self.config.calib.batch)
            save_weights(self.student, stage.dir / "weights.safetensors")
            (stage.dir / "alignment.json").write_text(json.dumps(curve, indent=1) + "\n", encoding="utf-8")
            stage.evidence |= {"curve": curve, "checks": [asdict(c) for c in _not_worse(curve)]}

    def distill(self) -> None:
        self.__dict__.pop("groups", None)  # what alignment trained on: gives its memory back
        distill_stage(self)

    def export(self) -> None:
        settings = {"export": self.config.export.model_dump()}
        with self.run.stage("export", config=settings, inputs={"distill": self.run.stage_hash("distill")}) as stage:
            if stage.done:
                return
            move_to(self.source.capture.gm, torch.device("cpu"))
            move_to(self.student.gm, torch.device("cpu"))
            load_weights(self.student, student_weights(self.run))
            self.progress.say("export: the student as a program")
            program = self.student.export()
            save_program(program, stage.dir / "student.pt2")
            run = program.module()
            flat = capture_program(program, teacher=run, implementation="student", shapes=((2, 24), (1, 1)))
            self.progress.say("export: state in and out, checked in float64")
            context = context_length(self.config.export, self.source.teacher.info)
            bounded = self.config.export.bounded_windows
            stateful = make_stateful(flat, max_length=context, bounded=bounded)
            self.progress.say("export: ONNX")
            artifact = export_onnx(
                stateful,
                stage.dir / "onnx",
                config=self.config.export,
                info=self.source.teacher.info,
                tokenizer=self.source.tokenizer,
            )
            self.progress.say("export: ONNX Runtime against PyTorch")
            prompt = self.ids[-1, :16].tolist()
            checks = (*flat.checks, *stateful.checks, *artifact.checks)
            checks += check_parity(
                artifact, stateful, whole=lambda ids: run(*flat.inputs(ids)), prompts=[prompt], new_tokens=16
            )
            require("export", checks, "tcal doctor, which checks this machine; --restart runs every stage anew")
            stage.evidence = {
                "checks": [asdict(c) for c in checks],
                "opset": artifact.opset,
                "profile": artifact.profile,
            }


def require(where: str, checks: Sequence[Check], hint: str) -> None:
    """Raises ParityError for the first check that does not hold."""
    if bad := [c for c in checks if not c.passed]:
        first = f"{bad[0].name}: {bad[0].measured:.3g}, allowed {bad[0].allowed:.3g}"
        detail = f" ({bad[0].detail})" if bad[0].detail else ""
        raise ParityError(where, f"{len(bad)} of {len(checks)} checks fail; first: {first}{detail}", hint)


def _not_worse(curve: list[dict[str, Any]]) -> list[Check]:
    """No site ends worse than it began, on the held-out slice."""
    if not curve:
        return []
    first = curve[0]["held_out"]
    best = {i: min(p["held_out"][i] for p in curve) for i in first}
    return [Check(f"layer {i}: held-out error against its start", best[i], first[i]) for i in first]


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
    if until not in STAGES:
        raise ConfigError("until", f"unknown stage {until!r}", f"stages are {', '.join(STAGES)}")
    check_names(config.calib.text, teacher=teacher, tokenizer=tokenizer, out=out)
    place, text = check_device(device), CalibrationText.of(config.calib.text, default=CALIBRATION_TEXT)
    if until == "export":
        check_supported(config.export)
    check_output(out)
    progress.say(f"loading {teacher}")
    source = open_source(teacher, tokenizer=tokenizer, allow_pickle=allow_pickle)
    assert source.tokenizer is not None
    record = TeacherRecord(source=source.teacher.source, fingerprint=source.capture.fingerprint)
    check_output(out, record)
    check_length(config.calib.length, source, "calib.length")
    ids = text.sequences(source.tokenizer, count=config.calib.rows, length=config.calib.length)
    chosen = choose_plan(source.scan, config, out, plan)
    require_causal(source.capture)
    with RunFolder.create_or_open(
        out,
        teacher_fingerprint=record.fingerprint,
        teacher_source=record.source,
        teacher_kind=source.teacher.kind,
        vocab_size=source.capture.vocab_size,
        config_json=config.model_dump(mode="json"),
        resume=resume,
    ) as run:
        run.on_again = lambda stage, why: progress.say(f"stage {stage} runs again: {why}")
        score = lambda: scored_plan(run, source, ids, config, place, progress, reuse=resume)  # noqa: E731
        chosen = chosen or _guarded("score", score)
        progress.say(
            f"{len(chosen.convert)} of {len(source.scan.sites)} sites become Gated DeltaNet, kept: {list(chosen.keep)}"
        )
        work = Conversion(source, chosen, ids, text, config, run, progress, place)
        for name in STAGES[: STAGES.index(until) + 1]:
            _guarded(name, getattr(work, name))
        write_report(run, progress)
    return out


_NO_MEMORY = ("not enough memory", "allocate memory")  # PyTorch on the CPU raises a plain RuntimeError


def _guarded(name: str, stage: Callable[[], T]) -> T:
    """Out of memory becomes a typed error; everything else passes."""
    from .errors import StageError

    try:
        return stage()
    except (torch.OutOfMemoryError, MemoryError) as e:
        raise StageError(
            f"stage {name}", f"out of memory: {str(e).splitlines()[0]}", "fewer --calib-sequences, or --batch"
        ) from e
    except RuntimeError as e:
        if isinstance(e, TcalError) or not any(words in str(e) for words in _NO_MEMORY):
            raise
        raise StageError(f"stage {name}", f"out of memory: {str(e).splitlines()[0]}", "fewer --calib-sequences") from e
