"""The exported folder: ONNX Runtime gives torch's numbers, by kernel and by fallback function, on every chunking."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from torch import Tensor, nn

from tcal_compiler.errors import ExportError
from tcal_compiler.kernels.gated_delta_rule.onnx_rule import LOWERINGS
from tcal_compiler.passes.capture import capture_program, example_ids, export_module
from tcal_compiler.passes.choose import choose
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.passes.graph import copy_module
from tcal_compiler.passes.make_stateful import make_stateful
from tcal_compiler.passes.stateful_graph import StatefulGraph
from tcal_compiler.runtime import onnx_export, onnx_parity
from tcal_compiler.runtime.config import ExportConfig
from tcal_compiler.runtime.initialize import naive_
from tcal_compiler.runtime.onnx_export import OnnxArtifact, export_onnx
from tcal_compiler.runtime.onnx_parity import check_parity
from tcal_compiler.runtime.session import OnnxSession
from tcal_compiler.runtime.student import make_student

VOCAB = 256


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny products run faster on one thread, and much faster on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits


def teacher(window: int | None, head_dim: int) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    options = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    options |= dict(num_key_value_heads=2, head_dim=head_dim, initializer_range=0.2, attn_implementation="sdpa")
    if window is None:
        return Wrapped(transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)).eval())
    config = transformers.MistralConfig(**options, sliding_window=window)
    return Wrapped(transformers.MistralForCausalLM(config).eval())


@dataclass(frozen=True)
class Deployed:
    whole: Callable[[Tensor], Tensor]
    stateful: StatefulGraph
    artifact: OnnxArtifact


def deploy(folder: Path, policy: str, *, window: int | None = None, head_dim: int = 16) -> Deployed:
    model = teacher(window, head_dim)
    program = export_module(model, has_positions=True, vocab_size=VOCAB)
    capture = capture_program(program, teacher=model, implementation="sdpa", shapes=((2, 9),))
    scan = find_attention(capture)
    student = make_student(capture, scan, choose(scan, policy))
    gen = torch.Generator().manual_seed(1)
    for site in student.converted:
        naive_(student.gm.get_submodule(f"tcal_mixers.{site.index}"), gen)
    own = capture_program(student.export(), teacher=student.gm, implementation="student", shapes=((2, 9),))
    stateful = make_stateful(own, verify=False, max_length=300)
    info = {"bos_token_id": 1, "eos_token_id": 2, "context_length": 300}
    return Deployed(student.logits, stateful, export_onnx(stateful, folder, config=ExportConfig(), info=info))


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """Layer 0 keeps its attention, rotated by the runtime; layer 1 is converted."""
    return deploy(tmp_path_factory.mktemp("hybrid"), "keep=0")


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """Layer 0 keeps its attention over a window of 8 tokens; layer 1 is converted."""
    return deploy(tmp_path_factory.mktemp("windowed"), "keep=0", window=8)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """Layer 0 keeps its attention, of a size that the fused attention does not take."""
    return deploy(tmp_path_factory.mktemp("plain"), "keep=0", head_dim=12)


@pytest.fixture(scope="module")
def plain_windowed(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """The same over a window of 8 tokens."""
    return deploy(tmp_path_factory.mktemp("plain_windowed"), "keep=0", window=8, head_dim=12)


@pytest.fixture(scope="module")
def all_converted(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    return deploy(tmp_path_factory.mktemp("none"), "none")


def assert_parity(deployed: Deployed) -> None:
    prompts = [[3, 141, 59], [26]]
    checks = check_parity(
        deployed.artifact, deployed.stateful, whole=deployed.whole, prompts=prompts, new_tokens=24, threads=1
    )
    assert len(checks) == 6
    assert all(c.passed for c in checks), [c for c in checks if not c.passed]
    assert all(c.measured < 2e-5 for c in checks)
    assert "distinct" in checks[-1].detail and "margin" in checks[-1].detail


def test_hybrid_equals_torch(hybrid: Deployed):
    graph = onnx.load(hybrid.artifact.path).graph
    (node,) = (n for n in graph.node if n.op_type == "GroupQueryAttention")
    options = {a.name: a.i for a in node.attribute}
    assert len(node.input) == 9 and options["do_rotary"] == 1 and "local_window_size" not in options
    assert_parity(hybrid)


@pytest.mark.slow
def test_a_window_equals_torch_and_holds_no_more_than_it_needs(windowed: Deployed):
    graph = onnx.load(windowed.artifact.path).graph
    (node,) = (n for n in graph.node if n.op_type == "GroupQueryAttention")
    assert {a.name: a.i for a in node.attribute}["local_window_size"] == 8 and len(node.input) == 7
    assert_parity(windowed)
    assert not share_flag(windowed)
    states = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    assert states["past_key_values.0.key"] == states["past_key_values.0.value"] == ["batch", 2, 7, 16]


def test_the_plain_form_equals_torch_and_grows(plain: Deployed):
    ops = Counter(n.op_type for n in onnx.load(plain.artifact.path).graph.node)
    assert ops["GroupQueryAttention"] == 0 and ops["Softmax"] == 1
    assert_parity(plain)
    assert not share_flag(plain)


@pytest.mark.slow
def test_the_plain_form_of_a_window_equals_torch(plain_windowed: Deployed):
    ops = Counter(n.op_type for n in onnx.load(plain_windowed.artifact.path).graph.node)
    assert ops["GroupQueryAttention"] == 0
    assert_parity(plain_windowed)


def share_flag(deployed: Deployed) -> bool:
    config = json.loads((deployed.artifact.folder / "genai_config.json").read_text())
    return config["search"]["past_present_share_buffer"]


def test_caches_are_written_in_place(hybrid: Deployed):
    """No step allocates or copies a cache: its memory is the same, and slots ahead stay as they were."""
    assert share_flag(hybrid)
    session = OnnxSession(hybrid.artifact.folder, threads=1)
    caches = [s for s in session._slots if s.is_cache]
    for s in caches:
        s.value[:] = 7.0
    places = [s.value.ctypes.data for s in caches]
    session.prefill([1, 2, 3, 4])
    session.step(5)
    assert [s.value.ctypes.data for s in caches] == places and len(caches) == 2
    for s in caches:
        assert s.value.shape == (1, 2, 300, 16)
        assert (s.value[:, :, 5:] == 7.0).all() and not (s.value[:, :, :5] == 7.0).any()


def test_a_cache_that_grows_gives_the_same(hybrid: Deployed, tmp_path: Path):
    """Without the configuration nothing says how long a buffer would have to be."""
    path = shutil.copy(hybrid.artifact.path, tmp_path / "model.onnx")
    sessions = [OnnxSession(p, threads=1) for p in (path, hybrid.artifact.folder)]
    for s in sessions:
        s.prefill([5, 9, 100, 3])
    assert [s._slots[0].capacity for s in sessions] == [None, 300]
    np.testing.assert_allclose(*(s.step(7) for s in sessions), atol=1e-6)


def test_all_converted_equals_torch(all_converted: Deployed):
    assert_parity(all_converted)
    names = [i.name for i in onnx.load(all_converted.artifact.path).graph.input]
    assert not any(n.endswith((".key", ".value")) for n in names)


def test_a_student_without_caches_goes_on_behind_the_teacher_s_context(all_converted: Deployed):
    """The context of the teacher is 300 tokens; those behind are the torch graph's own."""
    session = OnnxSession(all_converted.artifact.folder, threads=1)
    ids = torch.randint(0, VOCAB, (1, 320), generator=torch.Generator().manual_seed(3))
    assert session.context_length == ExportConfig().max_length
    session.prefill(ids[0, :-1].tolist())
    expected = all_converted.whole(ids)[0, -1].detach().numpy()
    np.testing.assert_allclose(session.step(int(ids[0, -1])), expected, atol=1e-4)


