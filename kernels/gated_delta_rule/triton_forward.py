"""Triton forward of the gated delta rule: two launches; up to 16 tokens are one launch of the decode step.

The names are those of `chunked`. `triton_solve` takes all chunks at once, `triton_walk` one after another; the walk
carries the state in registers and reads the outputs from it, so that no state but the last goes to memory.
Sums and the state are float32.
"""

from __future__ import annotations

from torch import Tensor

from tcal_compiler.kernels.gated_delta_step import MOST_TOKENS
from tcal_compiler.kernels.gated_delta_step.triton_kernel import gated_delta_step_triton
from tcal_compiler.kernels.launch import per_size
from tcal_compiler.kernels.self_check import takes_tf32

from .triton_layout import layout_of
from .triton_solve import Solve
from .triton_tiles import Sizes, as_kernels_take, setting_for, sizes_of
from .triton_walk import Walk


def gated_delta_rule_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    *,
    scale: float,
    bounds: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as `gated_delta_rule_chunked`; float32, bfloat16 and float16, not float64.

    bounds of packed sequences: as in `gated_delta_rule_reference`.
    """
    if bounds is None and q.shape[1] <= MOST_TOKENS:
        return gated_delta_step_triton(q, k, v, g, beta, initial_state, scale=scale)
    v_dtype, state_dtype, tf32 = v.dtype, initial_state.dtype, takes_tf32(q)
    q, k, v, g, beta, state = as_kernels_take((q, k, v, g, beta, initial_state))
    solve, walk = _launches(sizes_of(q, v), bounds, scale, tf32)
    out, final = walk.outputs(q, k, v, state, solve(q, k, g, beta), v_dtype)
    return out, final.to(state_dtype)


@per_size
def _launches(x: Sizes, bounds: tuple[int, ...] | None, scale: float, tf32: bool) -> tuple[Solve, Walk]:
    s, layout = setting_for(x, tf32=tf32), layout_of(x, bounds)
    return Solve(x, layout, s, scale, read=True), Walk(x, layout, s, scale, read=True)
