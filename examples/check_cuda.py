"""The student of profile cuda in ONNX Runtime on a GPU: where its nodes run, its KL to the float32 student, its greedy
tokens beside that one's, its speed.

    python examples/check_cuda.py run-cuda --against run --json out.json
    python examples/check_cuda.py run-cuda --against run --provider CPUExecutionProvider    # tries the script itself

Both are run folders of one student, exported with --profile cuda and with --profile ort. Needs onnxruntime-gpu in place
of onnxruntime, with the CUDA that its page names. State stays on the device. The float32 student runs on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from bench_variants import text_ids
from device_session import CUDA, DeviceSession
from numpy.typing import NDArray

from tcal_compiler.runtime.session import OnnxSession
from tcal_compiler.variants import TEXT


def log_probabilities(logits: NDArray[Any]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def divergence(device: DeviceSession, exact: OnnxSession, ids: NDArray[np.int64]) -> float:
    """Mean KL(float32 || device) in nats per token: the first half of each sequence at once, then token by token."""
    values = []
    for row in ids:
        cuts = [len(row) // 2, *range(len(row) // 2 + 1, len(row))]
        device.reset()
        exact.reset()
        for part in np.split(row, cuts):
            p, q = (
                log_probabilities(exact.forward(part[None])[0]),
                log_probabilities(device.forward(part[None]).numpy()[0]),
            )
            values += list((np.exp(p) * (p - q)).sum(-1))
    return float(np.mean(values))


def greedy(device: DeviceSession, exact: OnnxSession, prompts: NDArray[np.int64], count: int) -> dict[str, Any]:
    """Greedy tokens behind each prompt, and how many are the float32 student's up to the first that is not; by how much
    the float32 logits of two tokens that part differ, at most."""
    same, margins = 0, []
    for prompt in prompts:
        device.reset()
        exact.reset()
        fed = prompt
        for _ in range(count):
            logits = exact.forward(fed[None])[0, -1]
            token = int(device.forward(fed[None]).numpy()[0, -1].argmax())
            if token != (best := int(logits.argmax())):
                margins.append(float(logits[best] - logits[token]))
                break
            fed, same = np.array([token]), same + 1
    return {"prompts": len(prompts), "tokens": len(prompts) * count, "same": same, "margin": max(margins, default=0.0)}


def speeds(device: DeviceSession, context: int, steps: int) -> dict[str, float]:
    """Seconds of a prefill and the median of single-token steps behind it; both after one that warms up."""
    ids = np.arange(context, dtype=np.int64) % 100
    for _ in range(2):
        device.reset()
        start = time.perf_counter()
        device.forward(ids[None])
        prefill = time.perf_counter() - start
    times = []
    for _ in range(steps + 3):
        start = time.perf_counter()
        device.forward(ids[None, :1])
        times.append(time.perf_counter() - start)
    step = statistics.median(times[3:])
    return {"prefill_tokens_per_s": context / prefill, "decode_ms": 1e3 * step, "decode_tokens_per_s": 1 / step}


def placement(folder: Path, provider: str) -> dict[str, dict[str, int]]:
    """Provider -> operator -> number of nodes that it runs in one step."""
    with tempfile.TemporaryDirectory() as work:
        device = DeviceSession(folder, provider, profile_prefix=f"{work}/profile")
        device.forward(np.array([[1]], np.int64))
        events = json.loads(Path(device.session.end_profiling()).read_text(encoding="utf-8"))
    nodes = [e["args"] for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    where: dict[str, Counter[str]] = {}
    for a in nodes:
        where.setdefault(a["provider"], Counter())[a["op_name"]] += 1
    return {name: dict(ops.most_common()) for name, ops in where.items()}


def environment(provider: str) -> dict[str, str]:
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    found = {"machine": platform.machine(), "commit": os.environ.get("TCAL_COMMIT", head)}
    if provider == CUDA:
        import torch

        found |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path)
    p.add_argument("--against", type=Path, required=True)
    p.add_argument("--provider", default=CUDA)
    p.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 4096])
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--sequences", type=int, default=4)
    p.add_argument("--length", type=int, default=128)
    p.add_argument("--new-tokens", type=int, default=32, help="of each sequence, behind its first 16 tokens")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    folder, exact = args.run / "onnx", OnnxSession(args.against / "onnx")
    found: dict[str, Any] = {"environment": environment(args.provider), "onnxruntime": ort.__version__}
    found["provider"] = args.provider
    found["nodes"] = placement(folder, args.provider)
    device = DeviceSession(folder, args.provider)
    ids = text_ids(args.against / "onnx", TEXT, args.sequences, args.length)
    found["kl"], found["greedy"] = divergence(device, exact, ids), greedy(device, exact, ids[:, :16], args.new_tokens)
    found["contexts"] = {str(c): speeds(device, c, args.steps) for c in args.contexts}
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
