"""Commands that look and write nothing: inspect and doctor."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from .cli_options import (
    Batch,
    ConfigFile,
    Json,
    Length,
    LocalWindow,
    Pickle,
    Policy,
    Sequences,
    TeacherArg,
)
from .errors import ConfigError
from .progress import Progress


def inspect(
    teacher: TeacherArg = "embedded",
    memory: Annotated[
        bool,
        typer.Option(
            "--memory",
            help="memory and disk that every stage of a conversion would need, from the configuration alone: TEACHER "
            "is a folder with config.json, where weights need not be, or a .gguf file",
        ),
    ] = False,
    policy: Policy = None,
    config: ConfigFile = None,
    calib_sequences: Sequences = None,
    calib_length: Length = None,
    batch: Batch = None,
    local_window: LocalWindow = None,
    processes: Annotated[
        int,
        typer.Option(min=1, help="processes that torchrun starts for distillation; distill.shard cuts its weights too"),
    ] = 1,
    allow_pickle: Pickle = False,
    as_json: Json = False,
) -> None:
    """Lists the attention cores of TEACHER: what can be converted, and why the others cannot. Writes nothing.

    With --memory it says what a conversion with these settings would need instead.
    """
    settings = {
        "policy": policy,
        "calib.sequences": calib_sequences,
        "calib.length": calib_length,
        "align.batch": batch,
        "local_window": local_window,
    }
    if memory:
        from .config import load_config
        from .stage_memory import memory_needs

        settled = load_config(config, settings)
        with Progress() as progress:
            needs = memory_needs(teacher, config=settled, processes=processes, progress=progress)
        print(json.dumps(asdict(needs), indent=1) if as_json else needs.text())
        return
    if config is not None or processes != 1 or any(v is not None for v in settings.values()):
        raise ConfigError("inspect", "settings of a conversion change nothing about its attention cores", "--memory")
    from .source import open_source

    with Progress() as progress:
        source = open_source(teacher, allow_pickle=allow_pickle, need_tokenizer=False, progress=progress)
    info = source.teacher.info
    sites, refused = [s.summary() for s in source.scan.sites], [asdict(r) for r in source.scan.rejected]
    if as_json:
        known = {k: info[k] for k in ("family", "vocab_size", "context_length")}
        print(json.dumps({"teacher": known, "sites": sites, "refused": refused}, indent=1))
        return
    _print_sites(sites, refused)
    context = info["context_length"]
    print("Context of the teacher: " + (f"{context} tokens." if context else "not known from its file."))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _print_sites(sites: list[dict[str, Any]], refused: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table(*[k.replace("_", " ") for k in (sites[0] if sites else {"site": 0})])
    for s in sites:
        table.add_row(*map(_cell, s.values()))
    console.print(table)
    for r in refused:
        console.print(f"refused: {r['layer'] or r['node']}: {r['reason']}", markup=False)
    console.print(f"{len(sites)} sites can be converted, {len(refused)} are refused.", markup=False)


def doctor(as_json: Json = False) -> None:
    """What this machine has: memory, disk, versions, and what to install for what is missing.

    ONNX Runtime's operators and every kernel, gradients included, are compared with float64.
    """
    from .doctor import conclusion, examine

    with Progress() as progress:
        findings = examine(progress)
    lines = [*(f"{n}: {v}" for n, v in findings.items()), conclusion(findings)]
    print(json.dumps(findings, indent=1) if as_json else "\n".join(lines))
