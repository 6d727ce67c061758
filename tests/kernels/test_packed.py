"""Sequences of several lengths in one row (cu_seqlens): each is as if alone, its state and all gradients too."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import interpreted, interpreter_or_skip
from rule_cases import NAMES, SCALE, exactly, make_args, with_gradients
from support import assert_within_budget
from torch import Tensor

from tcal_compiler.kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_reference

LENGTHS = [
    (1,),
    (5, 1, 3),
    (63, 65, 64),
    (0, 70, 0, 0, 7, 0),
    (130, 2, 17),
]
Rule = Callable[[list[Tensor]], tuple[Tensor, Tensor]]


def make_packed(lengths: tuple[int, ...], heads: tuple[int, ...], dtype=torch.float64, **given: float) -> list[Tensor]:
    """q, k, v, g, beta [1, T, ...] of all tokens, and a state for every sequence; heads: H, K, Dk, Dv."""
    args = make_args((1, sum(lengths), *heads), dtype, **given)
    return [*args[:5], make_args((len(lengths), 1, *heads), dtype, seed=1)[5]]


def ends(lengths: tuple[int, ...], dtype: torch.dtype = torch.int64, device: str = "cpu") -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=dtype, device=device)


def packed(cu_seqlens: Tensor) -> Rule:
    def rule(args: list[Tensor]) -> tuple[Tensor, Tensor]:
        q, k, v, g, beta, state = args
        return gated_delta_rule(q, k, v, g=g, beta=beta, initial_state=state, scale=SCALE, cu_seqlens=cu_seqlens)

    return rule


def alone(lengths: tuple[int, ...]) -> Rule:
    """The recurrence over each sequence's own tokens, from its own state."""

    def rule(args: list[Tensor]) -> tuple[Tensor, Tensor]:
        parts = zip(*(x.split(lengths, 1) for x in args[:5]), args[5].split(1), strict=True)
        results = [
            gated_delta_rule_reference(*part, scale=SCALE) if part[0].shape[1] else (part[2].new_empty(0), part[5])
            for part in parts
        ]
        return torch.cat([o for o, _ in results if o.numel()], 1), torch.cat([state for _, state in results])

    return rule


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("number", [torch.int32, torch.int64], ids=str)
def test_every_sequence_is_as_if_alone(lengths, number):
    args = make_packed(lengths, (4, 2, 8, 12))
    expected = with_gradients(alone(lengths), args)
    for name, x in with_gradients(packed(ends(lengths, number)), args).items():
        torch.testing.assert_close(x, expected[name], rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    out, state = gated_delta_rule_reference(*args, scale=SCALE, bounds=tuple(ends(lengths).tolist()))
    assert torch.equal(out, expected["o"]) and torch.equal(state, expected["state"])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 80), min_size=1, max_size=6).filter(any).map(tuple),
    heads=st.sampled_from([(1, 1, 3, 5), (6, 2, 8, 8), (4, 4, 17, 16)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    decay=st.sampled_from([0.01, 6.0]),
)
def test_any_lengths_err_no_more_than_plain_pytorch(lengths, heads, dtype, decay):
    args = make_packed(lengths, heads, dtype, decay=decay)
    exact, naive = alone(lengths)(exactly(args)), alone(lengths)(args)
    for name, x, y, z in zip(("o", "state"), packed(ends(lengths))(args), exact, naive, strict=True):
        assert_within_budget(name, actual=x, exact=y, naive=z, factor=4.0)


def test_states_default_to_zeros_one_for_each_sequence():
    q, k, v, g, beta, state = make_packed((3, 0, 9), (2, 1, 4, 6))
    expected = packed(ends((3, 0, 9)))([q, k, v, g, beta, torch.zeros_like(state)])
    actual = gated_delta_rule(q, k, v, g=g, beta=beta, scale=SCALE, cu_seqlens=ends((3, 0, 9)))
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([0, 3, 2, 9], "may not fall, but goes from 3 to 2 at 1"),
        ([1, 3, 4, 9], "want 0 to 9, the number of tokens; got 1 to 9"),
        ([0, 3, 4, 8], "got 0 to 8"),
        ([0, 3, 9], "3 numbers and 3 states"),
        ([0.0, 3.0, 4.0, 9.0], "want int32 or int64, got torch.float32"),
        ([[0, 3, 4, 9]], r"want q .*cu_seqlens \[N\+1\].*got|want cu_seqlens \[N \+ 1\], got \(1, 4\)"),
    ],
)
def test_lengths_that_do_not_fit(cu_seqlens, message):
    args = make_packed((3, 1, 5), (2, 1, 4, 4))
    with pytest.raises(ValueError, match=message):
        packed(torch.tensor(cu_seqlens))(args)
    with pytest.raises(ValueError, match="batch of 2"):
        two = [x.expand(2, *x.shape[1:]) for x in args[:5]]
        packed(ends((3, 1, 5)))([*two, args[5]])


