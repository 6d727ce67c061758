"""Times tcal::gated_delta_rule, forward and backward: shapes are batch, tokens, heads, head dim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tcal_compiler.kernels.gated_delta_rule import dispatch, gated_delta_rule
from tcal_compiler.kernels.gated_delta_rule.chunked import gated_delta_rule_chunked
from tcal_compiler.kernels.gated_delta_rule.chunked_backward import gated_delta_rule_chunked_backward
from tcal_compiler.kernels.self_check import exactly, relative_errors

from .attention import flash
from .peers import Peer, Rule, peers
from .plain import Bfloat16Products
from .timing import SEED, Benchmark, Times, attempt, bound, median, new_result

SHAPES = {
    "cuda": "8,2048,16,64 8,2048,16,128 2,8192,16,128 1,32768,16,128 1,65536,8,128 1,8192,32,64 32,512,9,64",
    "cpu": "1,2048,9,64 1,2048,16,128 1,1,9,64",
}
CHUNK = 64
CHECKED = 1 << 16  # tokens of each sequence that are compared with float64
NAMES = dispatch.NAMES


def bounds(batch: int, tokens: int, heads: int, dim: int, size: int, device: str) -> dict[str, dict[str, float]]:
    """Of the forward: q, k, v, o once, gates and states in float32; operations of chunks of 64.

    Of both: these, and for the backward the inputs again, the output's gradient and five gradients; operations three
    times, since each product has the gradients of two factors.
    """
    rows = batch * heads
    data = rows * tokens * (4 * dim * size + 8) + rows * 2 * 4 * dim * dim
    more = rows * tokens * (7 * dim * size + 16) + rows * 4 * dim * dim
    chunk = min(CHUNK, tokens)
    operations = rows * tokens * (10 * chunk * dim + 6 * dim * dim) if tokens > 1 else rows * 8 * dim * dim
    found = {"forward": bound(data, operations, device)}
    return found | {"both": bound(data + more, 3 * operations, device)} if tokens > 1 else found


def make_inputs(batch: int, tokens: int, heads: int, dim: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    gen = torch.Generator(device).manual_seed(SEED)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=gen)

    q, k = (F.normalize(randn(batch, tokens, heads, dim), dim=-1).to(dtype) for _ in range(2))
    g, beta = -0.1 * F.softplus(randn(batch, tokens, heads)), randn(batch, tokens, heads).sigmoid()
    return [q, k, randn(batch, tokens, heads, dim).to(dtype), g, beta, randn(batch, heads, dim, dim)]


def forward_and_backward(inputs: list[Tensor], seeds: list[Tensor], scale: float) -> tuple[Tensor, ...]:
    """Plain PyTorch, float32 or float64 inside: outputs, final state and all gradients."""
    return (
        *gated_delta_rule_chunked(*inputs, scale=scale),
        *gated_delta_rule_chunked_backward(*seeds, *inputs, scale=scale),
    )


def peer_errors(peer: Peer, inputs: list[Tensor], seeds: list[Tensor], exact: tuple[Tensor, ...]) -> dict[str, Any]:
    """Of what the peer can do; "failed" says why it cannot do the rest."""
    found: dict[str, Any] = {}
    try:
        with torch.no_grad():
            found |= relative_errors(NAMES[:2], peer.form(*peer.rule(*peer.given(inputs)), inputs[2]), exact[:2])
        if peer.trains:
            leaves = [x.clone().requires_grad_() for x in inputs]
            found |= relative_errors(NAMES[2:], torch.autograd.grad(peer.rule(*leaves), leaves, seeds), exact[2:])
    except Exception as e:
        found["failed"] = repr(e)[:300]
    return found


def compare(
    inputs: list[Tensor], seeds: list[Tensor], scale: float, others: list[Peer]
) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """rms error over rms against float64 of outputs, final state and gradients, but for tokens after CHECKED.

    Ours, and by name those of the peers and of plain PyTorch, in float32 and with the products of bfloat16 tensors.
    """
    some = [x[:, :CHECKED].contiguous() for x in inputs[:5]] + [inputs[5]]
    seeds = [seeds[0][:, :CHECKED].contiguous(), seeds[1]]
    exact = forward_and_backward(list(exactly(some)), list(exactly(seeds)), scale)
    ours = (*dispatch.forward(*some, scale=scale), *dispatch.backward(*seeds, *some, scale=scale))
    beside: dict[str, dict[str, Any]] = {}
    if some[0].is_cuda:
        beside["pytorch"] = relative_errors(NAMES, forward_and_backward(some, seeds, scale), exact)
        if some[0].dtype == torch.bfloat16:
            with Bfloat16Products():
                plain = forward_and_backward(some, seeds, scale)
            beside["pytorch in bfloat16"] = relative_errors(NAMES, plain, exact)
    for peer in others:
        beside[peer.name] = peer_errors(peer, some, seeds, exact)
    return relative_errors(NAMES, ours, exact), beside


def op(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Any]:
    return gated_delta_rule(q, k, v, g=g, beta=beta, initial_state=state)


def attention(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor, Any]:
    """Causal flash attention on the same tensors."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flash(q, k, v, q.shape[-1] ** -0.5).transpose(1, 2), None


def trained(rule: Rule, inputs: list[Tensor], grad: Tensor) -> Callable[[], None]:
    """One forward and backward."""
    leaves = [x.clone().requires_grad_() for x in inputs]

    def run() -> None:
        out, _ = rule(*leaves)
        torch.autograd.grad(out, leaves[:5], grad, allow_unused=True)  # attention has no gates

    return run


def time_shape(shape: tuple[int, ...], dtype: torch.dtype, device: str, repeat: int) -> dict[str, Any]:
    batch, tokens, heads, dim = shape
    inputs = make_inputs(batch, tokens, heads, dim, dtype, device)
    grad, scale = torch.randn_like(inputs[2]), dim**-0.5
    others = list(peers(device))
    errors, beside = compare(inputs, [grad, torch.randn_like(inputs[5])], scale, others)
    result = new_result("rule", shape, errors, dtype) | {"errors_beside": beside}
    if "wrong" in result:
        return result
    result["bounds"] = bounds(batch, tokens, heads, dim, inputs[0].element_size(), device)
    rules = [Peer("tcal", op), *others]
    if device == "cuda":
        plain = Peer("pytorch", lambda *a: gated_delta_rule_chunked(*a, scale=scale), trains=False)
        rules += [plain, Peer("flash attention", attention, same=False)]
    times: dict[str, Any] = {}
    for peer in rules:

        def forward(peer: Peer = peer) -> Times:
            given = peer.given(inputs)
            with torch.no_grad():
                return median(lambda: peer.rule(*given), device, repeat)

        def both(peer: Peer = peer) -> Times:
            return median(trained(peer.rule, inputs, grad), device, repeat)

        attempt(times, peer.name, "forward", forward)
        if tokens > 1 and peer.trains:
            attempt(times, peer.name, "both", both)
    return result | {"times": times}


BENCHMARK = Benchmark("B,T,H,D", SHAPES, time_shape)