def test_parity_sees_a_model_that_differs(hybrid: Deployed):
    wrong = replace(hybrid.stateful, gm=copy_module(hybrid.stateful.gm))
    with torch.no_grad():
        dict(wrong.gm.named_parameters())["tcal_mixers.1.dt_bias"].add_(0.5)
    checks = check_parity(hybrid.artifact, wrong, threads=1)
    assert not any(c.passed for c in checks)


@pytest.mark.parametrize(("error", "passes"), [(-1e-3, True), (3.9e-3, True), (-4.1e-3, False)])
def test_rounding_errors_of_opposite_signs_do_not_add_up(monkeypatch, error: float, passes: bool):
    """Logits of torch in float32 are 0.001 from float64."""
    stateful = StatefulGraph(torch.fx.GraphModule({}, torch.fx.Graph()), (), VOCAB)
    runs = {torch.float64: 1.0, torch.float32: 1.001}
    logits = torch.zeros(2, 40, VOCAB, dtype=torch.float64)
    monkeypatch.setattr(onnx_parity, "widen_to_float64", lambda gm: gm)
    monkeypatch.setattr(onnx_parity, "OnnxSession", lambda *a, **o: None)
    monkeypatch.setattr(onnx_parity, "run_chunks", lambda *a, dtype: (logits + runs[dtype], ()))
    monkeypatch.setattr(onnx_parity, "session_logits", lambda *a: logits + 1 + error)
    artifact = OnnxArtifact(Path("model.onnx"), "ort", 21, (), 64)
    checks = check_parity(artifact, stateful, whole=lambda ids: logits + 1.0)
    assert [c.passed for c in checks] == [passes] * 3 + [True] and checks[0].allowed == pytest.approx(4e-3)


