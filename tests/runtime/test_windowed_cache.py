"""Sliding-window sites that forget what their window left behind: token for token the form that keeps everything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from tiny_models import DIM, KV_HEADS, VOCAB, TinyModel
from torch import Tensor

from tcal_compiler.errors import ExportError
from tcal_compiler.kernels.cached_attention import held_positions
from tcal_compiler.passes.capture import capture_program, example_ids, export_module
from tcal_compiler.passes.choose import choose
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.passes.graph import widen_to_float64
from tcal_compiler.passes.make_stateful import make_stateful, run_chunks
from tcal_compiler.passes.stateful_graph import StatefulGraph
from tcal_compiler.passes.types import Capture
from tcal_compiler.runtime.config import ExportConfig
from tcal_compiler.runtime.initialize import naive_
from tcal_compiler.runtime.onnx_export import export_onnx
from tcal_compiler.runtime.onnx_parity import torch_generate
from tcal_compiler.runtime.session import OnnxSession
from tcal_compiler.runtime.session_state import SessionState
from tcal_compiler.runtime.student import make_student

LENGTH, CONTEXT = 118, 150
WINDOWS = (9, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 118, 140)))
SIZES = (1, 3, 17, 100)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny products run faster on one thread, and much faster on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def student(window: int) -> Capture:
    """Layer 0 keeps a window, the last layer is converted; behind a window of 9 there is one that keeps everything."""
    name = f"window of {window}"
    tiny_models.CORES[name] = tiny_models.masked(lambda d: (d >= 0) & (d < window))
    model = TinyModel((name, *["is_causal"] * (2 if window == 9 else 1)), sharp=4.0)
    program = export_module(model, has_positions=False, vocab_size=VOCAB)
    teacher = capture_program(program, teacher=model, implementation="test", shapes=((2, 9),))
    scan = find_attention(teacher)
    made = make_student(teacher, scan, choose(scan, "keep=0,1" if window == 9 else "keep=0"))
    naive_(made.gm.get_submodule(f"tcal_mixers.{made.converted[0].index}"), torch.Generator().manual_seed(1))
    return capture_program(made.export(), teacher=made.gm, implementation="student", shapes=((2, 9),))


def stateful(window: int, *, bounded: bool = True, wide: bool = False) -> StatefulGraph:
    capture = student(window)
    capture = replace(capture, gm=widen_to_float64(capture.gm)) if wide else capture
    return make_stateful(capture, verify=False, max_length=CONTEXT, bounded=bounded)


def cuts(size: int) -> tuple[int, ...]:
    rest = LENGTH % size
    return (size,) * (LENGTH // size) + ((rest,) if rest else ())


def ragged() -> tuple[Tensor, Tensor]:
    """Rows without padding, with some on the left, on the right, and in between over more than a chunk."""
    ids, mask = example_ids(4, LENGTH, VOCAB), torch.ones(4, LENGTH, dtype=torch.int64)
    mask[1, :25], mask[2, 90:], mask[3, 40:60] = 0, 0, 0
    return ids, mask


@pytest.mark.parametrize("window", WINDOWS)
def test_any_cut_of_ragged_rows_is_the_form_that_keeps_everything(window: int):
    small, whole = stateful(window, wide=True), stateful(window, bounded=False, wide=True)
    ids, mask = ragged()
    exact, kept = run_chunks(whole, ids, (LENGTH,), mask=mask, dtype=torch.float64)
    assert kept[0].shape == (4, KV_HEADS, LENGTH, DIM)
    for size in SIZES:
        found, state = run_chunks(small, ids, cuts(size), mask=mask, dtype=torch.float64)
        torch.testing.assert_close(found[mask == 1], exact[mask == 1], rtol=0, atol=1e-11)
        assert state[0].shape == state[1].shape == (4, KV_HEADS, max(window - 1, 1), DIM)
    alone, _ = run_chunks(small, ids[3:][mask[3:] == 1][None], (98,), dtype=torch.float64)
    torch.testing.assert_close(found[3][mask[3] == 1], alone[0], rtol=0, atol=1e-11)


def test_the_state_is_the_last_tokens_in_order():
    """Keys and values of the whole form's last slots, by row."""
    small, whole = stateful(9, wide=True), stateful(9, bounded=False, wide=True)
    ids, mask = ragged()
    (_, now), (_, everything) = (run_chunks(g, ids, cuts(17), mask=mask, dtype=torch.float64) for g in (small, whole))
    for row, count in enumerate(mask.sum(1).tolist()):
        for part in (0, 1):
            expected = everything[part][row, :, count - 8 : count]
            torch.testing.assert_close(now[part][row], expected, rtol=0, atol=1e-12)


