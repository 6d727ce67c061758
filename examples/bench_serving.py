"""Students and teachers side by side as they are served: prefill and decode speed, peak memory, bytes of state.

    python examples/bench_serving.py --onnx teacher=run-all --onnx hybrid=run --torch teacher=smollm2 \
        --llama teacher=smollm2.gguf --dtypes fp32 int8 --contexts 128 1024 8192 32768 --batches 1 8 --json out.json

--onnx NAME=RUN is a run folder, in ONNX Runtime; --torch NAME=PATH a transformers folder or a GGUF file, whose weights
are widened, in PyTorch with its KV cache; --llama NAME=FILE a GGUF file, in llama.cpp (package xllamacpp). Everything
runs on --threads threads, every row in a process of its own, whose peak memory is given. The state behind a context is
filled with one small number, because neither time depends on the values; decode is the median of single-token steps,
prefill the time of one chunk whose last token is the context's last. llama.cpp cannot be given a state: it prefills the
whole context, so its prefill figure is an average over it; it has one row only, and is left out beyond --llama-longest.
With --llama-slots FOLDER what it remembers behind a context is saved there, and restored where it is there already, so
that decode can be measured later; then no prefill is given. Beyond an ONNX student's own context its rotary tables are
repeated, and a GGUF file's is raised in a copy. A state of more than --most-state-gb is not tried.
Beside a decode step of an ONNX student stands the least time in which one thread reads the bytes that it needs, at the
speed that is measured behind it: all weights but embedding tables, caches of the context, recurrent states both ways.
--pages huge lets glibc ask for memory in pages of 2 MB.

--provider CUDAExecutionProvider measures on a GPU, with onnxruntime-gpu: students and teachers of profile cuda as they
were exported, and --torch in float16. State and logits stay there, peak memory is what the whole card holds, CUDA's own
included, and the bound is that of the card's memory. Several tokens behind others are read row by row, since ONNX
Runtime's attention takes them for one row only.

Rows are added to those that --json holds already, or replace them: a table can be measured
in pieces, all on one machine with the same settings; the commits of all pieces are noted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from bench_onnx import with_positions
from bench_variants import read_bandwidth, weight_bytes

from tcal_compiler.errors import DataError
from tcal_compiler.runtime.quantize import WEIGHT_TYPES, quantize
from tcal_compiler.runtime.session import OnnxSession
from tcal_compiler.runtime.speed import FILL, decode_seconds, go_behind, prefill_seconds
from tcal_compiler.runtime.teacher import load_teacher

ROOM = 8  # positions behind the context, at least, for warming up
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # read when a process starts


def timed(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def onnx_row(job: dict[str, Any]) -> dict[str, Any]:
    session = OnnxSession(job["path"], threads=job["threads"])
    batch, context, chunk = job["batch"], job["context"], min(job["chunk"], job["context"])
    check_room(job, sum(math.prod(s) for s in session.state_shapes(context)) * batch * 4)
    prefill = prefill_seconds(session, context, chunk=chunk, batch=batch)
    go_behind(session, context, batch=batch)
    state, moved = session.state_bytes, weight_bytes(Path(job["path"]) / "model.onnx") + session.step_bytes
    step = decode_seconds(session, steps=job["steps"], batch=batch)
    row = measured(job, prefill, chunk, step) | {"state_mb": state / 1e6, "moved_mb": moved / 1e6}
    speed = read_bandwidth()
    return row | {"read_gb_s": speed / 1e9, "bound_ms": 1e3 * moved / speed, "share_of_bound": moved / speed / step}


def device_row(job: dict[str, Any]) -> dict[str, Any]:
    from device_session import CUDA, DeviceSession

    folder, batch, context, chunk = Path(job["path"]), job["batch"], job["context"], min(job["chunk"], job["context"])
    session = DeviceSession(folder, job["provider"], capacity=context + job["steps"] + ROOM)
    state = session.bytes_behind(batch, context)
    check_room(job, state)
    rows = batch if chunk == context else 1
    tokens, prefills = np.ones((rows, chunk), np.int64), []
    for _ in range(2):
        session.reset(batch=rows, behind=context - chunk, fill=FILL)
        prefills.append(timed(lambda: session.forward(tokens)))
    session.reset(batch=batch, behind=context, fill=FILL)
    token = np.ones((batch, 1), np.int64)
    steps = [timed(lambda: session.forward(token)) for _ in range(job["steps"] + 1)][1:]
    step = statistics.median(steps)
    moved = weight_bytes(folder / "model.onnx") + session.bytes_behind(batch, context, recurrent=2)
    row = measured(job, prefills[1] * batch / rows, chunk, step) | {"state_mb": state / 1e6, "moved_mb": moved / 1e6}
    speed = job["card_reads"] if job["provider"] == CUDA else read_bandwidth()
    return row | {"read_gb_s": speed / 1e9, "bound_ms": 1e3 * moved / speed, "share_of_bound": moved / speed / step}


def card_row(job: dict[str, Any]) -> dict[str, Any]:
    """Name and UUID of the card that CUDA gives, and the bytes a second in copies of 2 GB, the best of ten."""
    import torch

    block, best = torch.ones(1 << 29, device="cuda"), 0.0
    target = torch.empty_like(block)

    def copy() -> None:
        target.copy_(block)
        torch.cuda.synchronize()

    for _ in range(10):
        best = max(best, 2 * block.nbytes / timed(copy))
    card = torch.cuda.get_device_properties()
    return {"device": card.name, "card": f"GPU-{card.uuid}", "reads": best}


def check_room(job: dict[str, Any], state: int) -> None:
    """Raises DataError for a state that is not to be tried."""
    if state > job["most_state_gb"] * 1e9:
        raise DataError("state", f"would take {state / 1e9:.1f} GB", "more --most-state-gb")


def torch_row(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import DynamicCache

    torch.set_num_threads(job["threads"])
    device, dtype = ("cuda", torch.float16) if job["card"] else ("cpu", torch.float32)
    model: Any = load_teacher(job["path"]).module
    for weight in model.to(device).parameters():  # and no buffers, which from_pretrained leaves in float32 too
        weight.data = weight.data.to(dtype)
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    batch, context, chunk = job["batch"], job["context"], min(job["chunk"], job["context"])
    state = 2 * config.num_hidden_layers * batch * config.num_key_value_heads * context * width * dtype.itemsize
    check_room(job, state)

    def cache(length: int) -> DynamicCache:
        made, shape = DynamicCache(), (batch, config.num_key_value_heads, length, width)
        for layer in range(config.num_hidden_layers if length else 0):
            made.update(*(torch.full(shape, FILL, dtype=dtype, device=device) for _ in range(2)), layer)
        return made

    def feed(past: DynamicCache, count: int) -> None:
        ids = torch.ones(batch, count, dtype=torch.long, device=device)
        model(input_ids=ids, past_key_values=past, use_cache=True)
        if job["card"]:
            torch.cuda.synchronize()

    with torch.no_grad():
        prefills = []
        for _ in range(2):
            past = cache(context - chunk)
            prefills.append(timed(lambda past=past: feed(past, chunk)))
            del past
        past = cache(context)
        steps = [timed(lambda: feed(past, 1)) for _ in range(job["steps"] + 1)][1:]
    return measured(job, prefills[1], chunk, statistics.median(steps)) | {"state_mb": state / 1e6}


def llama_row(job: dict[str, Any]) -> dict[str, Any]:
    import xllamacpp

    params, context, slots = xllamacpp.CommonParams(), job["context"], job["llama_slots"]
    params.model.path, params.n_ctx, params.n_parallel = job["path"], context + job["steps"] + ROOM, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
    params.slot_save_path = slots and f"{slots}/"
    server = xllamacpp.Server(params)
    name = f"{Path(job['path']).stem}-{context}.slot"
    known = bool(slots) and Path(slots, name).is_file()
    if known:
        llama_slot(server, "restore", name)
    ids = [100 + i % 1000 for i in range(context)]
    asked = {"prompt": ids, "n_predict": job["steps"], "temperature": 0, "ignore_eos": True, "id_slot": 0}
    answer = server.handle_completions(asked)
    found = answer.get("timings") or sys.exit(json.dumps(answer))
    assert (found["prompt_n"], found["cache_n"]) == ((1, context - 1) if known else (context, 0)), found
    if slots and not known:
        llama_slot(server, "save", name)
    step = found["predicted_ms"] / found["predicted_n"] / 1e3
    row = measured(job, found["prompt_ms"] / 1e3, context, step)
    return {k: v for k, v in row.items() if not (known and k == "prefill_tokens_per_s")}


def llama_slot(server: Any, action: str, name: str) -> None:
    """Saves or restores what llama.cpp remembers; the name is within its folder of slots."""
    url, body = f"{server.listening_address}/slots/0?action={action}", json.dumps({"filename": name}).encode()
    with urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": "application/json"})) as answer:
        assert answer.status == 200, answer.read()


def gguf_for_contexts(source: Path, folder: Path, positions: int) -> Path:
    """The GGUF file, or a copy that says that it takes so many positions: llama.cpp takes no more than it says."""
    import gguf

    field = "{}.context_length".format(gguf.GGUFReader(source).get_field("general.architecture").contents())
    if gguf.GGUFReader(source).get_field(field).contents() >= positions:
        return source
    folder.mkdir()
    copy = Path(shutil.copyfile(source, folder / source.name))
    told = gguf.GGUFReader(copy, "r+").get_field(field)
    told.parts[told.data[0]][0] = positions
    return copy


def measured(job: dict[str, Any], prefill: float, chunk: int, step: float) -> dict[str, Any]:
    batch = job["batch"]
    return {
        "prefill_tokens_per_s": batch * chunk / prefill,
        "decode_ms": 1e3 * step,
        "decode_tokens_per_s": batch / step,
        "peak_mb": card_mb(job["card"]) if job["card"] else process_mb(),
    }


def process_mb() -> float:
    """The peak of this program; getrusage would count what its parent held when it started it."""
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return float(peak.split()[1]) * 1.024e-3


def card_mb(card: str) -> float:
    """What a card holds now, other processes included: neither runtime gives memory back while it runs."""
    asked = ["nvidia-smi", f"--id={card}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return float(subprocess.run(asked, capture_output=True, text=True, check=True).stdout) * 1.048576


KINDS = {"onnx": onnx_row, "torch": torch_row, "llama": llama_row}
CHILDREN = KINDS | {"device": device_row, "card": card_row}


def in_child(job: dict[str, Any]) -> dict[str, Any]:
    """A row from a process of its own; what stopped it, where there is none."""
    env = dict(os.environ) | {"OMP_NUM_THREADS": str(job["threads"])} | (HUGE_PAGES if job["huge_pages"] else {})
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(job)], capture_output=True, text=True, env=env
    )
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        return dict(json.loads(lines[-1]))
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return {"error": last[:200]}


def for_contexts(source: Path, target: Path, dtype: str, positions: int) -> Path:
    """The ONNX student of another weight type and for at least so many positions, in a folder of its own."""
    target.mkdir()
    if dtype == "fp32":
        shutil.copyfile(source / "model.onnx", target / "model.onnx")
    else:
        quantize(source / "model.onnx", target, dtype)  # type: ignore[arg-type]
    shutil.copyfile(source / "genai_config.json", target / "genai_config.json")
    with_positions(target, positions)
    return target


def jobs(args: argparse.Namespace, work: Path, card: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """What to measure, on a card where there is one.

    Models take turns within a context, so that a machine whose speed drifts treats them alike.
    """
    models = []
    positions = max(args.contexts) + args.steps + ROOM
    for name, path in (item.split("=", 1) for item in args.onnx):
        for dtype in args.dtypes:
            folder = for_contexts(Path(path) / "onnx", work / f"{name}-{dtype}", dtype, positions)
            known = ("onnx", f"{name} {dtype}") if args.provider is None else ("device", name)
            models.append((f"{known[1]}, ONNX Runtime", known[0], str(folder)))
    models += [(f"{name}, PyTorch", "torch", path) for name, path in (item.split("=", 1) for item in args.torch)]
    for name, path in (item.split("=", 1) for item in args.llama):
        file = gguf_for_contexts(Path(path), work / f"{name}-gguf", positions)
        models.append((f"{name}, llama.cpp", "llama", str(file)))
    common = {k: getattr(args, k) for k in ("steps", "chunk", "threads", "most_state_gb", "provider", "llama_slots")}
    common |= {"card": card and card["card"], "card_reads": card and card["reads"]}
    pages = {"normal": (False,), "huge": (True,), "both": (False, True)}[args.pages]
    rows = [
        common
        | {"name": name + ", huge pages" * huge, "kind": kind, "path": path, "context": context, "batch": batch}
        | {"huge_pages": huge}
        for context in args.contexts
        for batch in args.batches
        for name, kind, path in models
        for huge in pages
    ]
    return [r for r in rows if r["kind"] != "llama" or (r["batch"] == 1 and r["context"] <= args.llama_longest)]


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in KINDS:
        p.add_argument(f"--{kind}", action="append", default=[], metavar="NAME=PATH")
    p.add_argument("--dtypes", nargs="+", default=["fp32"], choices=["fp32", *WEIGHT_TYPES], help="of --onnx")
    p.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 8192, 32768])
    p.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    p.add_argument("--steps", type=int, default=15)
    p.add_argument("--chunk", type=int, default=128, help="tokens of a row in the prefill that is timed")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--pages", choices=["normal", "huge", "both"], default="normal")
    p.add_argument("--most-state-gb", type=float, default=4.0)
    p.add_argument("--llama-longest", type=int, default=8192)
    p.add_argument("--llama-slots", help="folder of what llama.cpp remembers behind a context, to go on from")
    p.add_argument("--provider", help="of ONNX Runtime: where students of profile cuda run; default: our CPU sessions")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    if args.provider and (args.dtypes != ["fp32"] or args.llama):
        p.error("--provider measures neither smaller variants nor --llama")
    return args


def the_card() -> dict[str, Any]:
    """Ends the program where there is none."""
    found = in_child({"kind": "card", "threads": 1, "huge_pages": False})
    return found if "error" not in found else sys.exit(f"no card to measure on: {found['error']}")


def continued(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A table of an earlier call, to go on with. Ends the program when its rows were measured otherwise."""
    old, new = ({k: b[k] for k in ("steps", "chunk")} | b["environment"] for b in (before, now))
    if differing := [k for k, v in new.items() if k != "commit" and old.get(k) != v]:
        raise SystemExit(f"--json holds rows of other {', '.join(differing)}: name another file")
    commits = old["commit"] if new["commit"] in old["commit"] else f"{old['commit']}, {new['commit']}"
    return before | {"environment": before["environment"] | {"commit": commits}}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        job = json.loads(sys.argv[2])
        print(json.dumps(CHILDREN[job["kind"]](job)))
        return
    args = options()
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    commit = os.environ.get("TCAL_COMMIT", head)  # set it for a copy of the tree without its history
    where = {"machine": platform.machine(), "onnxruntime": onnxruntime.__version__, "threads": args.threads}
    card = the_card() if args.provider == "CUDAExecutionProvider" else None
    where |= {"provider": args.provider, "device": card["device"]} if card else {}
    body = {"environment": where | {"commit": commit}, "steps": args.steps, "chunk": args.chunk, "serving": []}
    if args.json and args.json.is_file():
        body = continued(json.loads(args.json.read_text(encoding="utf-8")), body)
    with tempfile.TemporaryDirectory() as work:
        for job in jobs(args, Path(work), card):
            row = in_child(job)
            key = {k: job[k] for k in ("name", "context", "batch")}
            body["serving"] = [r for r in body["serving"] if any(r[k] != v for k, v in key.items())] + [key | row]
            shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            print(f"context {job['context']:6} batch {job['batch']:2} {job['name']:28} {shown}", flush=True)
            if args.json:
                args.json.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
