"""The models of a run folder: its teacher, its student in the newest form, and copies from earlier stages."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from .distillation import ALIGNED, DISTILLED, student_weights
from .errors import RunFolderError
from .passes.capture import capture_program
from .passes.find_attention import find_attention
from .passes.local_windows import with_local_windows
from .passes.types import Capture, Plan, SiteScan
from .progress import Progress
from .recorded import check_sizes, local_window_of, plan_of, recorded_sites, recorded_teacher
from .runtime.initialize import naive_
from .runtime.live import capture_live, difference
from .runtime.mixer import GdnMixer
from .runtime.program_file import load_program
from .runtime.run_folder import RunFolder
from .runtime.student import Student, make_student
from .runtime.weights import load_weights
from .source import Source, open_source

TEACHER_HINT = "--teacher with the one it was made from"
_SPELLING = ("module", "causal")  # facts of a site that a module and an exported program of it may spell differently


def student_program(run: RunFolder, shapes: Sequence[tuple[int, int]] = ((1, 8),)) -> Capture:
    """The deployed student as a flat graph, compared with its program at these (batch, length)."""
    run.require("export")
    program, _ = load_program(run.path / "student.pt2", allow_pickle=False)
    return capture_program(program, teacher=program.module(), implementation="student", shapes=shapes)


def last_weights(run: RunFolder) -> str:
    """The last stage that made the student as it now is: export, or distill or align where that was not exported."""
    stages = run.manifest.stages
    if "export" in stages and not run.manifest.made_before("export"):
        return "export"
    return "distill" if "distill" in stages else "align"


def newest_weights(run: RunFolder) -> Path:
    """The file of the student's weights as it now is: distilled ones where a stage made some, else aligned ones."""
    return run.path / ALIGNED if last_weights(run) == "align" else student_weights(run)


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
    check_sizes(run.path, spec, TEACHER_HINT)
    source = open_source(
        spec, tokenizer=tokenizer, allow_pickle=allow_pickle, need_tokenizer=need_tokenizer, progress=progress
    )
    if source.capture.fingerprint != run.manifest.teacher.fingerprint:
        raise RunFolderError(
            str(run.path),
            f"was made from another teacher than {spec}: weights sha256 "
            f"{run.manifest.teacher.fingerprint[:16]}, found {source.capture.fingerprint[:16]}",
            TEACHER_HINT,
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


def student_of_run(module: nn.Module, path: str | os.PathLike[str]) -> Student:
    """The newest student of a run folder on the module's captured graph, in float32 on the CPU.

    Raises:
        UnsupportedModelError: the module cannot be exported.
        RunFolderError: no run folder, not aligned yet, damaged, or of another teacher; the difference is named.
    """
    with RunFolder.open_existing(Path(path)) as run:
        for stage in ("calibrate", "align"):
            run.require(stage)
        weights = newest_weights(run)
        if weights.name == DISTILLED:
            run.require("distill")
        window, sites = local_window_of(run), recorded_sites(run)
        capture = capture_live(module)
        if capture.fingerprint != run.manifest.teacher.fingerprint:
            raise RunFolderError(
                str(run.path),
                f"was made from another model than the compiled one: {difference(capture, run.path)}",
                f"the model it was made from: {run.manifest.teacher.source}",
            )
        scan = with_local_windows(find_attention(capture), window)
        _check_sites(scan, sites, run.path)
        student = make_student(capture, scan, plan_of(run, scan))
        load_weights(student, weights)
    return student


def _check_sites(scan: SiteScan, recorded: list[dict[str, object]], run: Path) -> None:
    """The weights are the same; so are the attention cores, unless another implementation of attention is chosen."""
    found = {s.index: s.summary() for s in scan.sites}
    for old in recorded:
        new = found.get(old["layer"])  # type: ignore[call-overload]
        if new is None:
            reasons = "; ".join(f"{r.layer or r.node}: {r.reason}" for r in scan.rejected[:2])
            what = f"attention {old['layer']} ({old['module']}) can be converted in the run folder's teacher, not here"
            hint = 'the model that it was made from; for transformers, attn_implementation="sdpa"'
            raise RunFolderError(str(run), f"{what}: {reasons or 'not found'}", hint)
        for key in sorted((set(old) & set(new)) - set(_SPELLING)):
            if old[key] != new[key]:
                what = f"attention {old['layer']}: {key} is {old[key]} in the run folder's teacher, here {new[key]}"
                raise RunFolderError(str(run), what, "the model that it was made from")
