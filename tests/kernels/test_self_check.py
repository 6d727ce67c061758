"""The proof that every operator's Triton kernels give before they run: it passes on a GPU, and sees wrong kernels."""

from __future__ import annotations

import contextlib
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpreter import interpreted, interpreter_or_skip
from torch import Tensor

from tcal_compiler.kernels import self_check
from tcal_compiler.kernels.attention_stats import op as statistics
from tcal_compiler.kernels.attention_stats.streaming import (
    attention_output_sums_streaming,
    attention_statistics_streaming,
)
from tcal_compiler.kernels.delta_gates import op as delta_gates
from tcal_compiler.kernels.gated_delta_rule import dispatch as rule
from tcal_compiler.kernels.gated_delta_step import gated_delta_step_reference
from tcal_compiler.kernels.gated_delta_step import op as step
from tcal_compiler.kernels.gated_rms_norm import op as norm
from tcal_compiler.kernels.gates import op as gates

PAIRS = ((64, 64), (128, 128), (96, 48))
WIDE = (256, 256)
VARIANTS = ((0, 0), (1, 0), (0, 1), (1, 1))  # of the step: normalize, normed
PROOFS: list[tuple[str, self_check.Check, tuple[tuple[int, ...], ...]]] = [
    ("gated_delta_rule", rule.self_check, PAIRS),
    ("packed gated_delta_rule", rule.packed_self_check, PAIRS),
    ("attention_statistics", statistics.self_check, (*PAIRS, WIDE)),
    ("l2_normalize", gates.self_check, ((16,), (64,), (96,), (256,))),
    ("delta_gates", delta_gates.self_check, ((9,), (16,), (32,), (200,))),
    ("gated_rms_norm", norm.self_check, ((16,), (64,), (96,), (128,), (256,))),
    ("gated_delta_step", step.self_check, tuple((*pair, *v) for pair in (*PAIRS, WIDE) for v in VARIANTS)),
]
CPU = torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(self_check.ALLOWED), ids=str)
@pytest.mark.parametrize(("op", "check", "dims"), PROOFS, ids=[name for name, *_ in PROOFS])
def test_passes_on_the_gpu(op, check, dims, dtype):
    for each in dims:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert self_check.proved(op, check, 0, dtype, *each)


def only_wrong(errors: dict[str, float], *names: str) -> None:
    """These results are far from float64, all others near."""
    wrong = {name for name, error in errors.items() if not error <= self_check.ALLOWED[torch.float32]}
    assert wrong == set(names), errors


@interpreted
def test_sees_a_wrong_gradient_of_the_rule(monkeypatch):
    from tcal_compiler.kernels.gated_delta_rule import triton_backward, triton_forward

    def wrong(*args: Tensor, **given: Any) -> tuple[Tensor, ...]:
        dq, dk, dv, dg, *rest = rule.backward(*args, **given)
        return dq, dk, dv, dg.flip(1), *rest

    monkeypatch.setattr(triton_forward, "gated_delta_rule_triton", rule.forward)
    monkeypatch.setattr(triton_backward, "gated_delta_rule_triton_backward", wrong)
    only_wrong(rule.self_check(CPU, torch.float32, 8, 8), "dg of 131 tokens")
    only_wrong(rule.packed_self_check(CPU, torch.float32, 8, 8), "dg of 131 tokens")


@interpreted
def test_sees_wrong_distances(monkeypatch):
    from tcal_compiler.kernels.attention_stats import triton_kernel

    def wrong(*args: Tensor, **given: Any) -> tuple[Tensor, ...]:
        context, distance, entropy, mass = attention_statistics_streaming(*args, **given)
        return context, distance.flip(0), entropy, mass

    monkeypatch.setattr(triton_kernel, "attention_statistics_triton", wrong)
    monkeypatch.setattr(triton_kernel, "attention_output_sums_triton", attention_output_sums_streaming)
    only_wrong(statistics.self_check(CPU, torch.float32, 8, 8), "distance")


