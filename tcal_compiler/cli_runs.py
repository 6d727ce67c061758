"""Commands on a finished run folder: eval, verify, generate, report and compare."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer

from .cli_options import (
    Json,
    Pickle,
    Quiet,
    RunArg,
    TeacherAgain,
    Tokenizer,
)
from .progress import Progress


def evaluate(
    run: RunArg,
    text: Annotated[str, typer.Option(help="text that was not calibrated on")],
    length: Annotated[Optional[int], typer.Option(help="tokens of a sequence; default as calibrated", min=2)] = None,  # noqa: UP045
    sequences: Annotated[int, typer.Option(help="at most so many sequences", min=1)] = 32,
    student_only: Annotated[
        bool, typer.Option("--student-only", help="skip the naive, initialised and aligned copies")
    ] = False,
    teacher: TeacherAgain = None,
    tokenizer: Tokenizer = None,
    allow_pickle: Pickle = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Perplexity and mean KL(teacher, student) per token on a text."""
    from .runs import evaluate_run

    results = evaluate_run(
        run,
        text=text,
        teacher=teacher,
        tokenizer=tokenizer,
        length=length,
        sequences=sequences,
        baselines=not student_only,
        allow_pickle=allow_pickle,
        progress=Progress(quiet=quiet),
    )
    if as_json:
        rows = {n: {k: v if math.isfinite(v) else None for k, v in asdict(r).items()} for n, r in results.items()}
        print(json.dumps(rows, indent=1))
        return
    base = results["teacher"].perplexity
    for name, r in results.items():
        print(
            f"{name:12} perplexity {r.perplexity:10.3f}  x{r.perplexity / base:8.3f}  KL {r.kl:.4f} ± {r.kl_stderr:.4f}"
        )


def verify(
    run: RunArg,
    teacher: TeacherAgain = None,
    tokenizer: Tokenizer = None,
    allow_pickle: Pickle = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Repeats every check on the run folder; prints measured against allowed. Exit 1 when one fails."""
    from .conversion import require
    from .runs import verify_run

    checks = verify_run(
        run, teacher=teacher, tokenizer=tokenizer, allow_pickle=allow_pickle, progress=Progress(quiet=quiet)
    )
    if as_json:
        print(json.dumps([asdict(c) | {"passed": c.passed} for c in checks], indent=1))
    else:
        for c in checks:
            print(f"{'ok  ' if c.passed else 'FAIL'} {c.name}: {c.measured:.3g} (allowed {c.allowed:.3g}) {c.detail}")
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
    dtype: Annotated[Optional[str], typer.Option(help="which export: fp16, int8 or int4; default float32")] = None,  # noqa: UP045
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
    if as_json:
        print(json.dumps({"prompt": prompt, "text": "".join(pieces)}, indent=1))
        return
    print(prompt + next(pieces, ""), end="", flush=True)
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
        print((opened.path / "report.md").read_text(encoding="utf-8"))


def compare(
    run: RunArg,
    other: Annotated[Path, typer.Argument(help="run folder to put beside it")],
    html: Annotated[Optional[Path], typer.Option(help="page to write, with plots side by side")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Prints the reports of two run folders side by side, what differs first; with --json only what differs."""
    from .runs import compare_runs

    print(compare_runs(run, other, page=html, as_json=as_json))
