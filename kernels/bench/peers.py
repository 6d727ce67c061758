"""Other implementations of the delta rule, as far as they are installed; the benchmark times them beside ours."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Rule = Callable[..., tuple[Tensor, Any]]
PACKAGES = (
    "triton",
    "fla-core",
    "tilelang",
    "flash-qla",
    "flashinfer-python",
    "nvidia-cutlass-dsl-libs-base",
    "transformers",
)


@dataclass(frozen=True)
class Peer:
    """rule(*given(inputs)) -> (o, state), of which `form` makes those of ours; only the rule is timed."""

    name: str
    rule: Rule
    given: Callable[[list[Tensor]], list[Tensor]] = list  # from q, k, v, g, beta, state
    form: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = lambda o, state, v: (o, state)
    trains: bool = True
    same: bool = True  # whether it computes the delta rule: flash attention, timed for comparison, does not


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def peers(device: str) -> Iterator[Peer]:
    """All that are installed. An import that fails is that peer's failure: it is told by its rule, when called."""
    if device == "cpu":
        if installed("transformers"):
            yield Peer("transformers", transformers_rule())
        return
    for name, make in (("fla", fla), ("flash_qla", flash_qla), ("flashinfer", flashinfer)):
        if installed(name):
            try:
                yield make()
            except Exception as e:
                yield Peer(name, refused(e))


def refused(error: Exception) -> Rule:
    def rule(*_: Tensor) -> tuple[Tensor, Any]:
        raise error

    return rule


def transformers_rule() -> Rule:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    def rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Any]:
        return torch_chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True)

    return rule


def fla() -> Peer:
    os.environ.setdefault("FLA_FLASH_QLA", "0")  # else fla calls FlashQLA where that is installed
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    def rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Any]:
        return chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True)

    return Peer("fla", rule)


def flash_qla() -> Peer:
    from flash_qla import chunk_gated_delta_rule

    def rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Any]:
        if q.shape[-1] != 128:  # what it does then it does not say
            raise ValueError(f"FlashQLA is for head dims of 128, got {q.shape[-1]}")
        return chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True)

    return Peer("flash_qla", rule)


def flashinfer() -> Peer:
    """Sequences in one row, exp(g) in place of g, states [N, H, V, K]; inference only."""
    from flashinfer.gdn_prefill import chunk_gated_delta_rule

    def given(inputs: list[Tensor]) -> list[Tensor]:
        q, k, v, g, beta, state = inputs
        batch, tokens = q.shape[:2]
        bounds = torch.arange(0, batch * tokens + 1, tokens, device=q.device)
        return [*(x.flatten(0, 1) for x in (q, k, v, g.exp(), beta)), state.mT.contiguous(), bounds]

    def rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, bounds: Tensor) -> Any:
        return chunk_gated_delta_rule(
            q, k, v, g, beta, initial_state=state, output_final_state=True, cu_seqlens=bounds
        )  # fmt: skip

    return Peer("flashinfer", rule, given, lambda o, state, v: (o.view_as(v), state.mT), trains=False)


def fla_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, *, scale: float) -> Any:
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    return fused_recurrent_gated_delta_rule(
        q=q, k=k, v=v, g=g, beta=beta, initial_state=state, output_final_state=True, scale=scale
    )


def flashinfer_step(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, *, scale: float) -> Any:
    """One token; g = -softplus(a) and beta = sigmoid(b) are computed by the kernel, the state is overwritten."""
    from flashinfer.gdn_decode import gated_delta_rule_decode

    none = torch.zeros(v.shape[2], device=q.device)
    return gated_delta_rule_decode(q, k, v, state, none, a, none, b, scale=scale, use_qk_l2norm=False)


def step_peers() -> Iterator[tuple[str, Callable[..., Any], Callable[[list[Tensor]], list[Tensor]]]]:
    """(name, step, what it is given in place of q, k, v, g, beta), on CUDA."""

    def before_activation(given: list[Tensor]) -> list[Tensor]:
        *qkv, g, beta = given
        return [*qkv, (-g).expm1().log().to(qkv[0].dtype), beta.logit().to(qkv[0].dtype)]

    if installed("fla"):
        yield "fla", fla_step, list
    if installed("flashinfer"):
        yield "flashinfer", flashinfer_step, before_activation
