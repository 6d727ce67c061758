"""A running student: state kept between calls, copies of it, streaming, limits and damaged files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcal_compiler.errors import ConfigError, DataError, ExportError
from tcal_compiler.passes.capture import capture_program, export_module
from tcal_compiler.passes.choose import choose
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.passes.make_stateful import make_stateful
from tcal_compiler.passes.stateful_graph import StatefulGraph
from tcal_compiler.runtime import session as session_module
from tcal_compiler.runtime.config import ExportConfig
from tcal_compiler.runtime.initialize import naive_
from tcal_compiler.runtime.onnx_export import OnnxArtifact, export_onnx
from tcal_compiler.runtime.onnx_parity import check_parity, torch_generate
from tcal_compiler.runtime.sampling import Sampler
from tcal_compiler.runtime.session import OnnxSession
from tcal_compiler.runtime.session_state import SessionState
from tcal_compiler.runtime.student import make_student

VOCAB, WIDTH, CONTEXT = 64, 32, 100
PROMPT = [3, 14, 15, 9, 26]


class Model(nn.Module):
    """Two causal attention blocks with learned positions, in plain PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.where = nn.Embedding(VOCAB, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.qkv = nn.ModuleList([nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2)])
        self.out = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        b, t = input_ids.shape
        x = self.embed(input_ids) + self.where(torch.arange(t))
        for qkv, out in zip(self.qkv, self.out, strict=True):
            q, k, v = (z.view(b, t, 4, 8).transpose(1, 2) for z in qkv(x).split(WIDTH, -1))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + out(y.transpose(1, 2).reshape(b, t, WIDTH))
        return self.head(x)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny products run faster on one thread, and much faster on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> tuple[StatefulGraph, Path]:
    torch.manual_seed(0)
    model = Model().eval()
    program = export_module(model, has_positions=False, vocab_size=VOCAB)
    capture = capture_program(program, teacher=model, implementation="sdpa", shapes=((2, 9),))
    scan = find_attention(capture)
    student = make_student(capture, scan, choose(scan, "keep=0"))
    naive_(student.gm.get_submodule("tcal_mixers.1"), torch.Generator().manual_seed(1))
    own = capture_program(student.export(), teacher=student.gm, implementation="student", shapes=((2, 9),))
    stateful = make_stateful(own, verify=False)
    folder = tmp_path_factory.mktemp("onnx")
    export_onnx(stateful, folder, config=ExportConfig(), info={"context_length": CONTEXT, "eos_token_id": 0})
    return stateful, folder


@pytest.fixture
def session(deployed: tuple[StatefulGraph, Path]) -> OnnxSession:
    return OnnxSession(deployed[1], threads=1)


def test_greedy_tokens_are_those_of_torch(deployed: tuple[StatefulGraph, Path], session: OnnxSession):
    tokens, logits = torch_generate(deployed[0], PROMPT, 20)
    assert list(session.generate(PROMPT, 20)) == tokens
    assert logits.shape == (20, VOCAB) and len(set(tokens)) > 2
    assert session.length == len(PROMPT) + 19  # the last token was yielded, not fed


def test_it_is_compared_with_torch_within_its_context(deployed: tuple[StatefulGraph, Path]):
    stateful, folder = deployed
    artifact = OnnxArtifact(folder / "model.onnx", "ort", 21, stateful.layers, CONTEXT)
    checks = check_parity(artifact, stateful, prompts=[list(range(60))], new_tokens=60, length=CONTEXT + 20, threads=1)
    assert all(c.passed for c in checks) and checks[-1].detail.startswith("51 tokens"), checks


def test_prefill_at_any_cut_is_the_same(session: OnnxSession, monkeypatch: pytest.MonkeyPatch):
    ids = list(range(40))
    whole = session.prefill(ids)
    session.reset()
    for token in ids:
        one_by_one = session.step(token)
    session.reset()
    monkeypatch.setattr(session_module, "_LONGEST_CHUNK", 7)
    np.testing.assert_allclose(session.prefill(ids), whole, atol=1e-5)
    np.testing.assert_allclose(one_by_one, whole, atol=1e-5)


def test_a_snapshot_can_be_continued_many_times_and_elsewhere(
    deployed: tuple[StatefulGraph, Path], session: OnnxSession
):
    session.prefill(PROMPT)
    kept = session.snapshot()
    first = list(session.generate([7], 10))
    other = list(session.generate([8, 9], 10))
    session.restore(kept)
    assert session.length == len(PROMPT)
    assert list(session.generate([7], 10)) == first != other
    fork = OnnxSession(deployed[1], threads=1)
    fork.restore(kept)
    assert list(fork.generate([7], 10)) == first


def test_results_of_one_run_survive_the_next(session: OnnxSession):
    """Buffers are reused for the state only, never for logits that were handed out."""
    logits = session.prefill(PROMPT)
    copy = logits.copy()
    session.step(1)
    session.step(2)
    np.testing.assert_array_equal(logits, copy)


