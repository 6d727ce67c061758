"""Writes docs/reference.md: every command with its options, and every configuration key, from the code itself.

python examples/write_reference.py --out docs/reference.md
"""

from __future__ import annotations

import argparse
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import typer.models
from annotated_types import Ge, Gt, Le
from pydantic.fields import FieldInfo

from tcal_compiler import cli
from tcal_compiler.config import Config
from tcal_compiler.runtime.config import StrictModel

HEAD = """# Reference

Made by `examples/write_reference.py` from the code; do not edit.

Every command takes `--debug`, which shows the traceback of an error, and `--help`. Results go to stdout, progress and
errors to stderr. Exit status: 0 done, 1 an error that the message explains, 2 wrong usage. Options of tcal-compile
without a default leave what the [configuration](#configuration) says.
"""


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(r) + " |" for r in rows]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *lines, ""])


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").strip()


def plain_type(annotation: Any) -> type:
    """X of X, of Optional[X] and of Optional[list[X]]."""
    found = next(t for t in typing.get_args(annotation) or (annotation,) if t is not type(None))
    return typing.get_args(found)[0] if typing.get_origin(found) is list else found


def parameters(command: Callable[..., None]) -> list[list[str]]:
    """Rows of name, default and meaning, from the annotations that typer reads."""
    hints = typing.get_type_hints(command, include_extras=True)
    rows = []
    for name, p in inspect.signature(command).parameters.items():
        annotation, info = typing.get_args(hints[name])[:2]
        kind = plain_type(annotation)
        shown = name.upper()
        if isinstance(info, typer.models.OptionInfo):
            named = [n for n in (info.default, *(info.param_decls or ())) if isinstance(n, str)]  # typer mixes them
            options = ", ".join(named or [f"--{name.replace('_', '-')}"])
            shown = options if kind is bool else f"{options} {kind.__name__.upper()}"
        default = (
            "required" if p.default is p.empty else "" if p.default is None or p.default is False else f"`{p.default}`"
        )
        rows.append([f"`{shown}`", default, cell(info.help or "")])
    return rows


def section(name: str, command: Callable[..., None], known: list[list[str]]) -> str:
    """known: parameters that tcal-compile has too, so that they are not repeated."""
    title = f"## {name}\n\n{inspect.getdoc(command) or ''}\n"
    rows = parameters(command)
    if rows and rows == known:
        return f"{title}\nTakes what [tcal-compile](#tcal-compile) takes, and stops after this stage.\n"
    return f"{title}\n{table(['argument or option', 'default', 'meaning'], rows)}" if rows else title


def commands() -> str:
    (whole,) = (c.callback for c in cli.compile_app.registered_commands)
    parts = [section("tcal-compile", whole, [])]
    for c in cli.app.registered_commands:
        if not c.hidden:
            parts.append(section(f"tcal {c.name or c.callback.__name__}", c.callback, parameters(whole)))
    return "\n".join(parts)


def meaning(info: FieldInfo) -> str:
    """Type and bounds of a configuration key."""
    options = typing.get_args(info.annotation)
    if typing.get_origin(info.annotation) is Literal:
        return " or ".join(f'`"{o}"`' for o in options)
    if typing.get_origin(info.annotation) is list:
        return "list"
    names = [t.__name__ for t in (options or (info.annotation,)) if t is not type(None)]
    bounds = [(Ge, "ge", "at least"), (Gt, "gt", "above"), (Le, "le", "at most")]
    limits = [f"{word} {getattr(m, a)}" for m in info.metadata for kind, a, word in bounds if isinstance(m, kind)]
    return ", ".join([*names, *limits])


def keys(model: type[StrictModel], prefix: str = "") -> list[list[str]]:
    rows = []
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, StrictModel):
            rows += keys(kind, f"{prefix}{name}.")
            continue
        shown = f'"{info.default}"' if isinstance(info.default, str) else str(info.default)
        default = "" if info.default is None else f"`{shown}`"
        rows.append([f"`{prefix}{name}`", meaning(info), default, cell(info.description or "")])
    return rows


def reference() -> str:
    text = (
        "## Configuration\n\nKeys of the TOML file that `--config` names; `calib.length` is `length` in the table "
        "`[calib]`. Options of the command line win over the file. An unknown key is an error.\n"
    )
    return "\n".join([HEAD, commands(), text, table(["key", "type", "default", "meaning"], keys(Config))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/reference.md"))
    parser.parse_args().out.write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
