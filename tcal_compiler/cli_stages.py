"""Commands that run stages: tcal-compile, plan, calibrate, align, distill and export."""

from __future__ import annotations

import inspect as signatures
import json
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
    DryRun,
    Dtype,
    Force,
    Init,
    Json,
    Length,
    LocalWindow,
    MaxKl,
    Opset,
    Out,
    Pickle,
    PlanFile,
    Policy,
    Profile,
    Quiet,
    RunArg,
    Seed,
    Sequences,
    Steps,
    TeacherAgain,
    TeacherArg,
    Tokenizer,
    Verbose,
)
from .config import load_config
from .errors import ConfigError
from .progress import Progress


def _convert(
    until: str, teacher: str, out: Path, policy: str | None, *, options: dict[str, Any], json_out: bool
) -> None:
    from .api import convert, report_file
    from .dry_run import dry_run
    from .recorded import settings_before

    config_file, plan = options.pop("config"), options.pop("plan")
    run_options = {k: options.pop(k) for k in ("tokenizer", "allow_pickle", "device")}
    dry, resume = options.pop("dry_run"), options.pop("resume")
    with Progress(quiet=options.pop("quiet"), verbose=options.pop("verbose")) as progress:
        settings, tokenizer = settings_before(out)
        if settings:
            progress.say(f"{out} goes on with its own settings where none is given")
        run_options["tokenizer"] = run_options["tokenizer"] or tokenizer
        config = load_config(config_file, {"policy": policy, **options}, settings)
        what: dict[str, Any] = {"out": out, "config": config, "plan": plan, "until": until, "progress": progress}
        if dry:
            found = dry_run(teacher, **what, **run_options)
        else:
            path = convert(teacher, resume=resume, **what, **run_options)
    if dry:
        print(json.dumps(found.as_json(), indent=1) if json_out else found.text())
        return
    if json_out:
        print((path / "tcal.json").read_text(encoding="utf-8"))
        return
    print(f"{path}: {until} is complete. Report: {report_file(path)}")
    print(f'Try: tcal generate {path} "Once upon a time"' if until == "export" else f"Plan: {path / 'plan.toml'}")
    _print_conclusion(path)


def _print_conclusion(path: Path) -> None:
    from .recorded import reading
    from .report import conclusion_of
    from .runtime.run_files import read_manifest

    with reading(path):
        print("".join(f"{line}.\n" for line in conclusion_of(read_manifest(path))), end="")


def _stage_command(until: str, description: str) -> Callable[..., None]:
    def command(
        teacher: TeacherArg = "embedded",
        out: Out = Path("run"),
        policy: Policy = None,
        plan: PlanFile = None,
        config: ConfigFile = None,
        init: Init = None,
        local_window: LocalWindow = None,
        calib: Calib = None,
        calib_sequences: Sequences = None,
        calib_length: Length = None,
        align_steps: Steps = None,
        distill_steps: DistillSteps = None,
        distill_tokens: DistillTokens = None,
        batch: Batch = None,
        profile: Profile = None,
        opset: Opset = None,
        seed: Seed = None,
        tokenizer: Tokenizer = None,
        allow_pickle: Pickle = False,
        device: Device = "cpu",
        restart: Again = False,
        dry_run: DryRun = False,
        quiet: Quiet = False,
        verbose: Verbose = False,
        as_json: Json = False,
    ) -> None:
        options = {
            "config": config,
            "plan": plan,
            "init": init,
            "local_window": local_window,
            "calib.text": calib[0] if calib and len(calib) == 1 else calib or None,
            "calib.sequences": calib_sequences,
            "calib.length": calib_length,
            "align.steps": align_steps,
            "align.batch": batch,
            "export.profile": profile,
            "export.opset": opset,
            "distill.steps": distill_steps,
            "distill.tokens": distill_tokens,
            "seed": seed,
            "tokenizer": tokenizer,
            "allow_pickle": allow_pickle,
            "device": device,
            "resume": not restart,
            "dry_run": dry_run,
            "quiet": quiet,
            "verbose": verbose,
        }
        _convert(until, teacher, out, policy, options=options, json_out=as_json)

    command.__doc__ = description
    return command


def _export_command() -> Callable[..., None]:
    """The stage, and with --dtype a smaller variant of a run folder's student."""
    stage = _stage_command("export", "")

    def export(
        teacher: str,
        dtype: str | None,
        max_kl: float | None,
        force: bool,
        quiet: bool,
        verbose: bool,
        as_json: bool,
        **options: Any,
    ) -> None:
        if dtype is None:
            if force or max_kl is not None:
                raise ConfigError(
                    "export", "--force and --max-kl bound a variant", "--dtype fp16, int8, int8-caches or int4"
                )
            stage(teacher=teacher, quiet=quiet, verbose=verbose, as_json=as_json, **options)
            return
        if set_too := [n for n, value in options.items() if value != given.parameters[n].default]:
            names = ", ".join(f"--{n.replace('_', '-')}" for n in set_too)
            raise ConfigError("export", f"{names} change nothing about a variant", f"tcal export RUN --dtype {dtype}")
        from .variants import export_variant

        with Progress(quiet=quiet, verbose=verbose) as progress:
            check = export_variant(teacher, dtype, max_kl=max_kl, force=force, progress=progress)  # type: ignore[arg-type]
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
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Distils the whole student of a run folder from its teacher, then renews its program and ONNX model.

    Options that are not given are those that the run was made with; --config replaces its [distill] table. Under
    torchrun the processes share each step's sequences.
    """
    from .api import report_file
    from .processes import distill_in_processes

    with Progress(quiet=quiet, verbose=verbose) as progress:
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
            progress=progress,
        )
    if path is not None and as_json:
        print((path / "tcal.json").read_text(encoding="utf-8"))
    elif path is not None:
        print(f"{path}: distillation is complete. Report: {report_file(path)}")
        _print_conclusion(path)


compile_command = _stage_command("export", "Converts TEACHER into a hybrid Gated DeltaNet student in a run folder.")
plan = _stage_command("plan", "Writes plan.toml, to edit before the next stages.")
calibrate = _stage_command("calibrate", "Measures the teacher's attention and initialises the student.")
align = _stage_command("align", "Aligns every converted layer with the teacher's.")
export = _export_command()
