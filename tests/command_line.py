"""Runs tcal and tcal-compile inside the test process, as their entry points do."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from tcal_compiler import cli

ASSETS = Path(cli.__file__).parent / "assets"
TINY = str(ASSETS / "tiny" / "teacher.pt2")
HELD_OUT = str(ASSETS / "text" / "heldout.txt")
BYTES = ("--tokenizer", "bytes")
SMALL = ("--calib-sequences", "6", "--calib-length", "48", "--batch", "2", "--quiet")
SMALL += ("--local-window", "8")  # shorter than the sequences, as the default's 64 is than its own


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def call(*words: object) -> Result:
    """Runs `tcal ...` or `tcal-compile ...`. An exception that would be a traceback is raised."""
    argv = [str(w) for w in words]
    out, err = io.StringIO(), io.StringIO()
    entry = {"tcal": cli.main, "tcal-compile": cli.compile_main}[argv[0]]
    code = 0
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            entry()
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    return Result(code, out.getvalue(), err.getvalue())


def done(*words: object) -> str:
    """stdout of a command that must succeed."""
    result = call(*words)
    assert result.code == 0, result.err
    return result.out


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below folder, the lock without its process number."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): b"" if p.name == ".lock" else p.read_bytes() for p in files}


def refused(result: Result, kind: str, *words: str) -> str:
    """A typed error on stderr, nothing else; returns it."""
    assert result.code == 1, result
    assert "Traceback" not in result.err and result.out == ""
    message = result.err[result.err.index(f"{kind}: ") :]
    assert message.startswith(f"{kind}: ") and message.count(": ") >= 2
    assert "\n  Try: " in message, message
    for word in words:
        assert word in message, message
    return message


def compile_(*words: object, out: Path) -> Result:
    return call("tcal-compile", *words, "-o", out, *([] if "--calib-length" in words else SMALL))