def test_lengths_and_states_of_another_kind():
    q, k, v, g, beta, state = make_packed((3, 1, 5), (2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"floating-point numbers, got torch\.int64"):
        gated_delta_rule(q, k, v, g=g, beta=beta, initial_state=state.long(), cu_seqlens=ends((3, 1, 5)))
    for lengths, message in ((ends((3, 1, 5)).to("meta"), "got meta"), (torch.tensor([]), r"got \(0,\)")):
        with pytest.raises(ValueError, match=message):
            gated_delta_rule(q, k, v, g=g, beta=beta, cu_seqlens=lengths)


def test_gradcheck_and_opcheck():
    args = [x.requires_grad_() for x in make_packed((2, 0, 3), (2, 1, 3, 2))]
    cu_seqlens = ends((2, 0, 3))
    assert torch.autograd.gradcheck(lambda *a: packed(cu_seqlens)(list(a)), args, fast_mode=True)
    torch.library.opcheck(torch.ops.tcal.gated_delta_rule.default, (*args, SCALE, cu_seqlens))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(backend):
    args, cu_seqlens = make_packed((4, 7), (2, 1, 8, 4), torch.float32), ends((4, 7))
    expected = with_gradients(packed(cu_seqlens), args)
    compiled = torch.compile(packed(cu_seqlens), backend=backend, fullgraph=True)
    for name, actual in with_gradients(compiled, args).items():
        torch.testing.assert_close(actual, expected[name])


def test_vmap_is_the_loop():
    """Layers of a stack with the same lengths, and with lengths of their own."""
    lengths = [(3, 70, 0), (40, 0, 33)]
    layers = [make_packed(each, (4, 2, 8, 8), torch.float32, seed=i) for i, each in enumerate(lengths)]
    stacked = [torch.stack(x) for x in zip(*layers, strict=True)]
    same = ends(lengths[0])
    together = with_gradients(lambda a: torch.vmap(lambda *x: packed(same)(list(x)))(*a), stacked)
    for i, layer in enumerate(layers):
        out, state = packed(same)(layer)
        assert torch.equal(together["o"][i], out) and torch.equal(together["state"][i], state)
    own = torch.stack([ends(each) for each in lengths])
    mapped, _ = torch.vmap(lambda cu, *x: packed(cu)(list(x)))(own, *stacked)
    assert all(torch.equal(mapped[i], packed(own[i])(layer)[0]) for i, layer in enumerate(layers))


@pytest.mark.parametrize("row", [[0, 3, 8], [1, 3, 9], [0, 3, 10]], ids=str)
def test_vmap_refuses_a_row_whose_numbers_would_reach_into_the_next(row):
    layer = make_packed((3, 6), (2, 1, 4, 4))
    stacked, own = [torch.stack([x, x]) for x in layer], torch.stack([torch.tensor(row), ends((3, 6))])
    for lengths in (own, own.flip(0)):
        with pytest.raises(ValueError, match="under vmap, not from 0 to the number of tokens in each row"):
            torch.vmap(lambda cu, *x: packed(cu)(list(x)))(lengths, *stacked)


def layout_of(q: Tensor, bounds: tuple[int, ...]) -> Any:
    from tcal_compiler.kernels.gated_delta_rule import triton_layout, triton_tiles

    return triton_layout.layout_of(triton_tiles.sizes_of(q, q), bounds)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 400), min_size=1, max_size=6).filter(any), length=st.integers(1, 8))
