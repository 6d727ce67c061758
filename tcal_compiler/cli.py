"""The command line: options to api calls, results on stdout, progress on stderr. Exit 0 done, 1 our error, 2 usage."""

from __future__ import annotations

import inspect as signatures
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from .cli_options import (
    Again,
    Batch,
    Calib,
    ConfigFile,
    Device,
    DistillSteps,
    DistillTokens,
    Dtype,
    Force,
    Init,
    Json,
    Length,
    MaxKl,
    Opset,
    Out,
    Pickle,
    PlanFile,
    Policy,
    Quiet,
    RunArg,
    Seed,
    Sequences,
    Steps,
    TeacherAgain,
    TeacherArg,
    Tokenizer,
)
from .config import load_config
from .errors import ConfigError, TcalError
from .progress import Progress

app = typer.Typer(
    no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, help="Stages and tools, one by one."
)
compile_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def _convert(
    until: str, teacher: str, out: Path, policy: str | None, *, options: dict[str, Any], json_out: bool
) -> None:
    from .api import convert, report_file
    from .recorded import settings_before

    config_file, plan = options.pop("config"), options.pop("plan")
    run_options = {k: options.pop(k) for k in ("tokenizer", "allow_pickle", "device", "resume")}
    progress = Progress(quiet=options.pop("quiet"))
    settings, tokenizer = settings_before(out)
    if settings:
        progress.say(f"{out} goes on with its own settings where none is given")
    run_options["tokenizer"] = run_options["tokenizer"] or tokenizer
    config = load_config(config_file, {"policy": policy, **options}, settings)
    path = convert(teacher, out=out, config=config, plan=plan, until=until, progress=progress, **run_options)
    if json_out:
        print((path / "tcal.json").read_text(encoding="utf-8"))
        return
    print(f"{path}: {until} is complete. Report: {report_file(path)}")
    print(f'Try: tcal generate {path} "Once upon a time"' if until == "export" else f"Plan: {path / 'plan.toml'}")


def _stage_command(until: str, description: str) -> Callable[..., None]:
    def command(
        teacher: TeacherArg = "embedded",
        out: Out = Path("run"),
        policy: Policy = None,
        plan: PlanFile = None,
        config: ConfigFile = None,
        init: Init = None,
        calib: Calib = None,
        calib_sequences: Sequences = None,
        calib_length: Length = None,
        align_steps: Steps = None,
        distill_steps: DistillSteps = None,
        distill_tokens: DistillTokens = None,
        batch: Batch = None,
        opset: Opset = None,
        seed: Seed = None,
        tokenizer: Tokenizer = None,
        allow_pickle: Pickle = False,
        device: Device = "cpu",
        restart: Again = False,
        quiet: Quiet = False,
        as_json: Json = False,
    ) -> None:
        options = {
            "config": config,
            "plan": plan,
            "init": init,
            "calib.text": calib[0] if calib and len(calib) == 1 else calib or None,
            "calib.sequences": calib_sequences,
            "calib.length": calib_length,
            "align.steps": align_steps,
            "align.batch": batch,
            "export.opset": opset,
            "distill.steps": distill_steps,
            "distill.tokens": distill_tokens,
            "seed": seed,
            "tokenizer": tokenizer,
            "allow_pickle": allow_pickle,
            "device": device,
            "resume": not restart,
            "quiet": quiet,
        }
        _convert(until, teacher, out, policy, options=options, json_out=as_json)

    command.__doc__ = description
    return command


compile_app.command()(
    _stage_command("export", "Converts TEACHER into a hybrid Gated DeltaNet student in a run folder.")
)
app.command("plan")(_stage_command("plan", "Writes plan.toml, to edit before the next stages."))
app.command("calibrate")(_stage_command("calibrate", "Measures the teacher's attention and initialises the student."))
app.command("align")(_stage_command("align", "Aligns every converted layer with the teacher's."))


def _export_command() -> Callable[..., None]:
    """The stage, and with --dtype a smaller variant of a run folder's student."""
    stage = _stage_command("export", "")

    def export(
        teacher: str, dtype: str | None, max_kl: float | None, force: bool, quiet: bool, as_json: bool, **options: Any
    ) -> None:
        if dtype is None:
            if force or max_kl is not None:
                raise ConfigError("export", "--force and --max-kl bound a variant", "--dtype fp16, int8 or int4")
            stage(teacher=teacher, quiet=quiet, as_json=as_json, **options)
            return
        if set_too := [n for n, value in options.items() if value != given.parameters[n].default]:
            names = ", ".join(f"--{n.replace('_', '-')}" for n in set_too)
            raise ConfigError("export", f"{names} change nothing about a variant", f"tcal export RUN --dtype {dtype}")
        from .variants import export_variant

        check = export_variant(teacher, dtype, max_kl=max_kl, force=force, progress=Progress(quiet=quiet))  # type: ignore[arg-type]
        if as_json:
            print(json.dumps(asdict(check) | {"passed": check.passed}, indent=1))
        else:
            print(f"{check.name}: {check.measured:.3g} (allowed {check.allowed:.3g}) {check.detail}")

    extra = {"dtype": (Dtype, None), "max_kl": (MaxKl, None), "force": (Force, False)}
    kind = signatures.Parameter.POSITIONAL_OR_KEYWORD
    mine = [signatures.Parameter(n, kind, default=value, annotation=hint) for n, (hint, value) in extra.items()]
    given = signatures.signature(stage, eval_str=True)
    export.__signature__ = given.replace(parameters=[*given.parameters.values(), *mine])  # type: ignore[attr-defined]
    export.__annotations__ = {p.name: p.annotation for p in (*given.parameters.values(), *mine)}
    export.__doc__ = (
        "Writes the program and the ONNX model. With --dtype, TEACHER is a run folder, and a smaller variant of its "
        "ONNX student is written beside it, unless its KL to the float32 student exceeds the bound."
    )
    return export


