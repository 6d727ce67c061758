"""How long planning takes: from a teacher's file to its plan, and `tcal inspect --memory` of large configurations.

python examples/time_planning.py --teacher "SmolLM2-135M=SmolLM2-135M-Instruct.Q4_1.gguf" --sizes 1.5B --sizes 8B \
    --json docs/results/planning.json

Each measurement is a process of its own; --repeat 3 gives medians. --sizes makes config.json alone, without weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from measure_dry_run import environment

_QWEN2: dict[str, Any] = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 8}
_LLAMA: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 8}
SIZES: dict[str, dict[str, Any]] = {  # of Qwen2.5-1.5B, Llama-3-8B and Qwen2.5-32B
    "1.5B": _QWEN2
    | {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
    | {"num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True, "dtype": "bfloat16"},
    "8B": _LLAMA
    | {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "max_position_embeddings": 8192, "dtype": "bfloat16"},
    "32B": _QWEN2
    | {"vocab_size": 152064, "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64}
    | {"num_attention_heads": 40, "dtype": "bfloat16"},
}


def planned(spec: str) -> dict[str, float]:
    """Seconds of each part of planning, in this process, libraries loaded before."""
    import transformers.modeling_utils  # noqa: F401

    from tcal_compiler.config import DEFAULT_POLICY
    from tcal_compiler.passes.choose import choose
    from tcal_compiler.passes.find_attention import find_attention
    from tcal_compiler.runtime.capture_teacher import capture_teacher
    from tcal_compiler.runtime.teacher import load_teacher

    marks = [perf_counter()]

    def mark(value: Any) -> Any:
        marks.append(perf_counter())
        return value

    teacher = mark(load_teacher(spec))
    capture = mark(capture_teacher(teacher))
    scan = mark(find_attention(capture))
    mark(choose(scan, DEFAULT_POLICY))
    names = ("load", "capture", "match", "plan")
    return dict(zip(names, (b - a for a, b in pairwise(marks)), strict=True))


def child(*words: str) -> str:
    """What this script prints in a process of its own."""
    command = [sys.executable, __file__, *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def inspected(size: str) -> dict[str, float]:
    """`tcal inspect --memory`, the start of the process included: billions of weights, seconds."""
    code = "from tcal_compiler.cli import main; main()"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SIZES[size]))
        start = perf_counter()
        command = [sys.executable, "-c", code, "inspect", folder, "--memory", "--json"]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        seconds = perf_counter() - start
    return {"billions": round(json.loads(out)["parameters"] / 1e9, 2), "seconds": seconds}


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {k: round(median(r[k] for r in runs), 2) for k in runs[0]}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--teacher", action="append", default=[], metavar="NAME=TEACHER")
    p.add_argument("--sizes", action="append", default=[], choices=list(SIZES))
    p.add_argument("--repeat", type=int, default=1)
    p.add_argument("--json", type=Path)
    p.add_argument("--one", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one:
        print(json.dumps(planned(args.one)))
        return
    body: dict[str, Any] = {"environment": environment(), "repeat": args.repeat, "planning": {}, "inspect_memory": {}}
    for name, spec in (item.split("=", 1) for item in args.teacher):
        body["planning"][name] = medians([json.loads(child("--one", spec)) for _ in range(args.repeat)])
        print(name, body["planning"][name], flush=True)
    for size in args.sizes:
        body["inspect_memory"][size] = medians([inspected(size) for _ in range(args.repeat)])
        print(size, body["inspect_memory"][size], flush=True)
    if args.json:
        args.json.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