def test_a_window_of_the_whole_context_is_a_cache():
    layers = [make_stateful(student(140), verify=False, max_length=n).layers[0] for n in (139, 140)]
    assert [layer.held for layer in layers] == [None, 139] and held_positions(1) == 1


@dataclass(frozen=True)
class Deployed:
    window: int
    folder: Path
    whole: StatefulGraph

    def session(self) -> OnnxSession:
        return OnnxSession(self.folder, threads=1)


@pytest.fixture(scope="module", params=[9, pytest.param(60, marks=pytest.mark.slow)])
def deployed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    folder = tmp_path_factory.mktemp("onnx")
    export_onnx(stateful(request.param), folder, config=ExportConfig(), info={"context_length": CONTEXT})
    return Deployed(request.param, folder, stateful(request.param, bounded=False))


PROMPT = example_ids(1, 100, VOCAB, seed=5)[0].tolist()


@pytest.mark.parametrize("length", [4, 9, 100])  # less than, as much as and more than a window
def test_onnx_runtime_gives_the_tokens_of_the_form_that_keeps_everything(deployed: Deployed, length: int):
    expected, _ = torch_generate(deployed.whole, PROMPT[:length], 50)
    session = deployed.session()
    assert list(session.generate(PROMPT[:length], 50)) == expected and len(set(expected)) > 5
    for size in SIZES:
        session.reset()
        for start in range(0, length, size):
            logits = session.prefill(PROMPT[start : min(start + size, length)])
        assert int(logits.argmax()) == expected[0]
        assert list(session.generate(expected[:1], 49)) == expected[1:]


def test_ragged_batches_in_the_runtime_at_any_cut(deployed: Deployed):
    ids, mask = ragged()
    exact, _ = run_chunks(deployed.whole, ids, (LENGTH,), mask=mask, dtype=torch.float32)
    session = deployed.session()
    for size in SIZES:
        session.reset(batch=4)
        parts = zip(ids.split(size, 1), mask.split(size, 1), strict=True)
        found = np.concatenate([session.forward(i.numpy(), m.numpy()) for i, m in parts], 1)
        np.testing.assert_allclose(found[mask == 1], exact[mask == 1].numpy(), atol=1e-4)
    prompts = [PROMPT[:30], PROMPT[:3], PROMPT[5:20]]
    alone = [torch_generate(deployed.whole, p, 40)[0] for p in prompts]
    for side in ("left", "right"):
        assert session.generate_batch(prompts, 40, padding=side) == alone


def test_save_restore_and_fork(deployed: Deployed, tmp_path: Path):
    session, other = deployed.session(), deployed.session()
    for tokens in (PROMPT[:4], PROMPT):
        session.reset()
        session.prefill(tokens)
        session.snapshot().save(tmp_path / "state.npz")
        fork = session.fork()
        expected = list(session.generate([7], 30))
        other.restore(SessionState.load(tmp_path / "state.npz"))
        assert list(fork.generate([7], 30)) == list(other.generate([7], 30)) == expected
        assert torch_generate(deployed.whole, [*tokens, 7], 30)[0] == expected


def test_what_is_remembered_stops_growing(deployed: Deployed):
    session = deployed.session()
    sizes = []
    for _ in range(100):
        session.step(1)
        sizes.append(session.state_bytes)
    token, steps, window = KV_HEADS * 2 * DIM * 4, np.diff(sizes), deployed.window
    caches = token if window == 9 else 0
    assert (steps[: window - 2] == caches + token).all() and (steps[window - 2 :] == caches).all()


def test_a_snapshot_of_another_length_is_refused(deployed: Deployed):
    session = deployed.session()
    session.prefill(PROMPT[:4])
    kept = session.snapshot()
    for slots in (3, 5):
        window = np.zeros((1, KV_HEADS, slots, DIM), np.float32)
        with pytest.raises(ExportError, match="not those of the model's state"):
            session.restore(replace(kept, values=(window, *kept.values[1:])))
