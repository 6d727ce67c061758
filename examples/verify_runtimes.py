"""The ONNX student of a run folder against its PyTorch student, in several versions of ONNX Runtime.

    pip install --no-deps --target ort-1.25 onnxruntime==1.25.0
    python examples/verify_runtimes.py tiny=run --runtime ort-1.25 --runtime ort-1.30 --json out.json

Each --runtime is a folder that an onnxruntime was installed into, or a Python interpreter that has one beside this
package; the onnxruntime of this interpreter comes first. Logits may be 1e-4 from the student's in float64, or twice as
far as its own in float32 where that is more; greedy tokens must be equal to those of float32, of all
prompts as one batch and of the first alone. A runtime older than the profile needs must refuse the model with a typed
error instead. Exits with 1 when something differs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tcal_compiler.errors import ExportError
from tcal_compiler.passes.make_stateful import make_stateful
from tcal_compiler.passes.stateful_graph import StatefulGraph
from tcal_compiler.run_models import student_program
from tcal_compiler.runtime import data
from tcal_compiler.runtime.onnx_export import LOWERINGS, version_of
from tcal_compiler.runtime.onnx_parity import TorchLogits, session_logits, torch_logits
from tcal_compiler.runtime.run_folder import RunFolder
from tcal_compiler.runtime.session import OnnxSession
from tcal_compiler.variants import TEXT, model_file, run_tokenizer

TIMES = 2  # as far from float64 as PyTorch's float32 is


def torch_greedy(stateful: StatefulGraph, prompts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Greedy continuations [B, count] of prompts [B, T], and by how much each token's logit beat the next one's."""
    new, mask, state = prompts, torch.ones_like(prompts), stateful.empty_state(len(prompts))
    tokens, margins = [], []
    with torch.no_grad():
        for _ in range(count):
            logits, *present = stateful.gm(new, mask, *state)
            best = logits[:, -1].topk(2)
            new, mask = best.indices[:, :1], torch.nn.functional.pad(mask, (0, 1), value=1)
            tokens.append(new)
            margins.append(best.values[:, :1] - best.values[:, 1:])
            state = tuple(present)
    return torch.cat(tokens, 1), torch.cat(margins, 1)


def in_runtime(model: Path, request: Path, answer: Path) -> None:
    """The part of a child process: what this interpreter's onnxruntime gives, into a file."""
    import onnxruntime

    asked = np.load(request)
    found: dict[str, Any] = {"version": onnxruntime.__version__, "error": ""}
    try:
        session = OnnxSession(model, threads=1)
        for name in (n for n in asked.files if n.startswith("chunks")):
            found[name] = session_logits(session, torch.from_numpy(asked["ids"]), asked[name].tolist()).numpy()
        prompts, count = asked["prompts"].tolist(), int(asked["count"])
        found["tokens"] = np.array(session.generate_batch(prompts, count))
        session.reset()
        found["alone"] = np.array(list(session.generate(prompts[0], count)))
    except ExportError as e:
        found["error"] = f"{e.what}; {e.hint}".replace(str(model), model.name)
    np.savez(answer, **found)


def call(runtime: str | None, model: Path, request: Path, answer: Path) -> dict[str, Any]:
    """in_runtime in a process of its own."""
    interpreter, env = sys.executable, dict(os.environ)
    if runtime is not None and Path(runtime).is_dir():
        env["PYTHONPATH"] = os.pathsep.join([str(Path(runtime).resolve()), *filter(None, [env.get("PYTHONPATH")])])
    elif runtime is not None:
        interpreter = runtime
    subprocess.run([interpreter, __file__, "--child", str(model), str(request), str(answer)], check=True, env=env)
    return dict(np.load(answer))


def compare(found: dict[str, Any], logits: TorchLogits, tokens: Tensor, profile: str) -> dict[str, Any]:
    """One runtime's row: largest logit errors, tokens that differ, and whether all is within the bounds."""
    row: dict[str, Any] = {"onnxruntime": str(found["version"])}
    if found["error"].item():
        error, needed = str(found["error"]), LOWERINGS[profile].runtime
        refused = version_of(str(found["version"])) < needed and f"or newer for profile {profile}" in error
        return row | {"error": error, "passed": refused}
    exact = logits.exact.numpy()
    errors = [float(np.abs(found[f"chunks_{i}"] - exact).max()) for i in range(len(logits.by_chunks))]
    wrong = int((found["tokens"] != tokens.numpy()).sum()) + int((found["alone"] != tokens[0].numpy()).sum())
    passed = max(errors) <= logits.allowed(TIMES) and wrong == 0
    return row | {"logit_error": max(errors), "tokens_that_differ": wrong, "passed": passed}


def verify(path: Path, runtimes: list[str], prompts: int, prompt_length: int, count: int) -> Iterator[dict[str, Any]]:
    """What is known of a run's student, with one more runtime each time."""
    with RunFolder.open_existing(path) as run, tempfile.TemporaryDirectory() as work:
        stateful = make_stateful(student_program(run), verify=False)  # the export verified it
        tokenizer = run_tokenizer(run)
        ids = data.text_rows(TEXT, tokenizer, sequences=prompts, length=prompt_length)
        logits = torch_logits(stateful)
        tokens, margins = torch_greedy(stateful, ids, count)
        request, answer = Path(work, "request.npz"), Path(work, "answer.npz")
        chunks = {f"chunks_{i}": np.array(c) for i, c in enumerate(logits.by_chunks)}
        np.savez(request, ids=logits.ids.numpy(), prompts=ids.numpy(), count=np.array(count), **chunks)  # type: ignore[arg-type]
        converted = [layer.kind for layer in stateful.layers].count("gdn")
        profile = run.record("export").evidence["profile"]
        rows: list[dict[str, Any]] = []
        found = {
            "layers_kept": stateful.depth - converted,
            "layers_converted": converted,
            "profile": profile,
            "float32_from_float64": logits.noise,
            "allowed": logits.allowed(TIMES),
            "prompts": prompts,
            "tokens": tokens.numel() + count,
            "distinct_tokens": len(tokens.unique()),
            "smallest_margin": margins.min().item(),
            "runtimes": rows,
        }
        for runtime in (None, *runtimes):
            start = time.perf_counter()
            answered = call(runtime, run.path / model_file(), request, answer)
            rows.append(compare(answered, logits, tokens, profile))
            rows[-1]["seconds"] = round(time.perf_counter() - start, 1)
            print(path.name, rows[-1], flush=True)
            yield found


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return in_runtime(*map(Path, sys.argv[2:]))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", nargs="+", metavar="NAME=RUN")
    p.add_argument("--runtime", action="append", default=[], help="folder of an onnxruntime, or an interpreter")
    p.add_argument("--prompts", type=int, default=8, help="from the held-out text that ships")
    p.add_argument("--prompt-length", type=int, default=16)
    p.add_argument("--new-tokens", type=int, default=256)
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    where = {"machine": platform.machine(), "torch": torch.__version__, "threads": 1, "commit": commit}
    found = {}
    for name, path in (item.split("=", 1) for item in args.run):
        for student in verify(Path(path), args.runtime, args.prompts, args.prompt_length, args.new_tokens):
            found[name] = student
            if args.json:
                args.json.write_text(json.dumps({"environment": where, "runtime_parity": found}, indent=1) + "\n")
    sys.exit(not all(row["passed"] for student in found.values() for row in student["runtimes"]))


if __name__ == "__main__":
    main()
