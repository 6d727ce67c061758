"""The models of a run folder: its teacher, its student in the newest form, and copies from earlier stages."""

from __future__ import annotations

from pathlib import Path

import torch

from .errors import RunFolderError
from .passes.capture import capture_program
from .passes.types import Capture, Plan
from .progress import Progress
from .recorded import local_window_of, recorded_teacher
from .runtime.initialize import naive_
from .runtime.mixer import GdnMixer
from .runtime.program_file import load_program
from .runtime.run_folder import RunFolder
from .runtime.student import Student, make_student
from .runtime.weights import load_weights
from .source import Source, open_source


def student_program(run: RunFolder) -> Capture:
    """The deployed student as a flat graph."""
    run.require("export")
    program, _ = load_program(run.path / "student.pt2", allow_pickle=False)
    return capture_program(program, teacher=program.module(), implementation="student", shapes=((1, 8),))


def last_weights(run: RunFolder) -> str:
    """The last stage that made the student as it now is: export, or distill or align where that was not exported."""
    stages = run.manifest.stages
    if "export" in stages and not run.manifest.made_before("export"):
        return "export"
    return "distill" if "distill" in stages else "align"


def teacher_of(
    run: RunFolder,
    override: str | None,
    tokenizer: str | None,
    allow_pickle: bool,
    *,
    need_tokenizer: bool,
    progress: Progress,
) -> Source:
    """The run's teacher."""
    spec = override or recorded_teacher(run.path, run.manifest)
    source = open_source(
        spec, tokenizer=tokenizer, allow_pickle=allow_pickle, need_tokenizer=need_tokenizer, progress=progress
    )
    if source.capture.fingerprint != run.manifest.teacher.fingerprint:
        raise RunFolderError(
            str(run.path),
            f"was made from another teacher than {spec}: weights sha256 "
            f"{run.manifest.teacher.fingerprint[:16]}, found {source.capture.fingerprint[:16]}",
            "--teacher with the one it was made from",
        )
    return source.with_local_window(local_window_of(run))


def naive_student(source: Source, plan: Plan) -> Student:
    """A student whose converted sites are fresh Gated DeltaNet layers around the teacher's projections."""
    student = make_student(source.capture, source.scan, plan)
    generator = torch.Generator().manual_seed(0)
    for m in student.gm.modules():
        if isinstance(m, GdnMixer):
            naive_(m, generator)
    return student


def student_with(source: Source, plan: Plan, weights: Path) -> Student:
    """The student with the weights in a file."""
    student = make_student(source.capture, source.scan, plan)
    load_weights(student, weights)
    return student
