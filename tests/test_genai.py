"""examples/generate_genai.py: onnxruntime-genai gives the tokens of our own session, alone and in padded batches."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime_genai", reason="the extra `genai`")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import generate_genai

from tcal_compiler.runtime.session import OnnxSession

PROMPTS = ["The old man", "A", "and then she went", "Zebra 9"]


def test_tokens_are_those_of_our_session(
    shared_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    session = OnnxSession(shared_run / "onnx", threads=1)
    prompts = [list(p.encode()) for p in PROMPTS]
    expected = []
    for prompt in prompts:
        session.reset()
        expected.append(list(session.generate(prompt, 30, eos=session.eos_token_id)))
    assert len({tuple(e) for e in expected}) == 4
    config = json.loads((shared_run / "onnx/genai_config.json").read_text())["model"]
    assert "pad_token_id" not in config or all(p[-1] != config["pad_token_id"] for p in prompts)
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert generate_genai.continuations(shared_run / "onnx", [prompt], 30) == [tokens]
    assert generate_genai.continuations(shared_run / "onnx", prompts, 30) == expected
    found = generate_genai.compare(shared_run / "onnx", prompts[:2], 8)
    assert found["runtimes"][0]["passed"] and found["tokens"] == 32 and found["prompt_lengths"] == [11, 1]
    monkeypatch.setattr(generate_genai, "continuations", lambda _, rows, count: [[-1] * (count - 1) for _ in rows])
    assert generate_genai.compare(shared_run / "onnx", prompts[:2], 8)["runtimes"][0]["tokens_that_differ"] == 32
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["generate_genai", str(shared_run), *PROMPTS[:2], "--max-new-tokens", "8"])
    generate_genai.main()
    assert capsys.readouterr().out.startswith("The old man" + bytes(expected[0][:8]).decode("utf-8", "replace"))
    out = tmp_path / "out.json"
    words = ["generate_genai", str(shared_run), *PROMPTS[:2], "--max-new-tokens", "8", "--compare", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        generate_genai.main()
    assert end.value.code == 0
    written = json.loads(out.read_text())["runtime_parity"][shared_run.name]
    assert (written["layers_kept"], written["profile"], written["runtimes"][0]["passed"]) == (1, "ort", True)
