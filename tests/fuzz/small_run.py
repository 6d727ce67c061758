"""A small run folder made by commands in child processes, which can be killed or starved: what crash.py and limits.py
share.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ENTRIES = {"tcal": "main", "tcal-compile": "compile_main"}
SETTINGS = """
policy = "kl:1"
local_window = 6
[calib]
sequences = 4
length = 32
holdout = 2
batch = 2
[score]
align_steps = 20
[align]
steps = 60
batch = 2
checkpoint_every = 5
score_every = 10
[distill]
batch = 2
checkpoint_every = 5
score_every = 10
"""
Words = tuple[str, ...]


def commands(work: Path, out: Path, names: str) -> dict[str, Words]:
    """The words of the named commands (keys of known) on the run folder out."""
    same = (str(work / "teacher.pt2"), "-o", str(out), "--config", str(work / "tcal.toml"), "--tokenizer", "bytes")
    text = str(ROOT / "tcal_compiler/assets/text/heldout.txt")
    known = {
        "align": ("tcal", "align", *same, "--policy", "keep=0"),
        "compile": ("tcal-compile", *same),
        "distill": ("tcal", "distill", str(out), "--steps", "60"),
        "distill-only": ("tcal", "distill", str(out), "--steps", "60", "--no-export"),
        "fp16": ("tcal", "export", str(out), "--dtype", "fp16"),
        "eval": ("tcal", "eval", str(out), "--text", text, "--sequences", "2"),
    }
    return {name: known[name] for name in names.split(",")}


def prepare(work: Path) -> None:
    """Writes the teacher and the configuration; imports what the children need, so that each starts fast."""
    import torch

    from examples.tiny_torch_teacher import TinyTeacher, export
    from tcal_compiler import cli, runs, variants  # noqa: F401

    torch.set_num_threads(1)
    torch.manual_seed(0)
    export(TinyTeacher(layers=2).eval(), work / "teacher.pt2")
    (work / "tcal.toml").write_text(SETTINGS)


def start(words: Words, log: Path, limit: Callable[[], None] = lambda: None) -> int:
    """The process id of a child that runs a command as its entry point does, what it says appended to log.

    limit is called in the child first.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code: object = 70  # an exception that is no exit of the command
    try:
        from tcal_compiler import cli

        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)  # not those that a test replaced
        sys.argv = list(words)
        limit()
        try:
            getattr(cli, ENTRIES[words[0]])()
            code = 0
        except SystemExit as e:
            code = e.code or 0
        except BaseException as e:
            os.write(2, f"\nUNTYPED {type(e).__name__}: {e}\n".encode())
        sys.stdout.flush()
    finally:
        os._exit(code if isinstance(code, int) else 1)


def finish(words: Words, log: Path) -> str:
    """Runs a command undisturbed; what it said when it failed."""
    log.unlink(missing_ok=True)
    _, status = os.waitpid(start(words, log), 0)
    return f"{' '.join(words[:2])}: {log.read_text()[-2000:]}" if status else ""


def records(out: Path) -> dict[str, Any]:
    """The manifest's stages; none where there is no manifest yet."""
    file = out / "tcal.json"
    return json.loads(file.read_text())["stages"] if file.exists() else {}


def made(out: Path) -> dict[str, str]:
    """sha256 of every file of the run folder but manifest, lock and report, which tell times; and of what the manifest
    says of each stage, without times.
    """
    files = [
        p for p in out.rglob("*") if p.is_file() and p.name not in ("tcal.json", ".lock", "report.md", "report.html")
    ]
    found = {p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    for name, record in records(out).items():
        said = {k: record[k] for k in ("config_hash", "inputs_hash", "made_from", "evidence")}
        said["evidence"] = {k: v for k, v in record["evidence"].items() if k not in ("speed", "peak_memory")}
        if name != "report":
            found[f"stage {name}"] = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    return found


def difference(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return sorted(n for n in one.keys() | other.keys() if one.get(n) != other.get(n))


@dataclass
class Step:
    """What a command did when nothing disturbed it.

    seconds: of each stage that it made, in their order, with the rest of its time under "start". made: all files after.
    """

    name: str
    seconds: dict[str, float] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)


def environment() -> dict[str, Any]:
    """Versions, machine and commit."""
    import importlib.metadata

    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    packages = {n: importlib.metadata.version(n) for n in ("torch", "onnxruntime")}
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()}"
    return {"python": platform.python_version(), **packages, "machine": machine, "threads": 1, "commit": commit}


def record(file: Path, section: str, key: str, value: dict[str, Any]) -> None:
    """Writes one run of a script into a JSON file of all of them."""
    data = json.loads(file.read_text()) if file.exists() else {}
    data.setdefault(section, {})[key] = value | {"environment": environment()}
    file.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
