"""Times tcal::gated_delta_rule: correctness first, then medians beside what the hardware allows.

    python -m tcal_compiler.kernels.bench [--shapes B,T,H,D ...] [--dtype bfloat16] [--repeat 30] [--json FILE]

On a GPU: our kernels, their plain-PyTorch form, fla where it is installed, and bounds from bytes and operations for an
H100 or H200 (other cards: bytes and operations only). On a CPU: the chunked form and transformers'. Every time is a
median of one process with its quartiles; nothing is timed when a result is wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tcal_compiler.kernels.gated_delta_rule import dispatch, gated_delta_rule
from tcal_compiler.kernels.gated_delta_rule.chunked import gated_delta_rule_chunked
from tcal_compiler.kernels.gated_delta_rule.chunked_backward import gated_delta_rule_chunked_backward
from tcal_compiler.kernels.self_check import ALLOWED

SHAPES = {
    "cuda": (
        "8,2048,16,64 8,2048,16,128 2,8192,16,128 1,32768,16,128 1,65536,8,128 1,8192,32,64 32,512,9,64 "
        "64,1,16,128 256,1,32,128 1,1,16,128"
    ),
    "cpu": "1,2048,9,64 1,2048,16,128 1,1,9,64",
}
BANDWIDTH = {"H100": 3.0e12, "H200": 4.3e12}  # bytes a second, as copies on such cards moved them
RATE = 790e12  # dense bfloat16 operations a second, as large products on both ran
CHUNK = 64


def bounds(batch: int, tokens: int, heads: int, dim: int, size: int) -> dict[str, float]:
    """Least bytes and operations of the forward: q, k, v, o once, gates and states in float32; chunks of 64."""
    rows = batch * heads
    data = rows * tokens * (4 * dim * size + 8) + rows * 2 * 4 * dim * dim
    chunk = min(CHUNK, tokens)
    operations = rows * tokens * (10 * chunk * dim + 6 * dim * dim) if tokens > 1 else rows * 8 * dim * dim
    return {"bytes": float(data), "operations": float(operations)}


def make_inputs(batch: int, tokens: int, heads: int, dim: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    gen = torch.Generator(device).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=gen)

    q, k = (F.normalize(randn(batch, tokens, heads, dim), dim=-1).to(dtype) for _ in range(2))
    g, beta = -0.1 * F.softplus(randn(batch, tokens, heads)), randn(batch, tokens, heads).sigmoid()
    return [q, k, randn(batch, tokens, heads, dim).to(dtype), g, beta, randn(batch, heads, dim, dim)]


def median(run: Callable[[], Any], device: str, repeat: int) -> dict[str, float]:
    """Milliseconds: median and quartiles of `repeat` runs after three."""
    for _ in range(3):
        run()
    times = []
    if device == "cuda":
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeat)]
        for start, end in events:
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) for start, end in events]
    else:
        for _ in range(repeat):
            begin = time.perf_counter()
            run()
            times.append((time.perf_counter() - begin) * 1e3)
    low, middle, high = statistics.quantiles(times, n=4)
    return {"ms": middle, "low": low, "high": high}


def errors(inputs: list[Tensor], grads: list[Tensor], scale: float) -> dict[str, float]:
    """rms error over rms of outputs and gradients against float64, on at most 2 sequences of 300 tokens."""
    some = [x[:2, :300] for x in inputs[:5]] + [inputs[5][:2]]
    seeds = [grads[0][:2, :300], grads[1][:2]]
    actual = [*dispatch.forward(*some, scale=scale), *dispatch.backward(*seeds, *some, scale=scale)]
    exact_some, exact_seeds = ([x.double() for x in xs] for xs in (some, seeds))
    exact = [
        *gated_delta_rule_chunked(*exact_some, scale=scale),
        *gated_delta_rule_chunked_backward(*exact_seeds, *exact_some, scale=scale),
    ]
    pairs = zip(dispatch.NAMES, actual, exact, strict=True)
    return {n: ((x.double() - y).norm() / y.norm().clamp_min(1e-30)).item() for n, x, y in pairs}


Rule = Callable[..., tuple[Tensor, Any]]


def peers(device: str) -> Iterator[tuple[str, Rule]]:
    """Other implementations with (q, k, v, g, beta, state) -> (o, state), as far as they are installed."""
    if device == "cuda" and importlib.util.find_spec("fla"):
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        def fla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Any]:
            return chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True)

        yield "fla", fla
    if device == "cpu" and importlib.util.find_spec("transformers"):
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

        def hf(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Any]:
            return torch_chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True)

        yield "transformers", hf


def op(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Any]:
    return gated_delta_rule(q, k, v, g=g, beta=beta, initial_state=state)


def trained(rule: Rule, inputs: list[Tensor], grad: Tensor) -> Callable[[], None]:
    """One forward and backward."""
    leaves = [x.clone().requires_grad_() for x in inputs]

    def run() -> None:
        out, _ = rule(*leaves)
        torch.autograd.grad(out, leaves[:5], grad)

    return run


def time_shape(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, repeat: int) -> dict[str, Any]:
    inputs = make_inputs(*shape, dtype, device)
    grad, scale = torch.randn_like(inputs[2]), shape[3] ** -0.5
    found = errors(inputs, [grad, torch.randn_like(inputs[5])], scale)
    result: dict[str, Any] = {"shape": shape, "errors": found}
    allowed = ALLOWED[dtype]
    if not max(found.values()) <= allowed:
        return result | {"wrong": f"more than {allowed:.0e}: not timed"}
    least = bounds(*shape, inputs[0].element_size())
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    for card, bandwidth in BANDWIDTH.items():
        if card in name:
            least["bound_ms"] = max(least["bytes"] / bandwidth, least["operations"] / RATE) * 1e3
    result["least"] = least
    rules: list[tuple[str, Rule]] = [("tcal", op), *peers(device)]
    if device == "cuda":
        rules.append(("pytorch", lambda *a: gated_delta_rule_chunked(*a, scale=scale)))
    for name, rule in rules:
        try:
            with torch.no_grad():
                result[name] = {"forward": median(lambda r=rule: r(*inputs), device, repeat)}  # type: ignore[misc]
            if shape[1] > 1 and name != "pytorch":
                result[name]["both"] = median(trained(rule, inputs, grad), device, repeat)
        except Exception as e:  # a peer that refuses this card or shape
            result.setdefault(name, {})["failed"] = repr(e)[:300]
    return result


def line(result: dict[str, Any]) -> str:
    """One result for a reader."""
    parts = [f"{result['shape']!s:24} worst error {max(result['errors'].values()):.1e}"]
    if "wrong" in result:
        return f"{parts[0]} {result['wrong']}"
    if "bound_ms" in result["least"]:
        parts.append(f"bound {result['least']['bound_ms']:.3f}")
    for name in ("tcal", "fla", "transformers", "pytorch"):
        times = [f"{kind} {t['ms']:.3f}" for kind, t in result.get(name, {}).items() if kind != "failed"]
        if name in result:
            parts.append(f"{name}: {', '.join(times)}{' failed' if 'failed' in result[name] else ''}")
    return " | ".join(parts)


def main(argv: list[str] | None = None) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="python -m tcal_compiler.kernels.bench", description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=SHAPES[device].split(), metavar="B,T,H,D")
    parser.add_argument(
        "--dtype", default="bfloat16" if device == "cuda" else "float32", choices=["float32", "bfloat16"]
    )
    parser.add_argument("--repeat", type=int, default=30 if device == "cuda" else 9)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(argv)
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    report: dict[str, Any] = {"device": where, "torch": torch.__version__, "dtype": options.dtype, "results": []}
    print(
        f"{where} | torch {torch.__version__} | {options.dtype} | milliseconds, medians of {options.repeat}", flush=True
    )
    for text in options.shapes:
        batch, tokens, heads, dim = (int(n) for n in text.split(","))
        result = time_shape((batch, tokens, heads, dim), getattr(torch, options.dtype), device, options.repeat)
        report["results"].append(result)
        print(line(result), flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)
    return int(any("wrong" in r for r in report["results"]))


if __name__ == "__main__":
    sys.exit(main())