app.command("export")(_export_command())


@app.command()
def distill(
    run: RunArg,
    steps: Annotated[Optional[int], typer.Option(help="optimiser steps", min=0)] = None,  # noqa: UP045
    tokens: Annotated[Optional[int], typer.Option(help="tokens to train on, instead of steps", min=1)] = None,  # noqa: UP045
    config: ConfigFile = None,
    teacher: TeacherAgain = None,
    tokenizer: Tokenizer = None,
    allow_pickle: Pickle = False,
    device: Device = "cpu",
    no_export: Annotated[bool, typer.Option("--no-export", help="leave program and ONNX model as they are")] = False,
    quiet: Quiet = False,
) -> None:
    """Distils the whole student of a run folder from its teacher, then renews its program and ONNX model.

    Options that are not given are those that the run was made with; --config replaces its [distill] table. Under
    torchrun the processes share each step's sequences.
    """
    from .api import report_file
    from .processes import distill_in_processes

    path = distill_in_processes(
        run,
        steps=steps,
        tokens=tokens,
        config_file=config,
        teacher=teacher,
        tokenizer=tokenizer,
        allow_pickle=allow_pickle,
        device=device,
        until="distill" if no_export else "export",
        progress=Progress(quiet=quiet),
    )
    if path is not None:
        print(f"{path}: distillation is complete. Report: {report_file(path)}")


@app.command()
def inspect(teacher: TeacherArg = "embedded", allow_pickle: Pickle = False, as_json: Json = False) -> None:
    """Lists the attention cores of TEACHER: what can be converted, and why the others cannot. Writes nothing."""
    from .api import open_source

    source = open_source(teacher, allow_pickle=allow_pickle, need_tokenizer=False)
    sites, refused = [s.summary() for s in source.scan.sites], [asdict(r) for r in source.scan.rejected]
    if as_json:
        print(json.dumps({"sites": sites, "refused": refused}, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table(*[k.replace("_", " ") for k in (sites[0] if sites else {"site": 0})])
    for s in sites:
        table.add_row(*["-" if v is None else f"{v:.6g}" if isinstance(v, float) else str(v) for v in s.values()])
    console.print(table)
    for r in refused:
        console.print(f"refused: {r['layer'] or r['node']}: {r['reason']}", markup=False)
    console.print(f"{len(sites)} sites can be converted, {len(refused)} are refused.", markup=False)


@app.command("eval")
def evaluate(
    run: RunArg,
    text: Annotated[str, typer.Option(help="text that was not calibrated on")],
    length: Annotated[Optional[int], typer.Option(help="tokens of a sequence; default as calibrated", min=2)] = None,  # noqa: UP045
    sequences: Annotated[int, typer.Option(help="at most so many sequences", min=1)] = 32,
    student_only: Annotated[bool, typer.Option("--student-only", help="skip the naive and initialised copies")] = False,
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


@app.command()
def verify(
    run: RunArg,
    teacher: TeacherAgain = None,
    tokenizer: Tokenizer = None,
    allow_pickle: Pickle = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Repeats every check on the run folder; prints measured against allowed. Exit 1 when one fails."""
    from .api import require
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


@app.command()
def generate(
    run: RunArg,
    prompt: Annotated[str, typer.Argument(help="text to continue")],
    max_new_tokens: Annotated[int, typer.Option(help="tokens to append at most", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_k: Annotated[Optional[int], typer.Option(help="draw from so many likeliest tokens")] = None,  # noqa: UP045
    top_p: Annotated[Optional[float], typer.Option(help="draw from the likeliest tokens of this mass")] = None,  # noqa: UP045
    seed: Annotated[int, typer.Option(help="seed of the draws", min=0)] = 0,
    dtype: Annotated[Optional[str], typer.Option(help="which export: fp16, int8 or int4; default float32")] = None,  # noqa: UP045
) -> None:
    """Streams text from the ONNX student in ONNX Runtime."""
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
    print(prompt + next(pieces, ""), end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


@app.command()
def report(run: RunArg) -> None:
    """Writes report.md, which it prints, and report.html, which has the plots too."""
    from .api import write_report
    from .runtime.run_folder import RunFolder

    with RunFolder.open_existing(run, write=True) as opened:
        opened.record("plan")
        write_report(opened, Progress())
        print((opened.path / "report.md").read_text(encoding="utf-8"))


@app.command()
def compare(
    run: RunArg,
    other: Annotated[Path, typer.Argument(help="run folder to put beside it")],
    html: Annotated[Optional[Path], typer.Option(help="page to write, with plots side by side")] = None,  # noqa: UP045
) -> None:
    """Prints the reports of two run folders side by side, what differs first."""
    from .runs import compare_runs

    print(compare_runs(run, other, page=html))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, and every kernel against float64 on this machine."""
    from .doctor import examine

    findings = examine()
    print(json.dumps(findings, indent=1) if as_json else "\n".join(f"{n}: {v}" for n, v in findings.items()))


def _run(target: typer.Typer) -> None:
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    _prepare_process()
    try:
        target()
    except TcalError as e:
        if debug:
            raise
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as e:
        if isinstance(e, SystemExit) and e.code != 130:  # what typer makes of Ctrl-C
            raise
        print("\nStopped. The same command goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _prepare_process() -> None:
    """Settings that torch and transformers read when they are imported, which happens later.

    No network in any default path. Threads that wait sleep instead of spinning: beside other work on the same cores,
    spinning made this many times slower.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")  # stages show their own progress
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    """Entry point of `tcal`."""
    _run(app)


def compile_main() -> None:
    """Entry point of `tcal-compile`."""
    _run(compile_app)