def test_reset_forgets(session: OnnxSession):
    first = session.prefill(PROMPT)
    session.step(4)
    session.reset()
    np.testing.assert_array_equal(session.prefill(PROMPT), first)


def test_state_grows_by_the_kept_layers_only(session: OnnxSession):
    session.prefill([1])
    small = session.state_bytes
    for _ in range(9):
        session.step(1)
    assert session.state_bytes - small == 9 * 2 * 4 * 8 * 4  # tokens, key and value, heads, width, bytes


def test_eos_ends_the_stream(session: OnnxSession):
    tokens = list(session.generate(PROMPT, 20))
    session.reset()
    stop = tokens[2]
    assert list(session.generate(PROMPT, 20, eos=stop)) == tokens[: tokens.index(stop) + 1]
    assert session.eos_token_id == 0


def test_sampling_is_seeded_and_narrowed(session: OnnxSession):
    def sample(**options: float) -> list[int]:
        session.reset()
        return list(session.generate(PROMPT, 15, **options))  # type: ignore[arg-type]

    greedy = sample()
    assert sample(temperature=1.0, top_k=1) == sample(temperature=1.0, top_p=1e-9) == greedy
    warm = sample(temperature=2.0, seed=5)
    assert warm == sample(temperature=2.0, seed=5) != sample(temperature=2.0, seed=6)


def test_sampler_keeps_the_fewest_tokens_that_reach_top_p():
    logits, rng = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32)), np.random.default_rng(0)
    draws = [Sampler(1.0, top_p=0.75)(logits, rng) for _ in range(4000)]
    assert set(draws) == {0, 1}
    assert abs(np.mean(draws) - 0.3 / 0.8) < 0.03


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"temperature": float("nan")}]
)
def test_sampling_options_out_of_range(session: OnnxSession, options: dict[str, float]):
    with pytest.raises(ConfigError):
        session.generate(PROMPT, 3, **options)  # type: ignore[arg-type]


def test_limits_are_told_before_anything_runs(session: OnnxSession):
    with pytest.raises(DataError, match="is empty"):
        session.generate([], 3)
    with pytest.raises(DataError, match="is empty"):
        session.prefill([])
    asked = f"{len(PROMPT)} tokens of prompt and {CONTEXT} new ones do not fit in the context of {CONTEXT}"
    with pytest.raises(DataError, match=f"^context: {asked}\n  Try: at most {CONTEXT - len(PROMPT) + 1} new tokens$"):
        session.generate(PROMPT, CONTEXT)
    with pytest.raises(DataError, match=f"context of {CONTEXT}"):
        session.prefill([1] * (CONTEXT + 1))
    with pytest.raises(DataError, match="outside the vocabulary"):
        session.prefill([1, VOCAB])
    assert session.length == 0
    assert len(list(session.generate(PROMPT, CONTEXT - len(PROMPT) + 1))) == CONTEXT - len(PROMPT) + 1
    with pytest.raises(DataError, match="do not fit"):
        session.step(1)


def test_a_failed_run_leaves_the_state(deployed: tuple[StatefulGraph, Path], tmp_path: Path):
    folder = copy_of(deployed[1], tmp_path)
    (folder / "genai_config.json").unlink()  # nothing says where the table of positions ends
    session = OnnxSession(folder, threads=1)
    before = session.prefill(PROMPT)
    with pytest.raises(ExportError, match="behind 5 tokens"):
        session.prefill([1] * CONTEXT)
    assert session.length == len(PROMPT)
    after = session.step(7)
    session.reset()
    np.testing.assert_array_equal(session.prefill(PROMPT), before)
    np.testing.assert_array_equal(session.step(7), after)


def copy_of(folder: Path, target: Path) -> Path:
    return shutil.copytree(folder, target / "onnx")


