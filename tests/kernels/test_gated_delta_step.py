"""The decode step against its float64 definition: in PyTorch, and its Triton kernel in the interpreter and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreter import interpreted, interpreter_or_skip
from rule_cases import exactly, make_args
from support import assert_within_budget
from torch import Tensor

from tcal_compiler.kernels import self_check
from tcal_compiler.kernels.gated_delta_rule import gated_delta_rule
from tcal_compiler.kernels.gated_delta_step import gated_delta_step, gated_delta_step_reference, op
from tcal_compiler.kernels.gated_rms_norm import gated_rms_norm
from tcal_compiler.kernels.gates import l2_normalize

Shape = tuple[int, int, int, int, int, int]  # B, T, H, K, Dk, Dv
DTYPES = list(self_check.ALLOWED)
SCALE = 0.3
NAMES = ("y", "state")
SHAPES: list[Shape] = [
    (1, 1, 2, 1, 16, 16),
    (2, 2, 4, 2, 24, 40),
    (1, 7, 3, 1, 40, 24),
    (1, 16, 1, 1, 64, 96),
    (1, 2, 2, 1, 96, 64),
    (2, 1, 2, 1, 128, 128),
    (1, 2, 1, 1, 256, 128),
    (1, 1, 1, 1, 128, 256),
    (1, 2, 1, 1, 256, 256),
    (1, 7, 2, 1, 3, 1),
]
IN_CI = [pytest.param(s, marks=pytest.mark.slow) if i in (3, 4, 6, 7) else s for i, s in enumerate(SHAPES)]
VARIANTS = [(False, False), (True, False), (False, True), (True, True)]  # normalize, normed
WIDER: list[Shape] = [
    *SHAPES,
    *((3, tokens, 6, 2, dim, dim) for tokens in (1, 7) for dim in (16, 24, 40, 64, 96, 128, 256)),
    (40, 2, 16, 4, 16, 40),
    (70, 1, 16, 16, 128, 128),
    (36, 16, 4, 4, 128, 128),
]
FALLBACK_FAILS = pytest.mark.filterwarnings("error:.*runs in plain PyTorch on this GPU")
ON_THE_GPU = [(shape, variant) for shape in WIDER for variant in (VARIANTS[0], VARIANTS[3])]
ON_THE_GPU += [(SHAPES[i], variant) for i in (1, 5) for variant in VARIANTS[1:3]]


def draw(shape: Shape, dtype: torch.dtype, *, normalize: bool, normed: bool) -> list[Tensor]:
    """Inputs on the CPU: q and k of many lengths where they are to be normalised, gate and weight where normed."""
    args = make_args(shape, torch.float64, decay=1.0)
    gen = torch.Generator().manual_seed(1)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen, dtype=torch.float64)

    if normalize:
        args[:2] = [x * (3 * randn(*x.shape[:3], 1)).exp().clamp(0.1, 100) for x in args[:2]]
    batch, tokens, heads, _, _, value_dim = shape
    if normed:
        args += [randn(batch, tokens, heads, value_dim), randn(heads, value_dim)]
    acc = torch.promote_types(dtype, torch.float32)
    return [x.to(acc if i in (3, 4, 5) else dtype) for i, x in enumerate(args)]


def triton_step(args: list[Tensor], **given: Any) -> tuple[Tensor, Tensor]:
    from tcal_compiler.kernels.gated_delta_step.triton_kernel import gated_delta_step_triton

    with interpreter_or_skip():
        return gated_delta_step_triton(*args, **given)


def check(actual: tuple[Tensor, ...], args: list[Tensor], *, factor: float = 3, **given: Any) -> None:
    """float32: against plain PyTorch's error. Narrower: against one rounding of the exact result."""
    exact, naive = gated_delta_step_reference(*exactly(args), **given), gated_delta_step_reference(*args, **given)
    for name, x, y, z in zip(NAMES, actual, exact, naive, strict=True):
        assert x.dtype == z.dtype
        if x.dtype == torch.float32:
            assert_within_budget(name, actual=x, exact=y, naive=z, factor=factor)
        else:  # the interpreter cuts bfloat16 off instead of rounding it
            assert (x.cpu().double() - y).norm() <= torch.finfo(x.dtype).eps * y.norm(), name


