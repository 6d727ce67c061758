"""Properties of whole students, full graph and graph with state, over random lengths, cuts and padding (Hypothesis).

The graphs run in float64, so that only a fault and no rounding separates two ways to the same logits.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCAB, scanned
from torch import Tensor

from tcal_compiler.passes.capture import capture_program, example_ids
from tcal_compiler.passes.choose import choose
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.passes.graph import widen_to_float64
from tcal_compiler.passes.make_stateful import make_stateful, run_chunks
from tcal_compiler.passes.stateful_graph import StatefulGraph
from tcal_compiler.passes.types import Capture
from tcal_compiler.runtime.initialize import naive_
from tcal_compiler.runtime.mixer import GdnMixer
from tcal_compiler.runtime.student import make_student

quick = settings(max_examples=8, deadline=None, derandomize=True)
HYBRID = "keep=0"
EXTREME = "keep=1"  # see extreme_


@cache
def student(policy: str) -> tuple[Capture, StatefulGraph]:
    """A teacher of two layers, one or both of them converted, in float64."""
    teacher, _ = scanned(layers=2)
    scan = find_attention(teacher)
    made = make_student(teacher, scan, choose(scan, policy))
    gen = torch.Generator().manual_seed(1)
    for site in made.converted:
        mixer = made.gm.get_submodule(f"tcal_mixers.{site.index}")
        naive_(mixer, gen)
        if policy == EXTREME:
            extreme_(mixer)
    capture = capture_program(made.export(), teacher=made.gm, implementation="student", shapes=((2, 9),))
    capture = replace(capture, gm=widen_to_float64(capture.gm))
    if policy == EXTREME:
        with torch.no_grad():  # the first layer's queries, keys and values of token 0 are then 0
            next(p for n, p in capture.gm.named_parameters() if n.endswith("embed.weight"))[0] = 0
    return capture, make_stateful(capture, verify=False, max_length=1 << 14)


@torch.no_grad()
def extreme_(mixer: GdnMixer) -> None:
    """The four heads: every pair of g = 0 or -50 and beta = 1 or 0, at every token."""
    for proj in (mixer.a_proj, mixer.b_proj):
        proj.weight.zero_()
    mixer.A_log.zero_()
    mixer.dt_bias.copy_(torch.tensor([-1e3, 50.0, -1e3, 50.0]))
    mixer.b_proj.bias.copy_(torch.tensor([1e3, 1e3, -1e3, -1e3]))


def whole(ids: Tensor, policy: str = HYBRID) -> Tensor:
    capture, _ = student(policy)
    with torch.no_grad():
        return capture.gm(*capture.inputs(ids))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@quick
@given(batch=st.integers(1, 3), tokens=st.integers(2, 90), data=st.data())
def test_no_token_sees_a_later_one(batch, tokens, data):
    cut = data.draw(st.integers(1, tokens - 1))
    ids = example_ids(batch, tokens, VOCAB, seed=tokens)
    other = torch.cat([ids[:, :cut], (ids[:, cut:] + 1) % VOCAB], 1)
    first, second = whole(ids), whole(other)
    close(first[:, :cut], second[:, :cut])
    assert not torch.allclose(first[:, cut:], second[:, cut:], atol=1e-6)


@quick
@given(batch=st.integers(1, 3), chunks=st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_any_cut_with_carried_state_is_one_pass(batch, chunks):
    ids = example_ids(batch, sum(chunks), VOCAB, seed=len(chunks))
    logits, _ = run_chunks(student(HYBRID)[1], ids, tuple(chunks), dtype=torch.float64)
    close(logits, whole(ids))


@quick
@given(tokens=st.integers(1, 90), data=st.data())
def test_extreme_gates_and_zero_keys_stay_finite_causal_and_whole_at_any_cut(tokens, data):
    ids = example_ids(2, tokens, VOCAB, seed=tokens)
    ids[:, data.draw(st.integers(0, tokens - 1)) :: 3] = 0
    logits, cut = whole(ids, EXTREME), data.draw(st.integers(1, tokens))
    assert logits.isfinite().all()
    close(whole(ids[:, :cut], EXTREME), logits[:, :cut])
    chunks = (cut, tokens - cut) if cut < tokens else (tokens,)
    close(run_chunks(student(EXTREME)[1], ids, chunks, dtype=torch.float64)[0], logits)


def test_views_of_ids_are_invisible_and_runs_repeat():
    ids = example_ids(3, 70, VOCAB, seed=1)
    views = (ids.T.contiguous().T, torch.stack([ids, -ids], 2)[..., 0])
    assert not any(view.is_contiguous() for view in views)
    assert all(torch.equal(whole(x), whole(ids)) for x in (ids, *views))


@quick
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    left=st.lists(st.integers(0, 30), min_size=4, max_size=4),
    right=st.integers(0, 30),
    data=st.data(),
)
def test_padding_and_the_order_of_rows_are_invisible(lengths, left, right, data):
    """Rows of any lengths, one token too, padded on both sides with random tokens, in any order and any two chunks."""
    order = data.draw(st.permutations(range(len(lengths))))
    width = max(n + left[i] for i, n in enumerate(lengths)) + right
    ids, mask = example_ids(len(lengths), width, VOCAB, seed=5), torch.zeros(len(lengths), width, dtype=torch.int64)
    rows = [example_ids(1, n, VOCAB, seed=n)[0] for n in lengths]
    for place, i in enumerate(order):
        part = slice(left[i], left[i] + lengths[i])
        ids[place, part], mask[place, part] = rows[i], 1
    cut = data.draw(st.integers(1, width))
    chunks = (cut, width - cut) if cut < width else (width,)
    logits, _ = run_chunks(student(HYBRID)[1], ids, chunks, mask=mask, dtype=torch.float64)
    assert logits.isfinite().all()
    for place, i in enumerate(order):
        close(logits[place][mask[place] == 1], whole(rows[i][None])[0])


@pytest.mark.parametrize("policy, tokens", [(HYBRID, 1500), pytest.param("none", 8192, marks=pytest.mark.slow)])
def test_long_sequences_in_one_pass_and_in_pieces(policy, tokens):
    ids = example_ids(1, tokens, VOCAB, seed=3)
    pieces = (tokens // 2 - 1, 1, tokens - tokens // 2)
    logits, _ = run_chunks(student(policy)[1], ids, pieces, dtype=torch.float64)
    close(logits, whole(ids, policy))
