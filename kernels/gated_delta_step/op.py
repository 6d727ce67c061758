"""Registration of tcal::gated_delta_step and of its mutating form: schema, fake and path. Inference only.

An operator may not return what it was given, so that the form which overwrites the state is one of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tcal_compiler.kernels.gated_delta_rule.chunked import gated_delta_rule_chunked
from tcal_compiler.kernels.gated_rms_norm import gated_rms_norm_reference
from tcal_compiler.kernels.gates import l2_normalize_reference
from tcal_compiler.kernels.registration import on_device, without_autocast
from tcal_compiler.kernels.self_check import Proof, errors_of, exactly, takes_triton
from tcal_compiler.kernels.shapes import Shapes

from .reference import gated_delta_step_reference

MOST_TOKENS = 16
SHAPES = Shapes(
    "gated_delta_step",
    "q [B,T,H,Dk], k [B,T,K,Dk], v [B,T,K,Dv], g [B,T,H], beta [B,T,H], state [B,H,Dk,Dv], gate [B,T,H,Dv], "
    "weight [H,Dv]",
    positive=("T", "Dk", "Dv"),
    groups=("H", "K"),
)


def gated_delta_step_pytorch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    scale: float,
    normalize: bool = False,
    eps: float = 1e-5,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """Contract of `gated_delta_step_reference`; in_place: the returned state is `state`, overwritten."""
    acc = torch.promote_types(q.dtype, torch.float32)
    if normalize:
        q, k = l2_normalize_reference(q), l2_normalize_reference(k)
    y, new = gated_delta_rule_chunked(q, k, v.to(acc), g, beta, state, scale=scale)
    if gate is not None and weight is not None:
        y = gated_rms_norm_reference(y, gate, weight, eps)
    return y.to(v.dtype), state.copy_(new) if in_place else new


def self_check(
    device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int, normalize: bool, normed: bool
) -> dict[str, float]:
    """Errors of Triton's results against float64."""
    return errors_of(device, proof(device, dtype, key_dim, value_dim, normalize, normed))


def proof(
    device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int, normalize: bool, normed: bool
) -> Proof:
    """Four query heads on two key heads, 3 tokens in place, then one, with every tile."""
    from .triton_kernel import gated_delta_step_triton, measured_for, tiles

    gen = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen).to(device)

    given: dict[str, Any] = dict(scale=key_dim**-0.5, normalize=normalize)
    measured = measured_for(dtype, device, key_dim, value_dim, normed=normed)
    options = tiles(key_dim, value_dim, whole=normed, measured=measured)
    made: list[tuple[Any, ...]] = []
    for tokens in (3, 1):
        q, k, v = randn(3, tokens, 4, key_dim), randn(3, tokens, 2, key_dim), randn(3, tokens, 2, value_dim)
        q, k, v = q.to(dtype), (k / key_dim**0.5).to(dtype), v.to(dtype)
        norm = (randn(3, tokens, 4, value_dim).to(dtype), randn(4, value_dim).to(dtype)) if normed else ()
        made.append((q, k, v, -randn(3, tokens, 4).exp(), randn(3, tokens, 4).sigmoid(), *norm))
    start = randn(3, 4, key_dim, value_dim)

    def run() -> list[Tensor]:
        results: list[Tensor] = []
        for tile in options:
            state = start.clone()
            for inputs in made:
                in_place = inputs is made[0]
                args = (*inputs[:5], state, *inputs[5:])
                y, state = gated_delta_step_triton(*args, **given, in_place=in_place, tile=tile)
                results += [y, state.clone()]
        return results

    def exact() -> list[Tensor]:
        results: list[Tensor] = []
        state = start.double()
        for inputs in made:
            q, k, v, g, beta, *given_norm = exactly(inputs)
            y, state = gated_delta_step_reference(q, k, v, g, beta, state, *given_norm, **given)
            results += [y, state]
        return results * len(options)

    names = [f"{name} of {tokens} tokens in {tile.BV} columns"
             for tile in options for tokens in (3, 1) for name in ("y", "state")]  # fmt: skip
    return Proof(names, run, exact)


def _run(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, gate: Tensor | None, weight: Tensor | None,
    scale: float, normalize: bool, eps: float, *, in_place: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Checks the inputs and takes Triton on CUDA once it has proved itself there, else PyTorch."""
    tokens = SHAPES.check_numbers(q, k, v, g, beta, state, gate, weight)["T"]
    if tokens > MOST_TOKENS:
        raise ValueError(
            f"gated_delta_step: {tokens} tokens, and it takes 1 to {MOST_TOKENS}; gated_delta_rule is for longer ones"
        )
    if (gate is None) != (weight is None):
        raise ValueError("gated_delta_step: the norm needs both gate and weight; one of them is missing")
    given: dict[str, Any] = dict(scale=scale, normalize=normalize, eps=eps, in_place=in_place)
    with without_autocast(q.device):
        if _takes_triton(q, v, state, normalize, gate is not None):
            from .triton_kernel import gated_delta_step_triton

            with on_device("gated_delta_step", q, k, v, g, beta, state, gate, weight):
                return gated_delta_step_triton(q, k, v, g, beta, state, gate, weight, **given)
        out, new = gated_delta_step_pytorch(q, k, v, g, beta, state, gate, weight, **given)
    return out.contiguous(), new if in_place else new.contiguous()


def _takes_triton(q: Tensor, v: Tensor, state: Tensor, normalize: bool, normed: bool) -> bool:
    return state.dtype == torch.float32 and takes_triton(
        "gated_delta_step", self_check, q, q.shape[-1], v.shape[-1], normalize, normed
    )


@torch.library.custom_op("tcal::gated_delta_step", mutates_args=())
def _returned(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, gate: Tensor | None, weight: Tensor | None,
    scale: float, normalize: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _run(q, k, v, g, beta, state, gate, weight, scale, normalize, eps, in_place=False)


@_returned.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, *_: Any) -> Any:
    return v.new_empty(*q.shape[:3], v.shape[3]), state.new_empty(state.shape)


@torch.library.custom_op("tcal::gated_delta_step_", mutates_args=("state",))
def _overwritten(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, gate: Tensor | None, weight: Tensor | None,
    scale: float, normalize: bool, eps: float,
) -> Tensor:  # fmt: skip
    return _run(q, k, v, g, beta, state, gate, weight, scale, normalize, eps, in_place=True)[0]


@_overwritten.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Any:
    return v.new_empty(*q.shape[:3], v.shape[3])


def gated_delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    eps: float = 1e-5,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """Decode step of `gated_delta_step_reference` for 1 to 16 tokens: (y, state after them), usable under compile.

    scale defaults to Dk ** -0.5. in_place overwrites `state` and returns it; nothing of that size is allocated then.
    Under a CUDA graph capture, call once before with the same dtypes, head dims, normalize and norm.

    Raises:
        ValueError: shapes that do not fit, more than 16 tokens, gate without weight.
        RuntimeError: an input requires a gradient, for which there is no formula.
    """
    tensors = (q, k, v, g, beta, state, *(x for x in (gate, weight) if x is not None))
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise RuntimeError("gated_delta_step has no gradient: call it under torch.no_grad(), or gated_delta_rule")
    args = (q, k, v, g, beta, state, gate, weight, q.shape[-1] ** -0.5 if scale is None else float(scale))
    if in_place:
        return torch.ops.tcal.gated_delta_step_(*args, normalize, eps), state
    return torch.ops.tcal.gated_delta_step(*args, normalize, eps)
