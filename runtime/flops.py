"""Floating-point operations of training steps, and what a card can do: model FLOPs utilisation (MFU).

MFU = (operations of the models / seconds) / (the card's peak). A multiplication and an addition are two operations.
Matrix products count, those of attention over all pairs of tokens, and those of the delta rule: per token and head
S^T k, the outer product with k and S^T q, 6 Dk Dv. Attention over the last N tokens counts as it is computed, with 2 N
keys for each query and the length rounded up to a multiple of N. A backward pass counts as two forward passes; what
checkpoints compute again does not count. Source of the definition: PaLM, arXiv:2204.02311, appendix B.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode

from .student import Student

# Dense bfloat16 products of a card, FLOP/s, from NVIDIA's data sheets; by the start of its name, the longest that fits.
PEAKS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}


def peak_flops(card: str) -> float | None:
    """Of a card by its name, as torch.cuda.get_device_name says it; None for one that PEAKS does not have."""
    names = [n for n in PEAKS if card == n or card.startswith(f"{n} ") or card.startswith(f"{n}-")]
    return PEAKS[max(names, key=len)] if names else None


def device_peak(device: torch.device) -> float | None:
    """peak_flops of a CUDA device; None for any other."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Of shapes q [B, H, T, D], k [B, K, S, D], v [B, K, S, E], whatever the mask."""
    b, h, t, d = q
    return 2 * b * h * t * k[2] * (d + v[3])


def _delta_rule(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Of shapes q [B, T, H, Dk], v [B, T, K, Dv]."""
    b, t, h, d = q
    return 6 * b * t * h * d * v[3]


@torch.no_grad()
def forward_flops(gm: GraphModule, args: tuple[Any, ...]) -> int:
    """Operations of one forward pass, counted while it runs."""
    aten: Any = torch.ops.aten
    kernels = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
    counted = {getattr(aten, f"_scaled_dot_product_{n}"): _attention for n in kernels}
    counted[torch.ops.tcal.gated_delta_rule] = _delta_rule
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        gm(*args)
    return counter.get_total_flops()


def distillation_flops(student: Student, length: int) -> int:
    """Operations that distillation takes for one sequence of `length` tokens: teacher forward, student both ways."""
    device = next(student.gm.parameters()).device
    args = student.capture.inputs(torch.zeros(1, length, dtype=torch.long, device=device))
    return forward_flops(student.capture.gm, args) + 3 * forward_flops(student.gm, args)
