"""The command line: which commands there are, and how their process runs. Exit 0 done, 1 our error, 2 usage.

Commands turn options into api calls, with results on stdout and progress on stderr: cli_stages.py, cli_runs.py and
cli_inspect.py.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import typer

from . import cli_inspect, cli_runs, cli_stages
from .errors import StageError, TcalError
from .progress import printable
from .runtime.memory import is_out_of_memory, out_of_memory_error

app = typer.Typer(
    no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, help="Stages and tools, one by one."
)
compile_app = typer.Typer(add_completion=True, pretty_exceptions_enable=False)

compile_app.command()(cli_stages.compile_command)
COMMANDS: dict[str, Callable[..., None]] = {
    "plan": cli_stages.plan,
    "calibrate": cli_stages.calibrate,
    "align": cli_stages.align,
    "export": cli_stages.export,
    "distill": cli_stages.distill,
    "inspect": cli_inspect.inspect,
    "eval": cli_runs.evaluate,
    "verify": cli_runs.verify,
    "generate": cli_runs.generate,
    "report": cli_runs.report,
    "compare": cli_runs.compare,
    "doctor": cli_inspect.doctor,
}
STAGES = ("plan", "calibrate", "align", "export", "distill")  # each leaves checkpoints when it is stopped
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def _run(target: typer.Typer) -> None:
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    prepare_process()
    if not debug:
        warnings.formatwarning = _note  # type: ignore[assignment]
    try:
        _to_the_end(target)
    except TcalError as e:
        if debug:
            raise
        _fail(e)
    except (KeyboardInterrupt, SystemExit) as e:
        if isinstance(e, SystemExit) and e.code != 130:  # what typer makes of Ctrl-C
            raise
        again = " The same command goes on." if _keeps_checkpoints(sys.argv[1:]) else ""
        print(f"\nStopped.{again}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as e:
        if isinstance(e, OSError) and e.filename is None and e.errno in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
            _fail(StageError("the output", f"cannot be written: {e.strerror}", "another place for it, with free space"))
        if debug or not is_out_of_memory(e):
            raise
        _fail(out_of_memory_error(Path(sys.argv[0]).name, e))


def _to_the_end(target: typer.Typer) -> None:
    """Runs a command; what is still to be written to stdout is written before its status is known.

    Characters that the terminal's encoding lacks are written as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        target()
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()


def _keeps_checkpoints(words: list[str]) -> bool:
    """Whether this is tcal-compile or one of tcal's stages, neither a dry run nor an export of another dtype."""
    runs_stages = Path(sys.argv[0]).stem == "tcal-compile" or (words and words[0] in STAGES)
    return bool(runs_stages) and not any(w.split("=")[0] in ("--dry-run", "--dtype") for w in words)


def _note(message: Warning | str, *_place: object) -> str:
    """A warning without the place in this program that it comes from."""
    return f"Note: {message}\n"


def _fail(e: TcalError) -> NoReturn:
    print(printable(f"{type(e).__name__}: {e}"), file=sys.stderr)
    sys.exit(1)


def prepare_process() -> None:
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


if __name__ == "__main__":
    main()