@pytest.mark.parametrize(("normalize", "normed"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_in_pytorch(dtype, normalize, normed):
    given: dict[str, Any] = dict(scale=SCALE, normalize=normalize, eps=1e-3)
    for shape in SHAPES:
        args = draw(shape, dtype, normalize=normalize, normed=normed)
        q, k, v, g, beta, state, *norm = args
        named = dict(zip(("gate", "weight"), norm, strict=False))
        actual = gated_delta_step(q, k, v, g=g, beta=beta, state=state, **named, **given)
        if dtype == torch.float64:
            for x, y in zip(actual, gated_delta_step_reference(*args, **given), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
        else:
            check(actual, args, **given)


@interpreted
@pytest.mark.parametrize(("normalize", "normed"), VARIANTS)
@pytest.mark.parametrize("shape", IN_CI, ids=str)
def test_in_the_interpreter(shape, normalize, normed):
    given: dict[str, Any] = dict(scale=SCALE, normalize=normalize, eps=1e-3)
    dtype = DTYPES[(SHAPES.index(shape) + VARIANTS.index((normalize, normed))) % len(DTYPES)]
    args = draw(shape, dtype, normalize=normalize, normed=normed)
    check(triton_step(args, **given), args, **given)


@interpreted
def test_tiles():
    """Every tile gives the same; many states take wide ones."""
    from tcal_compiler.kernels.gated_delta_step.triton_kernel import Tile, choose_tile, tiles

    options = tiles(128, 128, whole=False)
    assert options == [Tile(128, 32, 4), Tile(128, 16, 2), Tile(128, 8, 1)]
    assert choose_tile(options, 16, 128).BV == 8 and choose_tile(options, 2048, 128).BV == 32
    assert tiles(128, 64, whole=True) == [Tile(128, 64, 8)] and tiles(24, 3, whole=False) == [Tile(32, 8, 1)]
    assert tiles(64, 100, whole=True) == [Tile(64, 128, 8)] and tiles(64, 64, whole=True) == [Tile(64, 64, 4)]
    for dims in ((128, 100), (256, 64), (256, 256)):
        assert tiles(*dims, whole=True) == tiles(*dims, whole=False), "whole states of these are slower"
    fields = {"BV": 64, "num_warps": 8, "streams": 1}
    assert tiles(128, 128, whole=False, measured=fields) == [Tile(128, 64, 8, streams=1), *options[1:]]
    assert tiles(64, 64, whole=True, measured={"apart": 1}) == tiles(64, 64, whole=False)
    args = draw((2, 2, 2, 1, 24, 40), torch.float32, normalize=False, normed=False)
    for tile in tiles(24, 40, whole=False):
        check(triton_step(args, scale=SCALE, tile=tile), args, scale=SCALE)


@interpreted
@pytest.mark.parametrize(("fields", "dtype"), [
    ({"apart": 1, "BV": 16, "streams": 1}, torch.bfloat16), ({"apart": 1}, torch.float32),
    ({"num_warps": 4, "maxnreg": 168}, torch.float32),
], ids=str)  # fmt: skip
def test_measured_fields_in_the_interpreter(fields, dtype, monkeypatch):
    """The norm in a launch of its own, or in another tile, over odd sizes and groups, is the same step."""
    from tcal_compiler.kernels.gated_delta_step import triton_kernel

    monkeypatch.setattr(triton_kernel, "tuned", lambda op, *_: fields if op == "gated_delta_step with norm" else {})
    monkeypatch.setattr(triton_kernel, "ENOUGH_PROGRAMS", 1)
    given: dict[str, Any] = dict(scale=SCALE, normalize=True, eps=1e-3)
    for shape in ((2, 3, 4, 2, 24, 40), (1, 1, 3, 3, 8, 17)):
        args = draw(shape, dtype, normalize=True, normed=True)
        check(triton_step(args, **given), args, **given)


@interpreted
@pytest.mark.parametrize("in_place", [False, True])
def test_in_the_interpreter_any_strides(in_place):
    """q, k, v cut from one projection, and a state and a gate laid out otherwise; in place equals returned."""
    args = draw((2, 3, 4, 2, 24, 40), torch.float32, normalize=True, normed=True)
    expected = triton_step(args, scale=SCALE, normalize=True)
    joined = torch.cat([x.flatten(2) for x in args[:3]], -1)
    parts = joined.split([x.shape[2] * x.shape[3] for x in args[:3]], -1)
    cut = [part.unflatten(2, x.shape[2:]) for part, x in zip(parts, args, strict=False)]
    moved = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in args[3:]]
    actual = triton_step([*cut, *moved], scale=SCALE, normalize=True, in_place=in_place)
    assert (actual[1] is moved[2]) == in_place and not cut[0].is_contiguous() and not moved[2].is_contiguous()
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


def extremes(step: Any, device: str) -> None:
    """Full decay, no writing and full writing, keys of zeros: finite and right."""
    for normed in (False, True):
        args = draw((2, 7, 2, 1, 40, 24), torch.float32, normalize=True, normed=normed)
        args[3][0], args[3][1] = -50.0, 0.0
        args[4][:, ::2], args[4][:, 1::2] = 1.0, 0.0
        args[1][:, 3:5] = 0.0
        args[0][:, 5] = 0.0
        actual = step([x.to(device) for x in args], scale=SCALE, normalize=True)
        check(actual, args, scale=SCALE, normalize=True)
        args[4].zero_()
        _, state = step([x.to(device) for x in args], scale=SCALE, normalize=True)
        assert torch.equal(state[1].cpu(), args[5][1]), "g = 0 and beta = 0: nothing may change"


def test_extremes_in_pytorch():
    extremes(lambda args, **given: op.gated_delta_step_pytorch(*args, **given), "cpu")


@interpreted
def test_extremes_in_the_interpreter():
    extremes(triton_step, "cpu")


def a_layer(step: Any, device: str) -> None:
    """Cut into steps, each state overwritten, the core of a layer is what its parts give in one pass."""
    args = [x.to(device) for x in draw((2, 26, 4, 2, 24, 40), torch.float32, normalize=True, normed=True)]
    q, k, v, g, beta, start, gate, weight = args
    o, final = gated_delta_rule(l2_normalize(q), l2_normalize(k), v, g=g, beta=beta, initial_state=start, scale=SCALE)
    state, rows = start.clone(), []
    for part in torch.arange(26, device=device).split([1, 7, 16, 2]):
        y, state = step([*(x[:, part] for x in (q, k, v, g, beta)), state, gate[:, part], weight])
        rows.append(y)
    torch.testing.assert_close(torch.cat(rows, 1), gated_rms_norm(o, gate, weight), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-5)


def through_the_op(args: list[Tensor]) -> tuple[Tensor, Tensor]:
    q, k, v, g, beta, state, gate, weight = args
    out, new = gated_delta_step(
        q, k, v, g=g, beta=beta, state=state, gate=gate, weight=weight, scale=SCALE, normalize=True, in_place=True
    )
    assert new is state
    return out, new


def test_steps_are_the_layer():
    a_layer(through_the_op, "cpu")


@interpreted
def test_steps_are_the_layer_in_the_interpreter():
    a_layer(lambda args: triton_step(args, scale=SCALE, normalize=True, in_place=True), "cpu")


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, normed):
    args = draw((2, 3, 4, 2, 8, 5), dtype, normalize=True, normed=normed)
    args = [*args, *([] if normed else [None, None]), SCALE, True, 1e-5]
    torch.library.opcheck(torch.ops.tcal.gated_delta_step.default, args)
    torch.library.opcheck(torch.ops.tcal.gated_delta_step_.default, args)


@pytest.mark.parametrize("in_place", [False, True])
def test_compiles_without_a_break(in_place):
    args = draw((2, 3, 4, 2, 8, 5), torch.float32, normalize=False, normed=False)

    def twice(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        one, state = gated_delta_step(q, k, v, g=g, beta=beta, state=state, in_place=in_place)
        two, state = gated_delta_step(q, k, v, g=g, beta=beta, state=state, in_place=in_place)
        return one + two, state

    given, expected = [x.clone() for x in args], twice(*(x.clone() for x in args))
    actual = torch.compile(twice, backend="aot_eager", fullgraph=True)(*given)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))
    assert torch.equal(given[5], expected[1] if in_place else args[5])