def optimized_ops(path: Path, tmp_path: Path) -> Counter[str]:
    """Operators that ONNX Runtime really runs."""
    target = tmp_path / "optimized.onnx"
    OnnxSession(path, threads=1, optimized_path=target)
    return Counter(n.op_type for n in onnx.load(target).graph.node)


def test_the_runtime_uses_its_kernel_and_not_the_function(hybrid: Deployed, tmp_path: Path):
    assert len(onnx.load(hybrid.artifact.path).functions) == 1
    ops = optimized_ops(hybrid.artifact.path, tmp_path)
    assert ops["LinearAttention"] == 1 and ops["Scan"] == 0


def test_nothing_in_the_model_is_unused(hybrid: Deployed):
    graph = onnx.load(hybrid.artifact.path).graph
    used = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    assert [i.name for i in (*graph.initializer, *graph.input) if i.name not in used] == []
    assert [n.name for n in graph.node if not used & set(n.output)] == []


def without_kernel(source: Path, target: Path) -> None:
    """The same model, its op in a domain for which no runtime has a kernel: only the function can define it."""
    model = onnx.load(source)
    for entry in (*model.functions, *(n for n in model.graph.node if n.op_type == "LinearAttention")):
        entry.domain = "no.kernel"
    model.opset_import.append(onnx.helper.make_opsetid("no.kernel", 1))
    onnx.save(model, target)


def test_the_function_alone_gives_the_same_numbers(hybrid: Deployed, tmp_path: Path):
    path = tmp_path / "model.onnx"
    without_kernel(hybrid.artifact.path, path)
    ops = optimized_ops(path, tmp_path)
    assert ops["LinearAttention"] == 0 and ops["Scan"] == 1
    assert_parity(replace(hybrid, artifact=replace(hybrid.artifact, path=path)))


EVERY = ["hybrid", "plain", "all_converted"]
EVERY += [pytest.param(name, marks=pytest.mark.slow) for name in ("windowed", "plain_windowed")]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("chunks", [(25,), (7, 1, 17), (1, 24)], ids=str)
def test_padded_batches_are_single_runs_in_the_runtime(
    name: str, chunks: tuple[int, ...], request: pytest.FixtureRequest
):
    """Padding on the left, on the right, in between, and a chunk of nothing but padding."""
    deployed: Deployed = request.getfixturevalue(name)
    ids = example_ids(4, 25, VOCAB)
    mask = torch.ones_like(ids)
    mask[0, :9], mask[2, 20:], mask[3, :8], mask[3, 12:14] = 0, 0, 0, 0
    session = OnnxSession(deployed.artifact.folder, threads=1)
    session.reset(batch=4)
    parts = zip(ids.split(list(chunks), 1), mask.split(list(chunks), 1), strict=True)
    found = np.concatenate([session.forward(i.numpy(), m.numpy()) for i, m in parts], 1)
    for row, seen, logits in zip(ids, mask == 1, found, strict=True):
        expected = deployed.whole(row[seen][None]).detach()[0]
        np.testing.assert_allclose(logits[seen.numpy()], expected.numpy(), atol=3e-5)


