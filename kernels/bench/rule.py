"""Times tcal::gated_delta_rule, forward and backward: shapes are batch, tokens, heads, head dim."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tcal_compiler.kernels.gated_delta_rule import dispatch, gated_delta_rule
from tcal_compiler.kernels.gated_delta_rule.chunked import gated_delta_rule_chunked
from tcal_compiler.kernels.gated_delta_rule.chunked_backward import gated_delta_rule_chunked_backward
from tcal_compiler.kernels.self_check import exactly, relative_errors

from .timing import Benchmark, Times, attempt, bound, median, new_result

SHAPES = {
    "cuda": "8,2048,16,64 8,2048,16,128 2,8192,16,128 1,32768,16,128 1,65536,8,128 1,8192,32,64 32,512,9,64",
    "cpu": "1,2048,9,64 1,2048,16,128 1,1,9,64",
}
CHUNK = 64


def least(batch: int, tokens: int, heads: int, dim: int, size: int, device: str) -> dict[str, float]:
    """Bound of the forward: q, k, v, o once, gates and states in float32; operations of chunks of 64."""
    rows = batch * heads
    data = rows * tokens * (4 * dim * size + 8) + rows * 2 * 4 * dim * dim
    chunk = min(CHUNK, tokens)
    operations = rows * tokens * (10 * chunk * dim + 6 * dim * dim) if tokens > 1 else rows * 8 * dim * dim
    return bound(data, operations, device)


def make_inputs(batch: int, tokens: int, heads: int, dim: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    gen = torch.Generator(device).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=gen)

    q, k = (F.normalize(randn(batch, tokens, heads, dim), dim=-1).to(dtype) for _ in range(2))
    g, beta = -0.1 * F.softplus(randn(batch, tokens, heads)), randn(batch, tokens, heads).sigmoid()
    return [q, k, randn(batch, tokens, heads, dim).to(dtype), g, beta, randn(batch, heads, dim, dim)]


def errors(inputs: list[Tensor], grads: list[Tensor], scale: float) -> dict[str, float]:
    """rms error over rms of outputs and gradients against float64, on at most 2 sequences of 300 tokens."""
    some = [x[:2, :300] for x in inputs[:5]] + [inputs[5][:2]]
    seeds = [grads[0][:2, :300], grads[1][:2]]
    actual = [*dispatch.forward(*some, scale=scale), *dispatch.backward(*seeds, *some, scale=scale)]
    exact_some, exact_seeds = exactly(some), exactly(seeds)
    exact = [
        *gated_delta_rule_chunked(*exact_some, scale=scale),
        *gated_delta_rule_chunked_backward(*exact_seeds, *exact_some, scale=scale),
    ]
    return relative_errors(dispatch.NAMES, actual, exact)


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


def time_shape(shape: tuple[int, ...], dtype: torch.dtype, device: str, repeat: int) -> dict[str, Any]:
    batch, tokens, heads, dim = shape
    inputs = make_inputs(batch, tokens, heads, dim, dtype, device)
    grad, scale = torch.randn_like(inputs[2]), dim**-0.5
    result = new_result("rule", shape, errors(inputs, [grad, torch.randn_like(inputs[5])], scale), dtype)
    if "wrong" in result:
        return result
    result["bounds"] = {"forward": least(batch, tokens, heads, dim, inputs[0].element_size(), device)}
    rules: list[tuple[str, Rule]] = [("tcal", op), *peers(device)]
    if device == "cuda":
        rules.append(("pytorch", lambda *a: gated_delta_rule_chunked(*a, scale=scale)))
    times: dict[str, Any] = {}
    for name, rule in rules:

        def forward(rule: Rule = rule) -> Times:
            with torch.no_grad():
                return median(lambda: rule(*inputs), device, repeat)

        def both(rule: Rule = rule) -> Times:
            return median(trained(rule, inputs, grad), device, repeat)

        attempt(times, name, "forward", forward)
        if tokens > 1 and name != "pytorch":
            attempt(times, name, "both", both)
    return result | {"times": times}


BENCHMARK = Benchmark("B,T,H,D", SHAPES, time_shape)