def test_what_does_not_fit():
    q, k, v, g, beta, state, gate, weight = draw((1, 17, 4, 2, 8, 5), torch.float32, normalize=False, normed=True)

    def step(q: Tensor = q[:, :2], state: Tensor = state, tokens: int = 2, **norm: Tensor) -> None:
        rest = (x[:, :tokens] for x in (k, v, g, beta))
        kk, vv, gg, bb = rest
        gated_delta_step(q, kk, vv, g=gg, beta=bb, state=state, **norm)

    step(), step(gate=gate[:, :2], weight=weight)
    with pytest.raises(ValueError, match=r"gated_delta_step: want q \[B,T,H,Dk\].*H a multiple of K; got"):
        step(q=q[:, :2, :3])
    with pytest.raises(ValueError, match=r"state \[B,H,Dk,Dv\].*got"):
        step(state=state[:, :2])
    with pytest.raises(ValueError, match="17 tokens, and it takes 1 to 16"):
        step(q=q, tokens=17)
    with pytest.raises(ValueError, match="both gate and weight"):
        step(gate=gate[:, :2])
    with pytest.raises(RuntimeError, match="no gradient"):
        step(state=state.requires_grad_())
    with torch.no_grad():
        step()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "variant"), ON_THE_GPU, ids=str)