@pytest.mark.parametrize("name", EVERY)
def test_batched_generation_is_single_generation(name: str, request: pytest.FixtureRequest):
    deployed: Deployed = request.getfixturevalue(name)
    session = OnnxSession(deployed.artifact.folder, threads=1)
    prompts = [[3, 141, 59, 26, 5], [35], [8, 9, 79]]
    alone = []
    for prompt in prompts:
        session.reset()
        alone.append(list(session.generate(prompt, 24)))
    assert len({tuple(a) for a in alone}) == 3
    for side in ("left", "right"):
        assert session.generate_batch(prompts, 24, padding=side) == alone


@pytest.mark.slow
@pytest.mark.parametrize("opset", [22, 24])
def test_other_opsets_give_the_same_numbers(hybrid: Deployed, tmp_path: Path, opset: int):
    """By the kernel and by the function, which must import the model's own opset."""
    artifact = export_onnx(hybrid.stateful, tmp_path / "kernel", config=ExportConfig(opset=opset))
    model = onnx.load(artifact.path)
    assert {o.domain: o.version for o in model.opset_import} == {"": opset, "com.microsoft": 1}
    (tmp_path / "function").mkdir()
    without_kernel(artifact.path, tmp_path / "function/model.onnx")
    expected = OnnxSession(hybrid.artifact.path, threads=1).prefill([3, 141, 59])
    for folder in ("kernel", "function"):
        logits = OnnxSession(tmp_path / folder / "model.onnx", threads=1).prefill([3, 141, 59])
        np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_border_has_the_names_that_runtimes_expect(hybrid: Deployed):
    graph = onnx.load(hybrid.artifact.path).graph
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*graph.input, *graph.output)
    }
    assert shapes == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total_sequence"],
        "past_key_values.0.key": ["batch", 2, "past_sequence", 16],
        "past_key_values.0.value": ["batch", 2, "past_sequence", 16],
        "past_key_values.1.recurrent_state": ["batch", 4, 16, 16],
        "past_key_values.1.conv_state": ["batch", 1, 1],
        "logits": ["batch", "sequence", VOCAB],
        "present.0.key": ["batch", 2, "present_sequence", 16],
        "present.0.value": ["batch", 2, "present_sequence", 16],
        "present.1.recurrent_state": ["batch", 4, 16, 16],
        "present.1.conv_state": ["batch", 1, 1],
    }


def test_genai_config_says_what_the_graph_is(hybrid: Deployed):
    config = json.loads((hybrid.artifact.folder / "genai_config.json").read_text())
    model = config["model"]
    assert (model["vocab_size"], model["context_length"]) == (VOCAB, 300)
    assert (model["bos_token_id"], model["eos_token_id"]) == (1, 2)
    decoder = model["decoder"]
    names = ("head_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    assert [decoder[n] for n in names] == [16, 32, 4, 2, 2]


def test_bytes_are_the_same_again_and_free_of_the_machine(hybrid: Deployed, tmp_path: Path):
    again = export_onnx(hybrid.stateful, tmp_path, config=ExportConfig())
    content = again.path.read_bytes()
    assert content == hybrid.artifact.path.read_bytes()
    assert str(Path(__file__).parents[2]).encode() not in content and b"stack_trace" not in content


def test_large_models_keep_their_weights_beside(hybrid: Deployed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onnx_export, "SINGLE_FILE_LIMIT", 1000)
    monkeypatch.setattr(onnx_export, "build_model", lambda *args, **kwargs: onnx_ir.load(hybrid.artifact.path))
    artifact = export_onnx(hybrid.stateful, tmp_path, config=ExportConfig())
    assert (tmp_path / "model.onnx.data").stat().st_size > artifact.path.stat().st_size / 10
    ids = np.array([[5, 6, 7]])
    a, b = (OnnxSession(p, threads=1).forward(ids) for p in (tmp_path, hybrid.artifact.folder))
    np.testing.assert_array_equal(a, b)


def test_an_opset_that_the_profile_lacks_touches_nothing(
    hybrid: Deployed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(LOWERINGS, "ort", replace(LOWERINGS["ort"], opsets=(22, 24)))
    with pytest.raises(ExportError, match="opsets 22 to 24, not 21"):
        export_onnx(hybrid.stateful, tmp_path / "new", config=ExportConfig())
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_named(hybrid: Deployed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(onnx_export, "build_model", lambda *args, **kwargs: None)
    with pytest.raises(ExportError, match="cannot be written"):
        export_onnx(hybrid.stateful, tmp_path / "file" / "onnx", config=ExportConfig())
