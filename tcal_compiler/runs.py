"""Working with a finished run folder: verify, distil, compare, generate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .api import STAGES, convert
from .config import load_config
from .distillation import student_weights
from .errors import ConfigError, DataError, RunFolderError
from .inputs import check_names
from .kernels.local_attention import as_exported
from .passes.capture import example_ids, program_shapes
from .passes.make_stateful import check_tokens, make_stateful
from .passes.site_program import tap_graph
from .passes.types import Capture, Check, Plan
from .progress import Parts, Progress
from .recorded import (
    DAMAGE,
    plan_of,
    reading,
    recorded_teacher,
    settings_before,
    teacher_info,
    training_checks,
)
from .report import can_plot
from .report.compare import compare_html, compare_json, compare_markdown
from .report.facts import Facts
from .run_models import student_program, teacher_of
from .runtime.durable import write_atomic
from .runtime.manifest import MANIFEST_NAME
from .runtime.onnx_export import CONFIG_FILE, OnnxArtifact, check_model
from .runtime.onnx_parity import check_parity
from .runtime.run_folder import RunFolder
from .runtime.session import OnnxSession, read_genai_config
from .runtime.statistics import attention_statistics
from .runtime.student import make_student
from .runtime.text_stream import TextStream
from .runtime.tokenizer import prompt_start
from .runtime.weights import load_weights
from .source import Source
from .variants import model_file, profile_of, require_variant, run_tokenizer, variant_checks

# Shares of verify after loading, the capture of the teacher being 1
TEACHER, STUDENT, RUNTIME = "teacher", "student", "ONNX Runtime against PyTorch"
VERIFY = {TEACHER: 0.15, STUDENT: 2.0, RUNTIME: 3.0}


def _check_page(page: Path) -> None:
    """Raises ConfigError for a page that might be written over something else."""
    check_names(None, **{"--html": page})
    place = page.resolve()
    if place.suffix.lower() not in (".html", ".htm"):
        raise ConfigError("--html", f"{page} does not end in .html", "--html both.html")
    if any((folder / MANIFEST_NAME).is_file() for folder in place.parents):
        raise ConfigError("--html", f"{page} lies in a run folder, whose files are its own", "--html both.html")
    if place.exists() and not place.is_file():
        raise ConfigError("--html", f"{page} is a folder or a special file", "--html both.html")


def compare_runs(first: str | Path, second: str | Path, *, page: Path | None = None, as_json: bool = False) -> str:
    """The reports of two run folders side by side as Markdown; with a path for page, as HTML into that file too.

    as_json: instead of the Markdown, what differs and the figures that runs are compared by.

    Raises RunFolderError for a folder without a plan, and ConfigError when the page cannot be made or written.
    """
    if page is not None:
        _check_page(page)
    both, paths = [], [Path(first).absolute(), Path(second).absolute()]
    for path in paths:
        with RunFolder.open_existing(path) as run:
            run.record("plan")
            both.append(Facts(path.name if paths[0].name != paths[1].name else str(path), run.manifest))
    if page is not None:
        if not can_plot():
            raise ConfigError("--html", "needs matplotlib, which is not installed", "pip install matplotlib")
        try:
            write_atomic(page.resolve(), _made(compare_html, both, paths).encode())
        except OSError as e:
            what = f"{page} cannot be written: {e.strerror or e}"
            raise ConfigError("--html", what, "a file in a folder that exists") from e
    return _made(compare_json if as_json else compare_markdown, both, paths)


def _made(make: Callable[[Facts, Facts], str], both: list[Facts], paths: list[Path]) -> str:
    """Raises RunFolderError for the manifest that is damaged."""
    try:
        return make(*both)
    except DAMAGE:
        for run, path in zip(both, paths, strict=True):
            with reading(path):
                make(run, run)
        raise


def verify_run(
    path: str | Path,
    *,
    teacher: str | None = None,
    tokenizer: str | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> list[Check]:
    """Repeats the checks of every stage on what lies in the run folder, and makes more; returns them all, failed ones
    included.

    Files that are not as the manifest says are reported, and then nothing is run.
    """
    progress = progress or Progress(quiet=True)
    with RunFolder.open_existing(path) as run:
        problems = run.verify_files()
        checks = [Check(f"file {name}: {what}", 1.0, 0.0) for name, what in problems.items()]
        checks.append(
            Check("files that are not as the manifest says", float(len(problems)), 0.0, "sha256 of every file")
        )
        for name in STAGES:
            run.record(name)
            old = bool(run.manifest.made_before(name))
            checks.append(Check(f"stage {name}: an earlier one was made anew since", float(old), 0.0))
        if any(not c.passed for c in checks):
            return checks
        named = tokenizer is not None
        source = teacher_of(run, teacher, tokenizer, allow_pickle, need_tokenizer=named, progress=progress)
        parts = Parts(progress, "verify", VERIFY, unit=source.capture_seconds)
        parts.begin(TEACHER)
        checks += source.capture.checks
        checks += _unconverted_checks(source)
        checks += _statistics_checks(source)
        parts.begin(STUDENT)
        context = _context(run)
        flat = student_program(run, program_shapes(context))
        checks += flat.checks
        checks += _weight_checks(run, source, flat)
        stateful = make_stateful(flat, max_length=context)
        checks += stateful.checks
        parts.begin(RUNTIME)
        artifact = OnnxArtifact(run.path / model_file(), profile_of(run), 0, stateful.layers, context)
        checks += check_model(artifact.path, artifact.profile)
        prompts = [example_ids(1, 12, flat.vocab_size, seed=s)[0].tolist() for s in range(3)]
        checks += check_parity(
            artifact, stateful, whole=lambda ids: flat.gm(*flat.inputs(ids)), prompts=prompts, new_tokens=64
        )
        checks += variant_checks(run)
    return checks


def distill_run(
    path: str | Path,
    *,
    steps: int | None = None,
    tokens: int | None = None,
    config_file: Path | None = None,
    teacher: str | None = None,
    tokenizer: str | None = None,
    allow_pickle: bool = False,
    device: str = "cpu",
    until: str = "export",
    progress: Progress | None = None,
) -> Path:
    """Distils the student of a run folder with the configuration that it was made with; returns the folder's path.

    steps or tokens: length of the distillation; config_file: TOML whose keys replace the run's. Stages whose
    configuration is as it was are not run again.

    Raises ConfigError when nothing says how long to distil.
    """
    with RunFolder.open_existing(path) as run:
        run.record("align")
        manifest = run.manifest
    settings, as_before = settings_before(Path(path))
    config = load_config(config_file, {"distill.steps": steps, "distill.tokens": tokens}, settings)
    if steps is None and not config.distill.steps and not config.distill.tokens:
        raise ConfigError("distill", "the run says no steps and no tokens", "tcal distill RUN --steps 200")
    return convert(
        teacher or recorded_teacher(Path(path), manifest),
        out=path,
        config=config,
        tokenizer=tokenizer or as_before,
        allow_pickle=allow_pickle,
        until=until,
        device=device,
        progress=progress,
    )


def _context(run: RunFolder) -> int:
    """Tokens of the context of the run's ONNX student. Raises RunFolderError when its configuration is missing."""
    file = (run.path / model_file()).with_name(CONFIG_FILE)
    known, _ = read_genai_config(file)
    if not known:
        raise RunFolderError(str(file), "is missing", "tcal export writes it")
    return int(known["context_length"])