def test_chunks_and_segments_tile_every_sequence(lengths, length):
    pytest.importorskip("triton")
    bounds = (0, *accumulate(lengths))
    layout = layout_of(torch.empty(1, bounds[-1], 2, 4), bounds)
    chunks = [(t, end) for start, end in pairwise(bounds) for t in range(start, end, 64)]
    assert layout.table.tolist() == [list(chunk) for chunk in chunks]
    assert layout.longest == max(-(-n // 64) for n in lengths) and layout.rows == 2
    cuts = layout.cuts(-(-layout.longest // length))
    assert cuts.length <= length and cuts.total == len(cuts.table) == cuts.firsts[-1]
    walked = []
    for b, origin, tokens, first, count, segment, segments in cuts.table.tolist():
        assert (origin, tokens) == (bounds[b], lengths[b]) and 0 <= segment < segments
        assert cuts.firsts[b + 1] - cuts.firsts[b] == segments
        walked += range(first + segment * cuts.length, first + min((segment + 1) * cuts.length, count))
    assert walked == list(range(layout.chunks))


def test_layers_share_the_tables():
    pytest.importorskip("triton")
    first, second = (layout_of(torch.empty(1, 75, 2, 4), (0, 70, 75)) for _ in range(2))
    assert first.table is second.table and first.cuts(2).table is second.cuts(2).table


def kernels(lengths: tuple[int, ...], args: list[Tensor], device: str) -> dict[str, Tensor]:
    """Outputs and gradients straight from the kernels, past the dispatcher, for the seeds of `with_gradients`."""
    from tcal_compiler.kernels.gated_delta_rule.triton_backward import gated_delta_rule_triton_backward
    from tcal_compiler.kernels.gated_delta_rule.triton_forward import gated_delta_rule_triton

    given = {"scale": SCALE, "bounds": (0, *accumulate(lengths))}
    args = [x.to(device) for x in args]
    outputs = gated_delta_rule_triton(*args, **given)
    gen = torch.Generator().manual_seed(99)
    seeds = [(torch.randint(-16, 17, x.shape, generator=gen) / 8).to(x) for x in outputs]
    grads = gated_delta_rule_triton_backward(*seeds, *args, **given)
    return dict(zip(("o", "state"), outputs, strict=True)) | {f"d_{n}": x for n, x in zip(NAMES, grads, strict=True)}


@interpreted
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize(("lengths", "heads", "segments"), [((65, 0, 5), 1, 1), ((130, 0, 5), 2, 3)], ids=str)
def test_kernels_in_the_interpreter(lengths, heads, segments, monkeypatch):
    """Sequences of several chunks, of one and of none; the first in segments of one chunk, or none cut."""
    from tcal_compiler.kernels.gated_delta_rule import triton_walk

    cut = triton_walk.Cut(segments=segments, columns=16, stages=1)
    for each in ("cut_for_states", "cut_to_read"):
        monkeypatch.setattr(triton_walk, each, lambda *_: cut)
    args = make_packed(lengths, (heads, 1, 8, 8), torch.float32, decay=0.05)
    with interpreter_or_skip():
        actual = kernels(lengths, args, "cpu")
    exact, naive = with_gradients(alone(lengths), exactly(args)), with_gradients(alone(lengths), args)
    for name, x in actual.items():
        assert_within_budget(name, actual=x, exact=exact[name], naive=naive[name], factor=4)


WIDER = [  # lengths; H, K, Dk, Dv
    ((1, 2, 3), (4, 2, 64, 64)),
    ((64, 128, 0, 63, 65, 1), (6, 2, 64, 64)),
    ((700, 40, 0, 129), (4, 1, 128, 128)),
    ((257, 5), (2, 1, 256, 256)),
    ((0, 130, 3, 80), (2, 2, 80, 48)),
    (tuple(range(1, 100, 7)) * 4, (9, 3, 64, 64)),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("lengths", "heads"), WIDER, ids=lambda x: str(x)[:40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_the_gpu(lengths, heads, dtype):
    """As near to float64 as sequences that are not packed (test_triton_rule), and the same on every run."""
    args = make_packed(lengths, heads, dtype, decay=0.3)
    exact = with_gradients(packed(ends(lengths)), exactly(args))
    plain = with_gradients(packed(ends(lengths)), args) if dtype == torch.float32 else {}
    first, second = kernels(lengths, args, "cuda"), kernels(lengths, args, "cuda")
    for name, x in first.items():
        assert torch.equal(x, second[name]), f"{name}: two runs differ"
        naive = plain[name] if dtype == torch.float32 else exact[name].to(dtype)
        factor = {torch.float32: 4.0, torch.bfloat16: 2.5, torch.float16: 2.0}[dtype]
        assert_within_budget(name, actual=x.to(dtype), exact=exact[name], naive=naive, factor=factor)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_sequences_are_cut_on_the_gpu(dtype):
    from tcal_compiler.kernels.gated_delta_rule import triton_walk
    from tcal_compiler.kernels.gated_delta_rule.triton_tiles import setting_for, sizes_of

    lengths = (3000, 40, 5000, 0)
    args = make_packed(lengths, (2, 1, 64, 64), dtype, decay=0.02)
    layout = layout_of(args[0].cuda(), (0, *accumulate(lengths)))
    setting = setting_for(sizes_of(args[0].cuda(), args[2].cuda()))
    cut = triton_walk.cut_to_read(layout.longest, layout.whole_rows, 64, setting, layout.device)
    assert layout.cuts(cut.segments).total > len(lengths) + 8
    exact, plain = with_gradients(packed(ends(lengths)), exactly(args)), with_gradients(packed(ends(lengths)), args)
    for name, x in kernels(lengths, args, "cuda").items():
        naive = plain[name] if dtype == torch.float32 else exact[name].to(dtype)
        factor = 4.0 if dtype == torch.float32 else 2.5
        assert_within_budget(name, actual=x.to(dtype), exact=exact[name], naive=naive, factor=factor)


@pytest.mark.gpu
def test_op_on_the_gpu_takes_lengths_from_either_device_and_compiles():
    lengths = (70, 0, 33)
    args = [x.cuda() for x in make_packed(lengths, (4, 2, 32, 32), torch.float32)]
    expected = with_gradients(packed(ends(lengths)), exactly(args))
    for device in ("cuda", "cpu"):
        rule = packed(ends(lengths, torch.int32, device))
        for each in (rule, torch.compile(rule, backend="aot_eager", fullgraph=True)):
            for name, x in with_gradients(each, args).items():
                torch.testing.assert_close(x.cpu().double(), expected[name], rtol=1e-3, atol=1e-4)
