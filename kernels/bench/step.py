"""Times tcal::gated_delta_step in a CUDA graph, the state overwritten: shapes are batch, tokens, heads, head dim.

A graph holds steps on different states, of 256 MB together where they are small, so that none is left in the caches
from the replay before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tcal_compiler.kernels.gated_delta_step import gated_delta_step_reference
from tcal_compiler.kernels.gated_delta_step.op import gated_delta_step_pytorch
from tcal_compiler.kernels.self_check import exactly, relative_errors

from .peers import step_peers
from .timing import SEED, Benchmark, attempt, bound, median_in_graph, new_result

SHAPES = {
    "cuda": "1,1,16,128 1,1,32,128 64,1,16,128 64,1,32,128 256,1,16,128 256,1,32,128 1,16,16,128",
    "cpu": "1,1,9,64",
}
GRAPH_BYTES, MOST_STEPS, LEAST_STEPS = 1 << 28, 64, 4

Step = Callable[..., Any]


def kernel(device: str) -> Step:
    """What is timed as ours, past the dispatcher."""
    if device != "cuda":
        return gated_delta_step_pytorch
    from tcal_compiler.kernels.gated_delta_step.triton_kernel import gated_delta_step_triton

    return gated_delta_step_triton


def least_bytes(batch: int, tokens: int, heads: int, dim: int, size: int) -> int:
    """The float32 state read and written, q, k, v and the norm's gate read, y written, g and beta in float32."""
    return batch * heads * (2 * 4 * dim * dim + tokens * (5 * dim * size + 8)) + 4 * heads * dim


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v, g, beta, state; gate, weight."""
    batch, tokens, heads, dim = shape
    gen = torch.Generator(device).manual_seed(SEED)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=gen)

    q, k = (F.normalize(randn(*shape), dim=-1).to(dtype) for _ in range(2))
    g, beta = -0.1 * F.softplus(randn(batch, tokens, heads)), randn(batch, tokens, heads).sigmoid()
    inputs = [q, k, randn(*shape).to(dtype), g, beta, randn(batch, heads, dim, dim)]
    return inputs, [randn(*shape).to(dtype), randn(heads, dim)]


def errors(step: Step, inputs: list[Tensor], norm: list[Tensor], scale: float) -> dict[str, float]:
    """Of both kinds that are timed, at the very shape."""
    found: dict[str, float] = {}
    for kind, args, normalize in (("core", inputs, False), ("with norms", inputs + norm, True)):
        actual = step(*args[:5], args[5].clone(), *args[6:], scale=scale, normalize=normalize, in_place=True)
        exact = gated_delta_step_reference(*exactly(args), scale=scale, normalize=normalize)
        found |= relative_errors((f"y, {kind}", f"state, {kind}"), actual, exact)
    return found


def peer_errors(step: Step, args: list[Tensor], given: list[Tensor], scale: float) -> dict[str, Any]:
    """Of a peer's core against float64; "failed" says why there is none."""
    try:
        exact = gated_delta_step_reference(*exactly(args), scale=scale)
        return relative_errors(("y, core", "state, core"), step(*given, args[5].clone(), scale=scale), exact)
    except Exception as e:
        return {"failed": repr(e)[:300]}


def count_for(state: Tensor, device: str) -> int:
    """How many states a graph steps on."""
    return min(MOST_STEPS, max(LEAST_STEPS, GRAPH_BYTES // (4 * state.numel()))) if device == "cuda" else 1


def time_shape(shape: tuple[int, ...], dtype: torch.dtype, device: str, repeat: int) -> dict[str, Any]:
    inputs, norm = make_inputs(shape, dtype, device)
    scale, step = shape[3] ** -0.5, kernel(device)
    result = new_result("step", shape, errors(step, inputs, norm, scale), dtype)
    if "wrong" in result:
        return result
    batch, tokens, heads, dim = shape
    least = bound(least_bytes(batch, tokens, heads, dim, inputs[0].element_size()), 0, device)
    result["bounds"] = {"core": least, "with norms": least}
    *given, state = inputs
    states = [state.clone() for _ in range(count_for(state, device))]
    times: dict[str, Any] = {}

    def add(name: str, kind: str, each: Step, *rest: Tensor, **fixed: Any) -> None:
        runs = [partial(each, *given, s, *rest, scale=scale, **fixed) for s in states]
        attempt(times, name, kind, lambda: median_in_graph(runs, device, repeat))

    for name, each in (("tcal", step), ("pytorch", gated_delta_step_pytorch)):
        if name == "tcal" or device == "cuda":
            add(name, "core", each, in_place=True)
            add(name, "with norms", each, *norm, in_place=True, normalize=True)
    if device == "cuda":
        beside = result["errors_beside"] = {"pytorch": errors(gated_delta_step_pytorch, inputs, norm, scale)}
        for name, each, form in step_peers():
            its = form(given)
            beside[name] = peer_errors(each, inputs, its, scale)
            runs = [partial(each, *its, s, scale=scale) for s in states]
            attempt(times, name, "core", lambda runs=runs: median_in_graph(runs, device, repeat))  # type: ignore[misc]
    return result | {"times": times}


BENCHMARK = Benchmark("B,T,H,D", SHAPES, time_shape)