def test_on_the_gpu(shape, variant, dtype):
    normalize, normed = variant
    given: dict[str, Any] = dict(scale=SCALE, normalize=normalize, eps=1e-3)
    args = draw(shape, dtype, normalize=normalize, normed=normed)
    there = [x.cuda() for x in args]
    first, second = triton_step(there, **given), triton_step(there, **given)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True)), "two runs differ"
    assert torch.equal(there[5].cpu(), args[5]), "the given state changed"
    check(first, args, factor=4, **given)
    out, state = triton_step(there, **given, in_place=True)
    assert state is there[5] and torch.equal(out, first[0]) and torch.equal(state, first[1])


@pytest.mark.gpu
def test_extremes_on_the_gpu():
    extremes(triton_step, "cuda")


@pytest.mark.gpu
@FALLBACK_FAILS
def test_steps_are_the_layer_on_the_gpu():
    a_layer(through_the_op, "cuda")


@pytest.mark.gpu
@FALLBACK_FAILS
@pytest.mark.parametrize("triton", [False, True])
def test_a_cuda_graph_replays_steps(triton, monkeypatch):
    """Three steps in a captured graph, replayed on new inputs, are three steps; both paths."""
    if not triton:
        monkeypatch.setattr(op, "takes_triton", lambda *_: False)
    drawn = draw((1, 1, 16, 4, 128, 128), torch.bfloat16, normalize=True, normed=True)
    args = [x.cuda() for x in drawn]
    through_the_op([*args[:5], args[5].clone(), *args[6:]])  # the proof, and what is compiled
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        outs = [through_the_op(args)[0] for _ in range(3)]
    for sign in (1.0, -1.0):
        args[2].copy_(drawn[2] * sign)
        args[5].copy_(drawn[5])
        graph.replay()
        state = drawn[5].double()
        for out in outs:
            inputs = exactly([drawn[0], drawn[1], drawn[2] * sign, drawn[3], drawn[4], state, *drawn[6:]])
            y, state = gated_delta_step_reference(*inputs, scale=SCALE, normalize=True)
            assert (out.cpu().double() - y).norm() < 1e-2 * y.norm()
        assert (args[5].cpu().double() - state).norm() < 1e-5 * state.norm()
