"""examples/verify_runtimes.py and examples/bench_serving.py on the student that the tests share."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import gguf
import numpy as np
import onnxruntime
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import bench_serving
import check_cuda
import export_tables
import verify_runtimes
from device_session import CPU, DeviceSession
from tiny_gguf import HEADS, HIDDEN, KV, LAYERS, write_llama

from tcal_compiler.errors import DataError
from tcal_compiler.runtime.onnx_parity import TorchLogits
from tcal_compiler.runtime.session import OnnxSession


def answer(logits: torch.Tensor, tokens: torch.Tensor) -> dict[str, Any]:
    found = {"chunks_0": logits.numpy(), "tokens": tokens.numpy(), "alone": tokens[0].numpy()}
    found |= {"version": "1.25.1", "error": ""}
    return {name: np.asarray(v) for name, v in found.items()}


def test_a_runtime_passes_only_within_the_bounds():
    logits, tokens = torch.randn(2, 4, 9), torch.tensor([[3, 1, 4], [1, 5, 9]])
    ids, rounded = torch.zeros(2, 4, dtype=torch.long), logits + 1e-3  # so 2e-3 is allowed
    known = TorchLogits(ids, logits, {(4,): rounded})
    assert verify_runtimes.compare(answer(logits + 1.9e-3, tokens), known, tokens, "ort")["passed"]
    assert not verify_runtimes.compare(answer(logits + 2.1e-3, tokens), known, tokens, "ort")["passed"]
    other = verify_runtimes.compare(answer(logits, tokens + torch.tensor([0, 0, 1])), known, tokens, "ort")
    assert other["tokens_that_differ"] == 3 and not other["passed"]
    broken = answer(logits, tokens) | {"error": np.asarray("cannot load it")}
    assert verify_runtimes.compare(broken, known, tokens, "ort") == {
        "onnxruntime": "1.25.1",
        "error": "cannot load it",
        "passed": False,
    }
    assert not verify_runtimes.compare(broken, known, tokens, "standard")["passed"]
    refused = broken | {"error": np.asarray("cannot load it; onnxruntime 1.32 or newer for profile standard")}
    assert verify_runtimes.compare(refused, known, tokens, "standard")["passed"]
    assert not verify_runtimes.compare(refused | {"version": "1.32.0"}, known, tokens, "standard")["passed"]


def test_a_table_goes_on_only_with_rows_of_its_kind():
    where = {"machine": "x86_64", "threads": 1, "commit": "a"}
    old = {"environment": where, "steps": 15, "chunk": 128, "serving": [{"name": "tiny"}], "note": "kept"}
    again = bench_serving.continued(old, old | {"environment": where | {"commit": "b"}, "serving": []})
    assert again == old | {"environment": where | {"commit": "a, b"}}
    with pytest.raises(SystemExit, match="rows of other steps, threads"):
        bench_serving.continued(old, old | {"steps": 3, "environment": where | {"threads": 2}})


def test_a_state_that_is_too_large_is_not_tried():
    bench_serving.check_room({"most_state_gb": 1.0}, 10**9)
    with pytest.raises(DataError, match=r"would take 1\.1 GB"):
        bench_serving.check_room({"most_state_gb": 1.0}, 11 * 10**8)


def test_the_memory_is_that_of_the_card_measured_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """CUDA gives a process one of a host's cards: nvidia-smi is asked of that one by its UUID."""
    (tmp_path / "nvidia-smi").write_text('#!/bin/sh\n[ "$1" = --id=GPU-5 ] && echo 3000\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(name="A card", uuid="5"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.empty(8))
    found = bench_serving.card_row({})
    assert (found["device"], found["card"]) == ("A card", "GPU-5") and found["reads"] > 0
    assert bench_serving.measured({"batch": 1, "card": "GPU-5"}, 0.5, 4, 0.25)["peak_mb"] == 3000 * 1.048576


def test_a_row_of_a_gguf_file(tmp_path: Path):
    job = {"path": str(write_llama(tmp_path / "tiny.gguf")), "card": None, "threads": 1, "most_state_gb": 1.0}
    row = bench_serving.torch_row(job | {"context": 20, "chunk": 8, "steps": 2, "batch": 3})
    assert row["state_mb"] == 2 * LAYERS * 3 * KV * 20 * (HIDDEN // HEADS) * 4 / 1e6
    assert row["prefill_tokens_per_s"] > 0 and row["decode_tokens_per_s"] == pytest.approx(3e3 / row["decode_ms"])


def test_a_session_on_a_device_is_ours(shared_run: Path):
    """Logits behind two chunks and single tokens of two rows, and what is counted of its state."""
    session, device = OnnxSession(shared_run / "onnx", threads=1), DeviceSession(shared_run / "onnx", CPU, capacity=40)
    session.reset(batch=2)
    device.reset(batch=2)
    for length in (9, 1, 1):
        ids = np.random.default_rng(length).integers(1, 200, (2, length))
        np.testing.assert_allclose(device.forward(ids).numpy(), session.forward(ids), atol=1e-5)
    assert device.bytes_behind(2, 11) == session.state_bytes
    assert device.bytes_behind(2, 11, recurrent=2) == session.step_bytes


def test_a_row_of_a_device(shared_run: Path):
    job = {"path": str(shared_run / "onnx"), "provider": CPU, "card": None, "threads": 1, "most_state_gb": 1.0}
    row = bench_serving.device_row(job | {"context": 20, "chunk": 8, "steps": 2, "batch": 3})
    assert row["prefill_tokens_per_s"] > 0 and row["decode_tokens_per_s"] == pytest.approx(3e3 / row["decode_ms"])
    with pytest.raises(DataError, match="would take"):
        bench_serving.device_row(job | {"context": 20, "chunk": 8, "steps": 2, "batch": 3, "most_state_gb": 1e-9})


def test_what_is_checked_on_a_device(shared_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out.json"
    words = [
        "check",
        str(shared_run),
        "--against",
        str(shared_run),
        "--provider",
        CPU,
        "--contexts",
        "8",
        "--steps",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", [*words, "--steps", "2", "--sequences", "2", "--length", "24", "--json", str(out)])
    check_cuda.main()
    found = json.loads(out.read_text())
    assert found["kl"] < 1e-9 and found["nodes"][CPU]["LinearAttention"] == 3 and set(found["contexts"]) == {"8"}
    assert found["greedy"] == {"prompts": 2, "tokens": 64, "same": 64, "margin": 0.0}
    assert export_tables.on_device("tiny", found).count("Of 64 greedy tokens behind 2 prompts 64 were") == 1
    device, exact = DeviceSession(shared_run / "onnx", CPU), OnnxSession(shared_run / "onnx", threads=1)
    logits, forward = exact.forward(np.array([[5, 6, 7]])), device.forward
    other = int(logits[0, -1].argsort()[-2])  # the second best where the first token is due

    def second_best(ids: np.ndarray) -> onnxruntime.OrtValue:
        changed = forward(ids).numpy()
        changed[0, -1, other] = 1e9
        return onnxruntime.OrtValue.ortvalue_from_numpy(changed)

    monkeypatch.setattr(device, "forward", second_best)
    part = check_cuda.greedy(device, exact, np.array([[5, 6, 7]]), 4)
    gap = np.sort(logits[0, -1])[-1] - logits[0, -1, other]
    assert part == {"prompts": 1, "tokens": 4, "same": 0, "margin": pytest.approx(gap, rel=1e-4)}


def test_a_gguf_file_for_more_positions_than_it_says(tmp_path: Path):
    field, source = "llama.context_length", write_llama(tmp_path / "tiny.gguf")
    before = source.read_bytes()
    assert bench_serving.gguf_for_contexts(source, tmp_path / "copy", 64) == source
    copy = bench_serving.gguf_for_contexts(source, tmp_path / "copy", 100)
    assert copy != source and gguf.GGUFReader(copy).get_field(field).contents() == 100
    assert sum(a != b for a, b in zip(copy.read_bytes(), before, strict=True)) == 1 and source.read_bytes() == before


def test_llama_goes_on_from_a_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of a server that stands in for the package: what is asked of it, and no prefill where there was none."""
    asked: list[Any] = []

    class Server:
        def __init__(self, params: Any) -> None:
            assert (params.n_ctx, params.cpuparams.n_threads) == (30 + 4 + bench_serving.ROOM, 1)
            assert params.slot_save_path == f"{tmp_path}/"

        def handle_completions(self, request: dict[str, Any]) -> dict[str, Any]:
            asked.append(len(request["prompt"]))
            cached = 29 if "restore" in asked else 0
            found = {"prompt_n": 30 - cached, "cache_n": cached, "prompt_ms": 60.0}
            return {"timings": found | {"predicted_n": 4, "predicted_ms": 20.0}}

    def slot(_: Any, action: str, name: str) -> None:
        asked.append(action)
        (tmp_path / name).touch()

    parts = ("model", "cpuparams", "cpuparams_batch")
    package = Mock(CommonParams=lambda: SimpleNamespace(**{p: SimpleNamespace() for p in parts}), Server=Server)
    monkeypatch.setitem(sys.modules, "xllamacpp", package)
    monkeypatch.setattr(bench_serving, "llama_slot", slot)
    job = {"path": "x/tiny.gguf", "context": 30, "steps": 4, "threads": 1, "batch": 1, "card": None}
    first, second = (bench_serving.llama_row(job | {"llama_slots": str(tmp_path)}) for _ in range(2))
    assert asked == [30, "save", "restore", 30] and (tmp_path / "tiny-30.slot").is_file()
    assert first["prefill_tokens_per_s"] == pytest.approx(500) and "prefill_tokens_per_s" not in second
    assert first["decode_ms"] == second["decode_ms"] == 5


@pytest.mark.slow
def test_other_interpreters_are_compared_too(shared_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out.json"
    words = ["verify", f"tiny={shared_run}", "--runtime", sys.executable, "--prompts", "2", "--new-tokens", "12"]
    monkeypatch.setattr(sys, "argv", [*words, "--json", str(out)])
    with pytest.raises(SystemExit) as end:
        verify_runtimes.main()
    found = json.loads(out.read_text())["runtime_parity"]["tiny"]
    assert end.value.code == 0 and (found["layers_kept"], found["profile"]) == (1, "ort")
    assert [row["onnxruntime"] for row in found["runtimes"]] == [onnxruntime.__version__] * 2
    assert all(row["passed"] and 0 < row["logit_error"] < 1e-4 for row in found["runtimes"])
    assert found["tokens"] == 36 and found["distinct_tokens"] > 3 and found["smallest_margin"] > 0


@pytest.mark.slow
def test_every_way_of_serving_is_measured(shared_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import transformers

    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    llama = transformers.LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=64)
    transformers.LlamaForCausalLM(llama).save_pretrained(tmp_path / "llama")
    out = tmp_path / "out.json"
    words = ["bench", "--onnx", f"tiny={shared_run}", "--torch", f"llama={tmp_path / 'llama'}", "--dtypes", "fp32"]
    words += ["int8", "--contexts", "8", "600", "--batches", "1", "2", "--steps", "2", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    bench_serving.main()
    rows = json.loads(out.read_text())["serving"]
    assert len(rows) == 3 * 2 * 2 and not [r for r in rows if "error" in r]
    assert all(r["prefill_tokens_per_s"] > 0 and r["peak_mb"] > 50 for r in rows)
    session = OnnxSession(shared_run / "onnx", threads=1)
    for row in (r for r in rows if r["name"].startswith("tiny fp32") and r["context"] == 8):
        session.reset(batch=row["batch"])
        session.forward(np.ones((row["batch"], 8), np.int64))
        assert row["state_mb"] == pytest.approx(session.state_bytes / 1e6)
    assert all(r["share_of_bound"] > 0 and r["read_gb_s"] > 0 for r in rows if "moved_mb" in r)
    words = [*words[:3], "--contexts", "8", "9", "--batches", "1", "--steps", "2", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    bench_serving.main()  # adds a row to those and measures one again
    assert len(json.loads(out.read_text())["serving"]) == len(rows) + 1
    for row in (r for r in rows if r["name"].startswith("llama")):
        assert row["state_mb"] * 1e6 == 2 * 2 * row["batch"] * 2 * row["context"] * 8 * 4
