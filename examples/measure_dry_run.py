"""What tcal-compile --dry-run says against what is then measured: time, CPU time and peak memory of each stage.

python examples/measure_dry_run.py --model "embedded: embedded --calib-sequences 16 --align-steps 40" \
    --json docs/results/dry-run.json

With --memory, what tcal inspect --memory says of the configuration alone, against the peak memory of the same stages
and of tcal generate; the words then need --distill-steps for distillation to be measured.

Each model's dry run and conversion run one after the other, each in a process of its own. Other work on the machine
between the two shows in the times, less in CPU times; --repeat 3 does both three times in turn and gives medians.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

COLUMNS = ("seconds", "cpu_seconds", "peak_bytes")


def convert_measured(words: list[str], out: Path, found: Path) -> None:
    """tcal-compile with every stage metered; writes {stage: {seconds, cpu_seconds, peak_bytes}}."""
    from tcal_compiler import cli

    cli.prepare_process()  # before torch is imported, as in the command: its threads wait otherwise than by default
    from tcal_compiler import api, source
    from tcal_compiler.conversion import Conversion
    from tcal_compiler.runtime.meter import Meter

    measured: dict[str, dict[str, float]] = {}

    def metered(stage: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with Meter() as m:
                result = work(*args, **kwargs)
            measured[stage] = dict(zip(COLUMNS, (m.time.seconds, m.time.cpu_seconds, m.peak), strict=True))
            return result

        return run

    source.load_teacher = metered("teacher", source.load_teacher)
    source.capture_teacher = metered("capture", source.capture_teacher)
    api.prepare = metered("load", api.prepare)
    api.write_report = metered("report", api.write_report)
    for stage in api.STAGES:
        setattr(Conversion, stage, metered(stage, getattr(Conversion, stage)))
    sys.argv = ["tcal-compile", *words, "-o", str(out), "--quiet"]
    with contextlib.suppress(SystemExit):
        cli.compile_main()
    if set(measured) != {"teacher", "capture", "load", *api.STAGES, "report"}:
        raise SystemExit(f"the conversion ended after {list(measured)}")
    found.write_text(json.dumps(measured))


def estimate(words: list[str]) -> dict[str, Any]:
    code = "from tcal_compiler.cli import compile_main; compile_main()"
    command = [sys.executable, "-c", code, *words, "--dry-run", "--json", "--quiet"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(words: list[str], place: Path) -> dict[str, dict[str, float]]:
    """Converts into place/run, unless that was done; by stage, see convert_measured."""
    found = place / "found.json"
    if not found.is_file():
        child = [sys.executable, __file__, "--convert", str(found), "--", *words]
        subprocess.run(child, check=True, stdout=subprocess.DEVNULL)  # errors are seen
    measured: dict[str, dict[str, float]] = json.loads(found.read_text())
    return measured


def whole(measured: dict[str, dict[str, float]], run: Path) -> dict[str, float]:
    """Of all stages together."""
    files = sum(f.stat().st_size for f in run.rglob("*") if f.is_file())
    seconds, cpu = (sum(s[c] for s in measured.values()) for c in COLUMNS[:2])
    peak = max(s["peak_bytes"] for s in measured.values())
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak, "file_bytes": files}


def generating(run: Path) -> int:
    """Largest resident memory in bytes of a process that generates with the run's ONNX student."""
    code = "from tcal_compiler.cli import main; main()"
    child = subprocess.Popen([sys.executable, "-c", code, "generate", str(run), "The old man"], stdout=subprocess.PIPE)
    _, status, used = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"tcal generate ended with {status}")
    return used.ru_maxrss * 1024


def environment() -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    packages = {n: version(n) for n in ("torch", "transformers", "onnx", "onnxruntime")}
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    machine = {"machine": f"{platform.machine()}, {os.cpu_count()} CPUs", "threads": threads}
    return {"python": platform.python_version(), **packages, **machine, "commit": commit}


def compared(words: list[str], place: Path) -> dict[str, Any]:
    said, seen = estimate(words), measure(words, place)
    del seen["teacher"], seen["capture"]  # parts of load
    seen["in all"] = whole(seen, place / "run")
    rows = {r["stage"]: r for r in [*said["stages"], said["total"]]}
    stages = {
        name: {c: [round(rows[name][c], 3), round(value, 3)] for c, value in found.items()}
        for name, found in seen.items()
    }
    return {"command": command(words), "stages": stages, "dry_run_seconds": said["dry_run"]["seconds"]}


def compared_memory(words: list[str], place: Path) -> dict[str, Any]:
    """Peak memory of each stage: said from the configuration alone, and measured."""
    pairs = dict(zip(words[1::2], words[2::2], strict=True))
    known = ("--policy", "--calib-sequences", "--calib-length", "--batch", "--config")
    options = [w for name in known if name in pairs for w in (name, pairs[name])]
    code = "from tcal_compiler.cli import main; main()"
    child = [sys.executable, "-c", code, "inspect", words[0], *options, "--memory", "--json"]
    said = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
    seen = {name: found["peak_bytes"] for name, found in measure(words, place).items()}
    seen |= {"load": seen["teacher"], "generate": generating(place / "run")}
    if "--distill-steps" not in pairs:
        del seen["distill"]
    rows = {r["stage"]: r["peak_bytes"] for r in said["stages"]}
    stages = {name: {"peak_bytes": [said, seen[name]]} for name, said in rows.items() if name in seen}
    return {"command": command(words), "parameters": said["parameters"], "stages": stages}


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each figure over the runs of `compared` or `compared_memory`."""

    def middle(stage: str, column: str) -> list[float]:
        pairs = [r["stages"][stage][column] for r in runs]
        return [median(p[side] for p in pairs) for side in (0, 1)]

    stages = {stage: {column: middle(stage, column) for column in row} for stage, row in runs[0]["stages"].items()}
    took = {k: median(r[k] for r in runs) for k in ("dry_run_seconds",) if k in runs[0]}
    return runs[0] | {"stages": stages} | took


def command(words: list[str]) -> str:
    return shlex.join(["tcal-compile", *(Path(w).name for w in words)])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", action="append", default=[], metavar="NAME: WORDS", help="of tcal-compile, without -o")
    p.add_argument("--memory", action="store_true", help="tcal inspect --memory in place of the dry run")
    p.add_argument("--repeat", type=int, default=1, help="dry run and conversion in turn; medians are given")
    p.add_argument("--keep", type=Path, help="folder in which the runs stay; one that is there is not made again")
    p.add_argument("--json", type=Path)
    p.add_argument("--convert", type=Path, help=argparse.SUPPRESS)
    p.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.convert:
        convert_measured(args.words, args.convert.with_name("run"), args.convert)
        return
    kind, compare = ("memory", compared_memory) if args.memory else ("dry_runs", compared)
    body: dict[str, Any] = {"environment": environment(), kind: {}}
    for model in args.model:
        name, words = model.split(":", 1)
        runs = []
        for number in range(args.repeat):
            with tempfile.TemporaryDirectory(prefix="tcal-dry-run-") as place:
                folder = (args.keep or Path(place)) / (f"{name}-{number}" if number else name)
                folder.mkdir(parents=True, exist_ok=True)
                runs.append(compare(shlex.split(words), folder))
        body[kind][name] = medians(runs) if args.repeat > 1 else runs[0]
        body["repeat"] = args.repeat
        for stage, row in body[kind][name]["stages"].items():
            print(name, stage, {c: f"{a:.4g} said, {b:.4g} seen" for c, (a, b) in row.items()}, flush=True)
    if args.json:
        args.json.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