def test_damaged_and_foreign_files(deployed: tuple[StatefulGraph, Path], tmp_path: Path):
    with pytest.raises(ExportError, match="no such file"):
        OnnxSession(tmp_path)
    folder = copy_of(deployed[1], tmp_path)
    model = folder / "model.onnx"
    model.write_bytes(model.read_bytes()[: model.stat().st_size // 2])
    with pytest.raises(ExportError, match="cannot load it"):
        OnnxSession(folder)
    model.write_bytes(b"")
    with pytest.raises(ExportError):
        OnnxSession(folder)


def test_a_damaged_configuration(deployed: tuple[StatefulGraph, Path], tmp_path: Path):
    folder = copy_of(deployed[1], tmp_path)
    for text in ("{", "[]", json.dumps({"model": {"context_length": "many", "vocab_size": 3}})):
        (folder / "genai_config.json").write_text(text)
        with pytest.raises(ExportError, match="is damaged"):
            OnnxSession(folder)
    (folder / "genai_config.json").unlink()
    assert OnnxSession(folder).context_length is None


def test_a_model_of_another_kind(tmp_path: Path):
    import onnx

    text = "<ir_version: 10, opset_import: ['' : 21]> g (float[n] x) => (float[n] y) { y = Neg(x) }".replace("'", '"')
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="is not a student of ours"):
        OnnxSession(tmp_path)


def test_a_snapshot_of_another_model_is_refused(session: OnnxSession):
    kept = session.snapshot()
    earlier = f"another model: weights {kept.model[:16]} as int8, here {kept.model[:16]}\n.*another version"
    for wrong, words in (
        (replace(kept, values=(*kept.values[:-1], np.zeros((1, 2, 3), np.float32))), "its tensors are not those"),
        (replace(kept, values=kept.values[:-1]), "its tensors are not those"),
        (replace(kept, model="0" * 64), f"another model: weights {'0' * 16}, here {kept.model[:16]}"),
        (replace(kept, model=f"{kept.model}-int8"), earlier),
        (replace(kept, length=3), "its tensors are not those"),
    ):
        with pytest.raises(ExportError, match=words):
            session.restore(wrong)
    session.restore(kept)


def test_a_snapshot_longer_than_the_context_is_refused(session: OnnxSession):
    kept = session.snapshot()
    length = CONTEXT + 1
    values = tuple(np.zeros([length if d == 0 else d for d in v.shape], v.dtype) for v in kept.values)
    with pytest.raises(ExportError, match=f"holds {length} tokens"):
        session.restore(replace(kept, length=length, mask=np.ones((1, length), np.int64), values=values))


def test_a_saved_state_continues_in_another_process(
    deployed: tuple[StatefulGraph, Path], session: OnnxSession, tmp_path: Path
):
    session.prefill(PROMPT)
    session.snapshot().save(tmp_path / "state.npz")
    expected = list(session.generate([7], 10))
    other = OnnxSession(deployed[1], threads=1)
    other.restore(SessionState.load(tmp_path / "state.npz"))
    assert other.length == len(PROMPT) and list(other.generate([7], 10)) == expected


def test_files_that_are_no_state(session: OnnxSession, tmp_path: Path):
    path = tmp_path / "state.npz"
    with pytest.raises(ExportError, match="no saved state"):
        SessionState.load(path)
    session.snapshot().save(path)
    whole = path.read_bytes()
    for damaged in (b"", b"text", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ExportError, match="no saved state"):
            SessionState.load(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(ExportError, match="no saved state"):
        SessionState.load(path)
    with pytest.raises(ExportError, match="cannot be written"):
        session.snapshot().save(tmp_path / "missing" / "state.npz")


def test_a_fork_shares_the_prefix_and_nothing_else(session: OnnxSession):
    session.prefill(PROMPT)
    forks = [session.fork() for _ in range(2)]
    mine, *theirs = (list(s.generate([t], 12)) for s, t in zip((session, *forks), (7, 8, 9), strict=True))
    assert len({tuple(t) for t in (mine, *theirs)}) == 3
    for tokens, start in zip((mine, *theirs), (7, 8, 9), strict=True):
        session.reset()
        assert list(session.generate([*PROMPT, start], 12)) == tokens


def test_a_batch_keeps_its_state_too(session: OnnxSession):
    """Snapshot and restore of padded rows; the rows differ in what they have seen."""
    ids, mask = np.array([PROMPT, [1, 2, 3, 0, 0]]), np.array([[1] * 5, [1, 1, 1, 0, 0]])
    session.reset(batch=2)
    session.forward(ids, mask)
    kept = session.snapshot()
    new = np.array([[4, 5], [6, 7]])
    expected = session.forward(new)
    session.reset()
    session.restore(kept)
    np.testing.assert_array_equal(session.forward(new), expected)
    session.reset()
    np.testing.assert_allclose(session.forward(np.array([[1, 2, 3, 6, 7]]))[0, -2:], expected[1], atol=1e-5)


def test_one_session_serves_one_row_and_sixty_four(session: OnnxSession):
    rows = [[1 + i % 9, *range(1, 2 + i % 5)] for i in range(64)]
    alone = {}
    for row in rows:
        session.reset()
        alone[tuple(row)] = list(session.generate(row, 4))
    for count in (1, 64, 5):
        assert session.generate_batch(rows[:count], 4) == [alone[tuple(r)] for r in rows[:count]]


def test_rows_of_a_batch_end_alone(session: OnnxSession):
    prompts = [PROMPT, [8], [9, 1]]
    whole = session.generate_batch(prompts, 12)
    stop = whole[0][3]
    ended = session.generate_batch(prompts, 12, eos=stop)
    assert ended == [w[: w.index(stop) + 1] if stop in w else w for w in whole] and len(ended[0]) <= 4


def test_batches_that_cannot_run(session: OnnxSession):
    with pytest.raises(DataError, match="0 prompts"):
        session.generate_batch([], 3)
    with pytest.raises(DataError, match="at least one token"):
        session.generate_batch([[1], []], 3)
    with pytest.raises(ConfigError, match="no side"):
        session.generate_batch([[1]], 3, padding="middle")
    with pytest.raises(DataError, match="do not fit"):
        session.generate_batch([[1], [1] * 50], CONTEXT)
    assert session.generate_batch([[1], [2]], 0) == [[], []]