@interpreted
def test_sees_a_wrong_norm(monkeypatch):
    from tcal_compiler.kernels.gated_rms_norm import triton_kernel

    def right(*args: Any) -> tuple[Tensor, ...]:
        return norm.gated_rms_norm_backward(*args)

    def wrong(o: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm.gated_rms_norm_reference(o, gate, weight.flip(1)[:, None], eps)

    monkeypatch.setattr(triton_kernel, "gated_rms_norm_triton", wrong)
    monkeypatch.setattr(triton_kernel, "gated_rms_norm_backward_triton", right)
    only_wrong(norm.self_check(CPU, torch.float32, 8), "y")


@interpreted
def test_sees_a_wrong_gradient_of_the_l2_norm(monkeypatch):
    from tcal_compiler.kernels.gates import triton_kernel

    monkeypatch.setattr(triton_kernel, "l2_normalize_triton", gates.l2_normalize_reference)
    monkeypatch.setattr(triton_kernel, "l2_normalize_backward_triton", lambda d_y, x, eps: d_y)
    only_wrong(gates.self_check(CPU, torch.float32, 8), "d_x")


@interpreted
def test_sees_a_wrong_gradient_of_the_gates(monkeypatch):
    from tcal_compiler.kernels.delta_gates import triton_kernel

    def wrong(*args: Tensor) -> tuple[Tensor, ...]:
        d_a, d_b, d_log, d_bias = gates_backward(*args)
        return d_a, d_b, d_log.flip(0), d_bias

    gates_backward = delta_gates.delta_gates_backward
    monkeypatch.setattr(triton_kernel, "delta_gates_triton", delta_gates.forward_pytorch)
    monkeypatch.setattr(triton_kernel, "delta_gates_backward_triton", wrong)
    only_wrong(delta_gates.self_check(CPU, torch.float32, 9), "d_a_log")


@interpreted
@pytest.mark.parametrize("normed", [False, True])
def test_sees_a_step_that_is_wrong_in_one_tile(normed, monkeypatch):
    """The kernel itself, but the widest tile forgets the last column of the state."""
    from tcal_compiler.kernels.gated_delta_step import triton_kernel

    widest = triton_kernel.tiles(16, 16, whole=normed)[0]

    def wrong(*args: Tensor, tile: Any, in_place: bool, **given: Any) -> tuple[Tensor, Tensor]:
        y, state = gated_delta_step_reference(*args, **given)
        if tile == widest and in_place:
            state[..., -1] = 0
        return y, state

    with interpreter_or_skip():
        only_wrong(step.self_check(CPU, torch.float32, 16, 16, True, normed))
    monkeypatch.setattr(triton_kernel, "gated_delta_step_triton", wrong)
    after = ("state of 3 tokens", "y of 1 tokens", "state of 1 tokens")
    errors = step.self_check(CPU, torch.float32, 16, 16, True, normed)
    only_wrong(errors, *(f"{name} in {widest.BV} columns" for name in after))


def nothing_to_check(*_: object, **__: object) -> dict[str, float]:
    return {}


def test_without_triton_nothing_fails(monkeypatch):
    monkeypatch.setattr(self_check.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="Triton is not installed"):
        assert not self_check.proved("an_op", nothing_to_check, 0, torch.float32, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not self_check.proved("an_op", nothing_to_check, 0, torch.float32, 64, 64)  # once


def test_a_launch_that_fails_says_why_and_falls_back(monkeypatch):
    def too_large(*_: object) -> dict[str, float]:
        raise RuntimeError("out of resource: shared memory, Required: 163840, Hardware limit: 101376")

    monkeypatch.setattr(self_check.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    with pytest.warns(UserWarning, match=r"another_op runs in plain PyTorch .*Hardware limit: 101376"):
        assert not self_check.proved("another_op", too_large, 0, torch.float32, 256, 256)


@pytest.mark.parametrize("how", ["set_float32_matmul_precision", "fp32_precision"])
def test_takes_tf32_where_torch_may(how):
    """Either way of allowing it; the getters of the older way raise after the newer one."""
    x, matmul = SimpleNamespace(is_cuda=True, dtype=torch.float32), torch.backends.cuda.matmul
    assert not self_check.takes_tf32(x)
    try:
        if how == "fp32_precision":
            matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        assert self_check.takes_tf32(x)
        for other in ({"is_cuda": False}, {"dtype": torch.float16}, {"dtype": torch.bfloat16}):
            assert not self_check.takes_tf32(SimpleNamespace(**(vars(x) | other)))
    finally:
        matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")


def test_tf32_is_proved_apart(monkeypatch):
    """Within bounds of its own, and not by a proof of products that are exact."""
    errors = {"o": 1e-3}
    monkeypatch.setattr(self_check.torch.cuda, "device", lambda index: contextlib.nullcontext())
    given = ("an op that takes tf32", lambda *_: errors, 0, torch.float32, 64)
    pytest.importorskip("triton")
    assert self_check.proved(*given, tf32=True)
    with pytest.warns(UserWarning, match="more than 1e-04: o 1.0e-03"):
        assert not self_check.proved(*given)


def test_cpu_tensors_never_take_triton():
    x = torch.zeros(1, 5, 2, 64)
    assert not rule._takes_triton(x, x) and not statistics._takes_triton(x, x) and not norm._takes_triton(x)
    assert not step._takes_triton(x, x, x, True, True) and not gates._takes_triton(x)
    assert not delta_gates._takes_triton(x, x)


READS = {"read_columns": 128, "read_warps": 8}


def test_proves_every_kernel_that_a_call_may_take(monkeypatch):
    """Segments and none; also of what a table gives."""
    pytest.importorskip("triton")
    from tcal_compiler.kernels.gated_delta_rule import triton_tiles, triton_walk

    given = (CPU, torch.float32, 128, 128)
    assert [case.tokens for case in rule.cases(*given, packed=False)] == [131]
    monkeypatch.setattr(triton_walk, "processors", lambda device: 132)
    assert [len(case.bounds) for case in rule.cases(*given, packed=True)] == [5, 2]
    monkeypatch.setattr(triton_tiles, "tuned", lambda *_: READS)
    short, long = (case.tokens for case in rule.cases(*given, packed=False))
    setting = triton_tiles.setting_for(triton_tiles.sizes_of(*(torch.empty(1, 1, 1, 128) for _ in range(2))))
    assert triton_walk.cut_to_read(short // 64 + 1, 2, 128, setting, CPU).segments == 1
    cut = triton_walk.cut_to_read(long // 64, 2, 128, setting, CPU)
    assert cut.segments > 1 and (cut.columns, cut.warps) == (128, 8)
    assert triton_walk.cut_for_states(long // 64, 2, 128, setting, CPU).segments > 1


@interpreted
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_sees_what_is_wrong_in_segments_alone(monkeypatch):
    from tcal_compiler.kernels.gated_delta_rule import triton_tiles, triton_walk

    monkeypatch.setattr(triton_tiles, "tuned", lambda *_: {"read_columns": 32, "read_warps": 8})
    monkeypatch.setattr(triton_walk, "SHORTEST", 1)
    monkeypatch.setattr(triton_walk, "WORTH", 1)
    monkeypatch.setattr(triton_walk, "processors", lambda device: 8)
    with interpreter_or_skip():
        only_wrong(rule.self_check(CPU, torch.float32, 8, 40))
    join = triton_walk.Join.__call__
    monkeypatch.setattr(triton_walk.Join, "__call__", lambda *args: join(*args).flip(0))
    assert not max(rule.self_check(CPU, torch.float32, 8, 40).values()) <= self_check.ALLOWED[torch.float32]


@interpreted
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("fields", [{"no_such_field": 2}, {"read_columns": 48}], ids=str)
def test_an_entry_that_does_not_fit_is_never_used(fields, monkeypatch):
    """The operator says so once and takes its other path."""
    from tcal_compiler.kernels.gated_delta_rule import triton_tiles

    monkeypatch.setattr(triton_tiles, "tuned", lambda *_: fields)
    monkeypatch.setattr(step, "self_check", nothing_to_check)
    monkeypatch.setattr(self_check.torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(self_check.torch, "device", lambda kind, index=None: CPU)
    with pytest.warns(UserWarning, match="runs in plain PyTorch on this GPU: Triton failed"):
        assert not self_check.proved(f"rule with {fields}", rule.self_check, 0, torch.float32, 8, 40)
