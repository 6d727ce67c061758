"""The stages of a conversion, each on what the stages before it left in the run folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .config import Config
from .distillation import distill_stage, student_weights
from .errors import ParityError
from .passes.capture import capture_program, program_shapes
from .passes.choose import plan_to_toml
from .passes.graph import move_to
from .passes.make_stateful import make_stateful
from .passes.types import Check, Plan
from .progress import Parts, Progress
from .resume import resuming
from .runtime.align import align, levelled_off
from .runtime.calibrate import half_lives, initialise
from .runtime.distill_checks import check_short, check_train
from .runtime.held_out import score_held_out
from .runtime.memory import give_back
from .runtime.onnx_export import context_length, export_onnx
from .runtime.onnx_parity import check_parity
from .runtime.program_file import save_program
from .runtime.run_folder import RunFolder
from .runtime.session import OnnxSession
from .runtime.sources import CalibrationText
from .runtime.speed import measure_speed
from .runtime.student import Student, make_student
from .runtime.taps import LivePairs, SiteGroup, collect_taps
from .runtime.weights import changed_names, load_weights, save_weights
from .source import Source

PROGRAM, STATE, ONNX, PARITY, SPEED = (
    "the student as a program",
    "state in and out, checked in float64",
    "ONNX",
    "ONNX Runtime against PyTorch",
    "speed of the ONNX student",
)
# Shares of export, the capture of the teacher being 1: between those of the embedded teacher and of SmolLM2-135M
EXPORT = {PROGRAM: 1.7, STATE: 0.7, ONNX: 5.2, PARITY: 1.2, SPEED: 0.6}
SPEED_CONTEXTS = (128, 1024, 4096)  # tokens, where the export has room for them


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
        check_short(config.distill, config.calib.length)
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
        chosen: dict[str, Any] = {
            "keep": list(self.chosen.keep),
            "convert": list(self.chosen.convert),
            "policy": self.chosen.policy,
        }
        if self.config.local_window:  # left out where there is none, so that older folders stay valid
            chosen["local_window"] = self.config.local_window
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
        settings = (
            self.config.initial_values()
            | {
                "sequences": calib.sequences,
                "length": calib.length,
            }
            | ({} if calib.init_sequences is None else {"init_sequences": calib.init_sequences})
        )
        tokens = hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()  # of another tokenizer: another calibration
        inputs = {"plan": self.run.stage_hash("plan"), "text": self.text.identity(), "tokens": tokens}
        with self.run.stage("calibrate", config=settings, inputs=inputs) as stage:
            if stage.done:
                return
            train = [replace(g, x=g.x[:, : calib.kept], y=g.y[:, : calib.kept]) for g in self.groups]
            bar = self.progress.bar(f"statistics and {self.config.init} init of each site")
            _, reports = initialise(
                self.student,
                train,
                init=self.config.init,
                without=self.config.init_without,
                seed=self.config.seed,
                batch=calib.batch,
                progress=bar,
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
            "align": self.config.align.settings(),
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
                every = self.config.calib.init_sequences is None
                with resuming(stage, self.progress, self.config.align.steps) as (resume, save):
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
                if (stopped := levelled_off(curve, self.config.align)) is not None:
                    stage.evidence |= {"stopped_at": stopped, "steps": self.config.align.steps}
                    self.progress.say(f"alignment levelled off: stopped at step {stopped}")
                stage.evidence["half_life"] = half_lives(self.student, self.groups, batch=self.config.calib.batch)
            save_weights(self.student, stage.dir / "weights.safetensors")
            (stage.dir / "alignment.json").write_text(json.dumps(curve, indent=1) + "\n", encoding="utf-8")
            stage.evidence |= {"curve": curve, "checks": [asdict(c) for c in _not_worse(curve)]}

    def distill(self) -> None:
        self.__dict__.pop("groups", None)  # what alignment trained on; cycles hold it too
        give_back()
        distill_stage(self)
        give_back()

    def export(self) -> None:
        settings = {"export": self.config.export.model_dump()}
        with self.run.stage("export", config=settings, inputs={"distill": self.run.stage_hash("distill")}) as stage:
            if stage.done:
                return
            load_weights(self.student, student_weights(self.run))
            bar, batch = self.progress.bar("held-out text"), 1 if self.device.type == "cpu" else self.config.calib.batch
            held = score_held_out(
                self.student.gm, self.source.capture, self.ids[self.train :], batch=batch, progress=bar
            )
            move_to(self.source.capture.gm, torch.device("cpu"))
            move_to(self.student.gm, torch.device("cpu"))
            timed = self.config.export.profile != "cuda"  # whose operators are slow stand-ins here
            shares = {n: share for n, share in EXPORT.items() if timed or n != SPEED}
            parts = Parts(self.progress, "export", shares, unit=self.source.capture_seconds)
            parts.begin(PROGRAM)
            program = self.student.export()
            save_program(program, stage.dir / "student.pt2")
            run = program.module()
            context = context_length(self.config.export, self.source.teacher.info)
            shapes = program_shapes(context)
            flat = capture_program(program, teacher=run, implementation="student", shapes=shapes)
            parts.begin(STATE)
            bounded = self.config.export.bounded_windows
            stateful = make_stateful(flat, max_length=context, bounded=bounded)
            info, prompt = self.source.teacher.info, self.ids[-1, :16].tolist()
            checks = (*flat.checks, *stateful.checks)
            for count in self.config.export.float32_layer_counts(stateful.depth):
                parts.begin(ONNX)
                chosen = self.config.export.model_copy(update={"float32_layers": count})
                artifact = export_onnx(
                    stateful, stage.dir / "onnx", config=chosen, info=info, tokenizer=self.source.tokenizer
                )
                parts.begin(PARITY)
                parity = check_parity(
                    artifact, stateful, whole=lambda ids: run(*flat.inputs(ids)), prompts=[prompt], new_tokens=16
                )
                if all(c.passed for c in parity):
                    break
            checks += (*artifact.checks, *parity)
            hint = "tcal doctor, which checks this machine; --restart runs every stage anew"
            require("export", checks, hint if timed else "--profile ort, or more [export] float32_layers")
            stage.evidence = {
                "checks": [asdict(c) for c in checks],
                "opset": artifact.opset,
                "profile": artifact.profile,
                "float32_layers": count,
                "held_out": asdict(held),
            }
            if timed:
                parts.begin(SPEED)
                rows = measure_speed(OnnxSession(artifact.folder), SPEED_CONTEXTS)
                stage.evidence["speed"] = {"cpus": os.cpu_count(), "rows": [asdict(r) for r in rows]}


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
