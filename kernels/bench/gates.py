"""Times tcal::l2_normalize and tcal::delta_gates beside PyTorch's parts: shapes are layers, rows, heads, head dim.

Heads lie before rows, as q and k come from projections; what PyTorch normalizes is then copied, as the delta rule does.
"both" is one forward and backward, of PyTorch's parts by autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tcal_compiler.kernels.delta_gates import op as delta_gates
from tcal_compiler.kernels.delta_gates.reference import delta_gates_backward
from tcal_compiler.kernels.gates.reference import L2_EPS, l2_normalize_backward, l2_normalize_reference
from tcal_compiler.kernels.self_check import exactly, relative_errors

from .timing import SEED, Benchmark, attempt, bound, median_in_graph, new_result

SHAPES = {"cuda": "22,4096,9,64 1,16384,16,128 1,16384,16,64", "cpu": "1,2048,9,64"}
CHECKED = 300  # rows that are compared with float64

Function = Callable[..., Any]


@dataclass(frozen=True)
class Operator:
    """there(*inputs) -> results, back(*seeds, *inputs) -> their gradients; plain: as there, in PyTorch's parts."""

    names: tuple[str, ...]
    there: Function
    back: Function
    plain: Function
    seeds: list[Tensor]
    inputs: list[Tensor]

    def both(self) -> None:
        self.there(*self.inputs)
        self.back(*self.seeds, *self.inputs)

    def plain_both(self) -> None:
        with_autograd(self.plain, self.seeds, self.inputs)

    def errors(self) -> dict[str, float]:
        """Of the first rows of all layers, against float64."""
        seeds, inputs = ([x[:, :CHECKED] if x.dim() > 2 else x for x in xs] for xs in (self.seeds, self.inputs))
        found = self.there(*inputs)
        actual = (*_tuple(found), *_tuple(self.back(*seeds, *inputs)))
        return relative_errors(self.names, actual, with_autograd(self.plain, exactly(seeds), exactly(inputs)))


def _tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results


def with_autograd(plain: Function, seeds: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Results and gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = _tuple(plain(*leaves))
    return (*(x.detach() for x in results), *torch.autograd.grad(results, leaves, list(seeds)))


def kernels(device: str) -> tuple[Function, ...]:
    """What is timed as ours, past the dispatcher: the norm forward and backward, the gates forward and backward."""
    if device != "cuda":
        return l2_normalize_reference, l2_normalize_backward, delta_gates.forward_pytorch, delta_gates_backward
    from tcal_compiler.kernels.delta_gates import triton_kernel as gates
    from tcal_compiler.kernels.gates import triton_kernel as norm

    return (
        norm.l2_normalize_triton,
        norm.l2_normalize_backward_triton,
        gates.delta_gates_triton,
        gates.delta_gates_backward_triton,
    )


def operators(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Operator]:
    stack, rows, heads, dim = shape
    gen = torch.Generator(device).manual_seed(SEED)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=gen)

    there, back, gates, gates_back = kernels(device)
    x = randn(stack, heads, rows, dim).to(dtype).transpose(1, 2)
    a, b = (randn(stack, rows, heads).to(dtype) for _ in range(2))
    return {
        "l2": Operator(
            ("y", "d_x"),
            lambda x: there(x, L2_EPS),
            lambda d_y, x: back(d_y, x, L2_EPS),
            lambda x: l2_normalize_reference(x).contiguous(),
            [randn(stack, rows, heads, dim)],
            [x],
        ),
        "gates": Operator(
            delta_gates.NAMES,
            gates,
            gates_back,
            delta_gates.forward_pytorch,
            [randn(stack, rows, heads), randn(stack, rows, heads)],
            [a, b, randn(stack, heads), randn(stack, heads)],
        ),
    }


def time_shape(shape: tuple[int, ...], dtype: torch.dtype, device: str, repeat: int) -> dict[str, Any]:
    ours = operators(shape, dtype, device)
    found = {name: error for each in ours.values() for name, error in each.errors().items()}
    result = new_result("gates", shape, found, dtype)
    if "wrong" in result:
        return result
    size, numbers, rows = dtype.itemsize, ours["l2"].inputs[0].numel(), ours["gates"].inputs[0].numel()
    least = {  # results and their gradients are float32
        "l2": (numbers * (size + 4), numbers * (2 * size + 4)),
        "gates": (2 * rows * (size + 4), 2 * rows * (2 * size + 4)),
    }
    result["bounds"] = {}
    times: dict[str, Any] = {}
    for name, each in ours.items():
        there, back = least[name]
        result["bounds"] |= {name: bound(there, 0, device), f"{name}, both": bound(there + back, 0, device)}
        runs = {"tcal": (partial(each.there, *each.inputs), each.both)}
        if device == "cuda":
            runs["pytorch"] = partial(each.plain, *each.inputs), each.plain_both
        for whose, pair in runs.items():
            for kind, run in zip((name, f"{name}, both"), pair, strict=True):
                attempt(times, whose, kind, lambda run=run: median_in_graph([run], device, repeat))  # type: ignore[misc]
    return result | {"times": times}


BENCHMARK = Benchmark("S,N,H,D", SHAPES, time_shape)
