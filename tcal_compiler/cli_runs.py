"""Commands on a finished run folder: eval, verify, generate, report and compare."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from .cli_options import (
    Device,
    Json,
    Pickle,
    Quiet,
    RunArg,
    TeacherAgain,
    Tokenizer,
    Verbose,
)
from .errors import ConfigError
from .progress import Progress, printable

if TYPE_CHECKING:
    from .evaluation import Evaluation


def evaluate(
    run: RunArg,
    text: Annotated[Optional[str], typer.Option(help="text that was not calibrated on")] = None,  # noqa: UP045
    length: Annotated[Optional[int], typer.Option(help="tokens of a sequence; default as calibrated", min=2)] = None,  # noqa: UP045
    sequences: Annotated[int, typer.Option(help="at most so many sequences", min=1)] = 32,
    needle: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="find one fact in so many tokens of the text, as in 1024,2048"),
    ] = None,
    recall: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="find one of eight facts in so many tokens of the text"),
    ] = None,
    tasks: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="zero-shot tasks, as in arc_easy,piqa: hellaswag, arc_easy, arc_challenge, piqa, winogrande, "
            "openbookqa, boolq, lambada_openai"
        ),
    ] = None,
    task_files: Annotated[Optional[Path], typer.Option(help="folder with a TASK.jsonl for each of the tasks")] = None,  # noqa: UP045
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="examples of a task at most; default all, 100 for --needle and --recall", min=1),
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of the facts that are hidden", min=0)] = 0,
    student_only: Annotated[
        bool, typer.Option("--student-only", help="skip the naive, initialised and aligned copies")
    ] = False,
    without_linear: Annotated[
        bool, typer.Option("--without-linear", help="also the student with its converted layers giving 0")
    ] = False,
    device: Device = "cpu",
    teacher: TeacherAgain = None,
    tokenizer: Tokenizer = None,
    allow_pickle: Pickle = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Perplexity and mean KL(teacher, student) per token on a text, retrieval from it, and zero-shot tasks."""
    from .evaluation import Measures, evaluate_run

    words = [w.strip() for w in tasks.split(",")] if tasks else []
    needles, recalls = _lengths("--needle", needle), _lengths("--recall", recall)
    with Progress(quiet=quiet, verbose=verbose) as progress:
        found = evaluate_run(
            run,
            Measures(text, length, sequences, needles, recalls, words, task_files, limit, seed),
            teacher=teacher,
            tokenizer=tokenizer,
            baselines=not student_only,
            ablation=without_linear,
            allow_pickle=allow_pickle,
            device=device,
            progress=progress,
        )
    _print_scores(found, as_json=as_json)


def _lengths(option: str, given: str | None) -> list[int]:
    try:
        return [int(n) for n in given.split(",")] if given else []
    except ValueError as e:
        raise ConfigError(option, f"{given!r} is no list of lengths", f"{option} 1024,2048") from e


def _print_scores(found: Evaluation, *, as_json: bool) -> None:
    if as_json:
        rows: dict[str, dict[str, Any]] = {n: _finite(asdict(r)) for n, r in found.text.items()}
        for name, scores in found.tasks.items():
            rows.setdefault(name, {})["tasks"] = [_finite(asdict(s)) for s in scores]
        print(json.dumps(rows, indent=1))
        return
    from .report.numbers import with_error

    if found.text:
        print(f"On {found.sequences} x {found.length} tokens:")
    for name, r in found.text.items():
        ratio = r.perplexity / found.text["teacher"].perplexity
        print(f"{name:12} perplexity {r.perplexity:10.3f}  x{ratio:8.3f}  KL {with_error(r.kl, r.kl_stderr, 4)}")
    for name, scores in found.tasks.items():
        for s in scores:
            line = f"{name:12} {s.task:16} {s.metric:8} {with_error(s.value, s.stderr, 4):>17}"
            change = with_error(s.change, s.change_stderr, 4)
            print(line + ("" if name == "teacher" else f"  minus the teacher's {change}"))


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def verify(
    run: RunArg,
    teacher: TeacherAgain = None,
    tokenizer: Tokenizer = None,
    allow_pickle: Pickle = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Repeats every check on the run folder and makes more; prints measured against allowed. Exit 1 when one fails.

    The report counts those that the stages made alone.
    """
    from .conversion import require
    from .runs import verify_run

    with Progress(quiet=quiet, verbose=verbose) as progress:
        checks = verify_run(run, teacher=teacher, tokenizer=tokenizer, allow_pickle=allow_pickle, progress=progress)
    if as_json:
        print(json.dumps([asdict(c) | {"passed": c.passed} for c in checks], indent=1))
    else:
        for c in checks:
            print(f"{'ok  ' if c.passed else 'FAIL'} {c.name}: {c.measured:.3g} (allowed {c.allowed:.3g}) {c.detail}")
        held = sum(c.passed for c in checks)
        print(f"{held} of {len(checks)} hold; the report counts only those that the stages made")
    hint = "the tcal-compile command of this run again, which makes anew what changed; tcal doctor checks this machine"
    require("verify", checks, hint)


def generate(
    run: RunArg,
    prompt: Annotated[str, typer.Argument(help="text to continue")],
    max_new_tokens: Annotated[int, typer.Option(help="tokens to append at most", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_k: Annotated[Optional[int], typer.Option(help="draw from so many likeliest tokens")] = None,  # noqa: UP045
    top_p: Annotated[Optional[float], typer.Option(help="draw from the likeliest tokens of this mass")] = None,  # noqa: UP045
    seed: Annotated[int, typer.Option(help="seed of the draws", min=0)] = 0,
    dtype: Annotated[Optional[str], typer.Option(help="fp16, int8, int8-caches or int4; default float32")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Streams text from the ONNX student in ONNX Runtime; with --json it comes at the end."""
    from .runs import generate_text

    pieces = generate_text(
        run,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        dtype=dtype,
    )
    with Progress() as progress:
        progress.wait(f"loading {run} and reading the prompt")
        first = next(pieces, "")
    if as_json:
        print(json.dumps({"prompt": prompt, "text": first + "".join(pieces)}, indent=1))
        return
    print(prompt + first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def report(run: RunArg, as_json: Json = False) -> None:
    """Writes report.md, which it prints, and report.html, which has the plots too; with --json says where they are."""
    from .api import write_report
    from .runtime.run_folder import RunFolder

    with RunFolder.open_existing(run, write=True) as opened:
        opened.record("plan")
        write_report(opened, Progress())
        if as_json:
            files = {name: opened.path / f"report.{name}" for name in ("md", "html")}
            print(json.dumps({name: str(f) if f.is_file() else None for name, f in files.items()}, indent=1))
            return
        print(printable((opened.path / "report.md").read_text(encoding="utf-8")))


def compare(
    run: RunArg,
    other: Annotated[Path, typer.Argument(help="run folder to put beside it")],
    html: Annotated[Optional[Path], typer.Option(help="page to write, with plots side by side")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Prints the reports of two run folders side by side, what differs first; with --json only what differs.

    With --html it writes the page, and prints one line or the JSON.
    """
    from .runs import compare_runs

    told = compare_runs(run, other, page=html, as_json=as_json)
    print(printable(f"{html} is written." if html is not None and not as_json else told))
