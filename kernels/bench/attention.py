"""Times the attention statistics beside torch's flash attention: shapes are batch, tokens, heads, head dim."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tcal_compiler.kernels.attention_stats import streaming
from tcal_compiler.kernels.attention_stats.op import NAMES
from tcal_compiler.kernels.scores import Scores
from tcal_compiler.kernels.self_check import exactly, relative_errors

from .timing import SEED, Benchmark, attempt, bound, median, new_result

SHAPES = {"cuda": "1,8192,16,64 1,8192,16,128 1,32768,16,64 1,32768,16,128", "cpu": "1,512,4,64"}
CHECKED = 700  # tokens whose statistics are compared with float64


def kernels(device: str) -> tuple[Any, Any]:
    """What is timed as ours, statistics and output sums, past the dispatcher."""
    if device != "cuda":
        return streaming.attention_statistics_streaming, streaming.attention_output_sums_streaming
    from tcal_compiler.kernels.attention_stats import triton_kernel

    return triton_kernel.attention_statistics_triton, triton_kernel.attention_output_sums_triton


def flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention by flash attention, and by nothing else, on CUDA."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION if q.is_cuda else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def time_shape(shape: tuple[int, ...], dtype: torch.dtype, device: str, repeat: int) -> dict[str, Any]:
    batch, tokens, heads, dim = shape
    gen = torch.Generator(device).manual_seed(SEED)
    q, k, v, o = (
        torch.randn(size, device=device, generator=gen).to(dtype)
        for size in (*[(batch, heads, tokens, dim)] * 3, (batch, tokens, heads, dim))
    )
    o += v.transpose(1, 2)  # so that <ctx, o> does not vanish
    statistics, sums = kernels(device)
    given: dict[str, Any] = {"scores": Scores(2 * dim**-0.5)}
    some = (*(x[:1, :2, :CHECKED] for x in (q, k, v)), o[:1, :CHECKED, :2])
    exact_some = exactly(some)
    actual = (*statistics(*some[:3], **given), *sums(*some, **given))
    exact = (
        *streaming.attention_statistics_streaming(*exact_some[:3], **given),
        *streaming.attention_output_sums_streaming(*exact_some, **given),
    )
    result = new_result("attention", shape, relative_errors(NAMES, actual, exact), dtype)
    if "wrong" in result:
        return result
    operations, row = 4 * batch * heads * dim * tokens**2 / 2, batch * heads * tokens * dim * q.element_size()
    result["bounds"] = {kind: bound(4 * row, operations, device) for kind in ("statistics", "output sums", "forward")}
    times: dict[str, Any] = {}
    attempt(times, "tcal", "statistics", lambda: median(lambda: statistics(q, k, v, **given), device, repeat))
    attempt(times, "tcal", "output sums", lambda: median(lambda: sums(q, k, v, o, **given), device, repeat))
    attempt(times, "flash", "forward", lambda: median(lambda: flash(q, k, v, given["scores"].scale), device, repeat))
    return result | {"times": times}


BENCHMARK = Benchmark("B,T,H,D", SHAPES, time_shape)
