"""No default path opens a socket or unpickles objects: watched through the interpreter's audit events."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from command_line import HELD_OUT
from fuzz_targets import small_tokenizer
from tiny_models import llama

ROOT = Path(__file__).parents[1]

# Network events raise and are noted: a library that swallows the error is found all the same. A pickle may name what a
# tensor is made of; anything else would be an object.
WATCH = """
import sys
CALLS = ("connect", "getaddrinfo", "gethostbyname", "sendto", "bind")
NETWORK = ("urllib.Request", *(f"socket.{name}" for name in CALLS))
TENSORS = ("torch.", "collections.")
seen = {"network": [], "pickle": [], "process": []}
def watch(event, args):
    if event in NETWORK:
        seen["network"].append(f"{event} {args[1:]}")
        raise OSError("the network is not to be used")
    if event == "pickle.find_class" and not args[0].startswith(TENSORS):
        seen["pickle"].append(".".join(args))
    if event in ("os.system", "os.exec", "os.posix_spawn"):
        seen["process"].append(str(args[:2]))
sys.addaudithook(watch)
"""

COMMANDS = """
import contextlib, io, json
def run(*words):
    from tcal_compiler import cli
    sys.argv = [str(w) for w in words]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            (cli.compile_main if words[0] == "tcal-compile" else cli.main)()
    except SystemExit as e:
        assert not e.code, words
"""


def watched(code: str, *args: object) -> dict[str, list[str]]:
    """What a process that runs the code did. Without the variables that would keep transformers offline anyway."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    result = subprocess.run(
        [sys.executable, "-c", f"{WATCH}{COMMANDS}{code}\nprint('seen', json.dumps(seen))", *map(str, args)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.rpartition("seen ")[2])


def test_the_watch_sees_the_network_and_pickles():
    code = """
import pathlib, pickle, socket, urllib.request
for attempt in (lambda: socket.create_connection(("127.0.0.1", 9)), lambda: urllib.request.urlopen("http://localhost")):
    try:
        attempt()
    except OSError:
        pass
pickle.loads(pickle.dumps(pathlib.PurePosixPath("x")))
"""
    seen = watched(code)
    assert any("getaddrinfo" in s for s in seen["network"]) and any("urllib" in s for s in seen["network"])
    assert seen["pickle"] == ["pathlib.PurePosixPath"]


def test_the_default_paths_use_no_network_and_no_pickle(finished, tmp_path):
    """The Python interface comes first: the command line would set variables that keep transformers offline."""
    llama(num_hidden_layers=1, vocab_size=300).save_pretrained(tmp_path / "llama")
    small_tokenizer(tmp_path / "llama")
    code = """
import tcal_compiler
finished, out, held_out = sys.argv[1:]
small = {"calib": {"sequences": 1, "length": 16, "holdout": 1}, "align": {"steps": 1}}
config = tcal_compiler.Config.model_validate(small)
tcal_compiler.convert(out + "/llama", out=out + "/new", config=config, until="align")
run("tcal", "eval", finished, "--text", held_out, "--quiet", "--sequences", 1, "--student-only")
run("tcal", "generate", finished, "The old")
run("tcal", "report", finished)
"""
    assert watched(code, finished, tmp_path, HELD_OUT) == {"network": [], "pickle": [], "process": []}
