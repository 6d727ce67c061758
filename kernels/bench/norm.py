"""Times tcal::gated_rms_norm, forward and backward: shapes are layers, rows, heads, head dim."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tcal_compiler.kernels.gated_rms_norm.reference import gated_rms_norm_backward, gated_rms_norm_reference
from tcal_compiler.kernels.self_check import exactly, relative_errors

from .timing import SEED, Benchmark, attempt, bound, median_in_graph, new_result

SHAPES = {"cuda": "1,16384,16,128 1,16384,16,64 22,4096,9,64", "cpu": "1,2048,9,64"}
EPS = 1e-5


def norm_pytorch(o: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    return gated_rms_norm_reference(o, gate, weight[:, None], eps)


def kernels(device: str) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, ...]]]:
    """What is timed as ours, forward and backward, past the dispatcher."""
    if device != "cuda":
        return norm_pytorch, gated_rms_norm_backward
    from tcal_compiler.kernels.gated_rms_norm import triton_kernel

    return triton_kernel.gated_rms_norm_triton, triton_kernel.gated_rms_norm_backward_triton


def time_shape(shape: tuple[int, ...], dtype: torch.dtype, device: str, repeat: int) -> dict[str, Any]:
    gen = torch.Generator(device).manual_seed(SEED)
    stack, _, heads, dim = shape
    o, gate, weight = (
        torch.randn(size, device=device, generator=gen).to(dtype) for size in (shape, shape, (stack, heads, dim))
    )
    seed = torch.randn(shape, device=device, generator=gen)
    forward, backward = kernels(device)
    some = (seed[:, :300], o[:, :300], gate[:, :300], weight)
    actual = (forward(*some[1:], EPS), *backward(*some, EPS))
    d_y, x, z, w = exactly(some)
    exact = (norm_pytorch(x, z, w, EPS), *gated_rms_norm_backward(d_y, x, z, w, EPS))
    found = relative_errors(("y", "d_o", "d_gate", "d_weight"), actual, exact)
    result = new_result("norm", shape, found, dtype)
    if "wrong" in result:
        return result
    size, numbers = o.element_size(), o.numel()
    result["bounds"] = {  # y and its gradient are float32
        "forward": bound(numbers * (2 * size + 4), 0, device),
        "backward": bound(numbers * (4 * size + 4), 0, device),
    }
    times: dict[str, Any] = {}
    named = {"tcal": (forward, backward)}
    if device == "cuda":
        named["pytorch"] = norm_pytorch, gated_rms_norm_backward
    for name, (there, back) in named.items():
        for kind, run in (("forward", partial(there, o, gate, weight, EPS)),
                          ("backward", partial(back, seed, o, gate, weight, EPS))):  # fmt: skip
            attempt(times, name, kind, lambda run=run: median_in_graph([run], device, repeat))  # type: ignore[misc]
    return result | {"times": times}


BENCHMARK = Benchmark("S,N,H,D", SHAPES, time_shape)
