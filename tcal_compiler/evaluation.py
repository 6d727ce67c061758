"""tcal eval: the models of a run folder on text, on retrieval from a long context, and on zero-shot tasks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from .api import write_report
from .distillation import ALIGNED, DISTILLED
from .errors import ConfigError, StageError
from .passes.graph import move_to
from .passes.types import Capture
from .progress import Parts, Progress
from .recorded import calibrated_texts, calibration_length, plan_of, settings_before
from .run_models import last_weights, naive_student, newest_weights, student_program, student_with, teacher_of
from .runtime import data
from .runtime.evaluate import EvalResult, Logits, evaluate
from .runtime.retrieval import NUM_EXAMPLES, check_sizes, retrieval_tasks
from .runtime.run_folder import RunFolder
from .runtime.student import without_linear
from .runtime.tasks import BATCH_TOKENS, Task, TaskScore, score_tasks
from .runtime.tokenizer import TokenizerLike, prompt_start
from .runtime.zero_shot import check_tasks, task_file, with_average, zero_shot_tasks
from .source import Source, check_device, check_length
from .variants import run_tokenizer

WITHOUT_LINEAR = "no linear"

# Parts of what comes before the scores, with their shares, the capture of the teacher being 1
TEXTS, MODELS = "text and tasks", "models"
PREPARING = {TEXTS: 0.3, MODELS: 1.0}


@dataclass(frozen=True)
class Measures:
    """What to score.

    text: its perplexity, in at most `sequences` sequences of `length` tokens (default: the calibration's), and the
    filler of retrieval. needle, recall: lengths of retrieval examples in tokens. tasks: names of zero-shot tasks, whose
    files lie in task_files. limit: examples of a task at most; None is all, of retrieval NUM_EXAMPLES.
    """

    text: str | None = None
    length: int | None = None
    sequences: int = 32
    needle: Sequence[int] = ()
    recall: Sequence[int] = ()
    tasks: Sequence[str] = ()
    task_files: str | Path | None = None
    limit: int | None = None
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError for measures that are out of range, contradictory or none; DataError for no task file."""
        if self.sequences < 1 or (self.length is not None and self.length < 2):
            what = f"{self.sequences} sequences of {self.length} tokens"
            raise ConfigError("eval", what, "at least 1 sequence of 2 tokens")
        check_tasks(self.tasks)
        if self.limit is not None and self.limit < 1:
            raise ConfigError("--limit", f"is {self.limit}", "at least 1 example")
        for kind, lengths in (("needle", self.needle), ("recall", self.recall)):
            check_sizes(kind, lengths, self.limit or NUM_EXAMPLES)
        if bool(self.tasks) != (self.task_files is not None):
            what = "--tasks and --task-files go together, one of them is missing"
            raise ConfigError("eval", what, "--tasks arc_easy,piqa --task-files FOLDER")
        for name in self.tasks:
            task_file(Path(str(self.task_files)), name)
        if (self.needle or self.recall) and self.text is None:
            raise ConfigError("eval", "--needle and --recall need a text to hide facts in", "--text FILE")
        if self.text is None and not self.tasks:
            what = "neither --text nor --tasks is given"
            raise ConfigError("eval", what, "--text FILE, or --tasks arc_easy --task-files FOLDER")


@dataclass(frozen=True)
class Evaluation:
    """text: results by model, of `sequences` of `length` tokens of Measures.text. tasks: scores of every task and
    metric, by model. What both took.
    """

    text: dict[str, EvalResult] = field(default_factory=dict)
    tasks: dict[str, list[TaskScore]] = field(default_factory=dict)
    text_seconds: float = 0.0
    task_seconds: float = 0.0
    sequences: int = 0
    length: int = 0


def evaluate_run(
    path: str | Path,
    measures: Measures,
    *,
    teacher: str | None = None,
    tokenizer: str | None = None,
    baselines: bool = True,
    ablation: bool = False,
    allow_pickle: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Evaluation:
    """Scores of teacher, student and (baselines) naive, initialised and, of a distilled one, aligned copies.

    ablation: also the student with its converted layers giving 0 (WITHOUT_LINEAR). The student is the exported program
    where that is of the present weights, else their graph. The result is recorded in the run folder.

    Raises:
        ConfigError: see Measures.check; a length beyond the teacher's context; a device that is not here.
        DataError: a text or task that was calibrated on, is too short, damaged or missing.
        StageError: a model fails on the sequences.
    """
    progress = progress or Progress(quiet=True)
    measures.check()
    place = check_device(device)
    with RunFolder.open_existing(path, write=True) as run:
        if measures.text is not None:
            data.check_not_calibrated(measures.text, *calibrated_texts(run))
        last = last_weights(run)
        if tokenizer is None and last != "export":  # no exported model that has one
            tokenizer = settings_before(run.path)[1]
        named = tokenizer is not None or last != "export"
        source = teacher_of(run, teacher, tokenizer, allow_pickle, need_tokenizer=named, progress=progress)
        words = source.tokenizer or run_tokenizer(run)
        for option, lengths in (("--needle", measures.needle), ("--recall", measures.recall)):
            check_length(max(lengths, default=0), source, option)
        parts = Parts(progress, "evaluation", PREPARING, unit=source.capture_seconds)
        parts.begin(TEXTS)
        ids = _sequences(run, source, words, measures) if measures.text is not None else None
        tasks = _tasks(run, words, measures)
        parts.begin(MODELS)
        models = _models(run, source, last, place, baselines=baselines, ablation=ablation)
        try:
            found = _scores(models, ids, tasks, source, place, progress)
        except (IndexError, RuntimeError) as e:  # positions end, or no memory left
            longest = max([*measures.needle, *measures.recall, *([] if ids is None else [ids.shape[1]])], default=0)
            what = f"a model fails on sequences of {longest} tokens: {str(e).splitlines()[0]}"
            raise StageError("eval", what, "a smaller --length") from e
        if ids is not None:
            found = replace(found, sequences=len(ids), length=ids.shape[1])
            _record_text(run, last, Path(str(measures.text)), ids, found)
        if tasks:
            _record_tasks(run, last, measures, found)
        write_report(run, progress)
    return found


def _sequences(run: RunFolder, source: Source, words: TokenizerLike, measures: Measures) -> Tensor:
    """The text as ids [N, T]."""
    text = str(measures.text)
    check_length(length := measures.length or calibration_length(run), source, "--length")
    tokens = data.encode_documents(data.read_text(text), words, words.eos_token_id)
    start = prompt_start(words)
    count = max(1, min(measures.sequences, data.count_rows(tokens, length=length, start=start)))
    return data.pack(tokens, sequences=count, length=length, what=text, start=start)


def _tasks(run: RunFolder, words: TokenizerLike, measures: Measures) -> list[Task]:
    tasks = []
    for kind, lengths in (("needle", measures.needle), ("recall", measures.recall)):
        if lengths:
            docs, count = data.read_text(str(measures.text)), measures.limit or NUM_EXAMPLES
            tasks += retrieval_tasks(docs, words, kind=kind, lengths=lengths, examples=count, seed=measures.seed)
    if measures.tasks:
        tasks += zero_shot_tasks(
            measures.tasks,
            Path(str(measures.task_files)),
            words,
            limit=measures.limit,
            calibrated=calibrated_texts(run),
        )
    return tasks


def _models(
    run: RunFolder, source: Source, last: str, device: torch.device, *, baselines: bool, ablation: bool
) -> dict[str, Logits]:
    """ids -> logits of every model, on the device; the teacher first and the student last."""
    plan = plan_of(run, source.scan)
    weights = newest_weights(run)
    found: dict[str, tuple[GraphModule, Capture]] = {"teacher": (source.capture.gm, source.capture)}
    if baselines and plan.convert:
        run.require("calibrate")
        found["naive"] = naive_student(source, plan).gm, source.capture
        found["initialised"] = student_with(source, plan, run.path / "initial.safetensors").gm, source.capture
        if last != "align" and weights.name == DISTILLED:
            run.require("align")
            found["aligned"] = student_with(source, plan, run.path / ALIGNED).gm, source.capture
    if ablation or last != "export":
        run.require(last if last != "export" else "distill" if weights.name == DISTILLED else "align")
        student = student_with(source, plan, weights)
        if ablation:
            found[WITHOUT_LINEAR] = without_linear(student).gm, source.capture
        found["student"] = student.gm, source.capture
    if last == "export":
        flat = student_program(run)
        found["student"] = flat.gm, flat
    return {name: _logits(move_to(gm, device), capture) for name, (gm, capture) in found.items()}


def _logits(gm: GraphModule, capture: Capture) -> Logits:
    return lambda ids: gm(*capture.inputs(ids))


def _scores(
    models: dict[str, Logits],
    ids: Tensor | None,
    tasks: list[Task],
    source: Source,
    device: torch.device,
    progress: Progress,
) -> Evaluation:
    text: dict[str, EvalResult] = {}
    began = time.monotonic()
    if ids is not None:
        others = {n: m for n, m in models.items() if n != "teacher"}
        batch = 1 if device.type == "cpu" else max(1, BATCH_TOKENS[device.type] // ids.shape[1])
        bar = progress.bar("evaluation")
        text = evaluate(ids.to(device), teacher=models["teacher"], students=others, batch=batch, progress=bar)
    took = time.monotonic() - began
    if not tasks:
        return Evaluation(text, text_seconds=took)
    context = source.teacher.info.get("context_length")
    scores = score_tasks(tasks, models, device=device, context_length=context, progress=progress.bar)
    averaged = {n: with_average(s) for n, s in scores.items()}
    return Evaluation(text, averaged, took, time.monotonic() - began - took)


def _record_text(run: RunFolder, last: str, text: Path, ids: Tensor, found: Evaluation) -> None:
    (count, length), results = ids.shape, found.text
    settings = {"length": length, "sequences": count, "models": sorted(results)}
    inputs = {last: run.stage_hash(last), "text": data.text_sha256(text)}
    with run.stage("eval", config=settings, inputs=inputs) as stage:
        if not stage.done:
            stage.evidence = {"text": text.name, "path": str(text), "length": length, "sequences": count}
            stage.evidence["results"] = {n: asdict(r) for n, r in results.items()}
            stage.seconds = found.text_seconds


def _record_tasks(run: RunFolder, last: str, measures: Measures, found: Evaluation) -> None:
    results = found.tasks
    settings: dict[str, Any] = {k: list(getattr(measures, k)) for k in ("needle", "recall", "tasks")}
    settings |= {"limit": measures.limit, "seed": measures.seed, "models": sorted(results)}
    paths = [] if not (measures.needle or measures.recall) else [Path(str(measures.text))]
    paths += [task_file(Path(str(measures.task_files)), name) for name in measures.tasks]
    files = {p.name: data.text_sha256(p) for p in paths}
    with run.stage("eval-tasks", config=settings, inputs={last: run.stage_hash(last), "files": files}) as stage:
        if not stage.done:
            rows = {n: [asdict(s) for s in scores] for n, scores in results.items()}
            stage.evidence = settings | {"files": files, "results": rows}
            stage.seconds = found.task_seconds