def _example(source: Source, rows: int, tokens: int) -> Tensor:
    """Random ids [rows, tokens], or as many tokens as the teacher's context holds."""
    return example_ids(
        rows, min(tokens, source.teacher.info.get("context_length") or tokens), source.capture.vocab_size
    )


def _unconverted_checks(source: Source) -> list[Check]:
    sites = tuple(s.index for s in source.scan.sites)
    same = make_student(source.capture, source.scan, Plan(sites, (), "all"))
    args = source.capture.inputs(_example(source, 2, 33))
    with torch.no_grad():
        error = (same.gm(*args) - source.capture.gm(*args)).abs().max().item()
    return [Check("nothing converted: logits equal the teacher's", error, 0.0, "bit for bit")]


def _statistics_checks(source: Source) -> list[Check]:
    """Statistics of two texts are those of the parts, merged: on the first site, random tokens."""
    site, *others = source.scan.sites
    plan = Plan(tuple(s.index for s in others), (site.index,), "none")  # written-out cores have q, k and v there only
    taps = tap_graph(make_student(source.capture, source.scan, plan).gm, [site.q, site.k, site.v])
    with torch.no_grad():
        qkv = taps(*source.capture.inputs(_example(source, 4, 40)))
    whole, first, second = (
        attention_statistics(*(t[rows] for t in qkv), site=site)[0] for rows in (slice(4), slice(2), slice(2, 4))
    )
    merged = first.merge(second)
    error = max(((whole.sums[n] - merged.sums[n]).norm() / whole.sums[n].norm()).item() for n in whole.sums)
    return [Check("statistics of two parts, merged, equal the whole's", error, 1e-6, "relative")]


def _weight_checks(run: RunFolder, source: Source, deployed: Capture) -> list[Check]:
    """student.pt2 computes what its weights' file says, and training left nothing worse."""
    student = make_student(source.capture, source.scan, plan_of(run, source.scan))
    weights = student_weights(run)
    load_weights(student, weights)
    local = max((s.local for s in student.converted), default=0)
    ids = _example(source, 2, check_tokens(local, 33))
    with torch.no_grad(), as_exported():
        error = (student.logits(ids) - deployed.gm(*deployed.inputs(ids))).abs().max().item()
    checks = [Check(f"student.pt2 equals the graph with {weights.name}", error, 0.0, "bit for bit")]
    return checks + training_checks(run)


def generate_text(
    path: str | Path,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    dtype: str | None = None,
) -> Iterator[str]:
    """Streams the text that the ONNX student appends to the prompt, in pieces that are whole characters.

    dtype: which of the run's exports; None is the float32 student.
    """
    with RunFolder.open_existing(path) as run:
        run.require("export")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as e:
            raise DataError("prompt", f"is not UTF-8 at character {e.start}", "a terminal with a UTF-8 locale") from e
        if dtype is not None:
            require_variant(run, dtype)
        tokenizer = run_tokenizer(run)
        session = OnnxSession(run.path / model_file(dtype))
        ids = [*prompt_start(tokenizer), *tokenizer.encode(prompt)]  # as the rows of training begin
        longest = teacher_info(run).context_length
    sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    try:
        stream = session.generate(ids, max_new_tokens, eos=tokenizer.eos_token_id, **sampling)
    except DataError as e:
        room = session.context_length
        if e.where != "context" or room is None or (longest is not None and longest <= room):
            raise
        more = f"export.max_length above {room} in --config FILE for tcal export"
        raise DataError(e.where, e.what, f"{e.hint}, or {more}") from e
    text = TextStream(tokenizer, ids)
    for token in stream:
        if piece := text.push(token):
            yield piece
    if rest := text.end():
        yield rest
