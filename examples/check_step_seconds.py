"""What a budget of decode time says of students, against their whole decode step in ONNX Runtime.

python examples/check_step_seconds.py RUN RUN ... --contexts 1024,4096,7900 --json docs/results/step-seconds.json

The runs are exported (profile ort) and of one teacher. Behind each context, --repeats times: the time of the cores by
runtime/step_seconds.py, and the median of whole steps. What a run's step takes beyond the first run's is then said by
both.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from measure_dry_run import environment

from tcal_compiler.passes.budget import total
from tcal_compiler.passes.types import AttentionSite, SiteScan
from tcal_compiler.runtime.session import OnnxSession
from tcal_compiler.runtime.speed import decode_seconds, go_behind
from tcal_compiler.runtime.step_seconds import step_seconds


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def recorded_sites(run: Path) -> SiteScan:
    """The sites that a run folder recorded, with the sizes that a step's time depends on."""
    rows = json.loads((run / "tcal.json").read_text())["stages"]["plan"]["evidence"]["sites"]
    decoder = json.loads((run / "onnx/genai_config.json").read_text())["model"]["decoder"]
    sites = []
    for r in rows:
        nodes = dict.fromkeys(("anchor", "q", "k", "v", "x", "y"), "")
        sizes = {"num_heads": r["heads"], "num_kv_heads": r["kv_heads"], "key_dim": r["head_dim"]}
        sizes |= {"value_dim": r["value_dim"], "hidden": decoder["hidden_size"]}
        facts = {n: r[n] for n in ("scale", "window", "rope")}
        sites.append(AttentionSite(index=r["layer"], layer=r["module"], proof=r["causal"], **nodes, **sizes, **facts))
    return SiteScan(tuple(sites), ())


def measured(runs: list[Path], tokens: int, steps: int, repeats: int) -> dict[str, Any]:
    """Milliseconds by run: of the cores as predicted, each time, and of whole steps."""
    scan = recorded_sites(runs[0])
    keeps = [json.loads((run / "tcal.json").read_text())["plan"]["keep"] for run in runs]
    costs = [step_seconds(scan, tokens) for _ in range(repeats)]
    found: dict[str, Any] = {}
    for run, keep in zip(runs, keeps, strict=True):
        session = OnnxSession(run / "onnx")
        times = []
        for _ in range(repeats):
            go_behind(session, tokens)
            times.append(1e3 * decode_seconds(session, steps=steps))
        found[run.name] = {
            "kept": len(keep),
            "cores_ms": [round(1e3 * total(c, keep), 3) for c in costs],
            "step_ms": [round(t, 3) for t in times],
        }
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", type=Path)
    p.add_argument("--contexts", type=numbers, default=[1024, 4096, 7900])
    p.add_argument("--steps", type=int, default=16)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    rows: dict[str, Any] = {}
    for tokens in args.contexts:
        rows[str(tokens)] = measured(args.runs, tokens, args.steps, args.repeats)
        first = next(iter(rows[str(tokens)].values()))
        for name, row in rows[str(tokens)].items():
            said, seen = (median(row[k]) - median(first[k]) for k in ("cores_ms", "step_ms"))
            print(f"{tokens} tokens, {name}: beyond the first {said:.2f} ms said, {seen:.2f} ms seen", flush=True)
    if args.json:
        body = {"environment": environment(), "step_seconds": rows, "steps": args.steps}
        args.json.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
