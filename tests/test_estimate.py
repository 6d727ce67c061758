"""examples/estimate_conversion.py: its operations are those that a model of these sizes takes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from tcal_compiler.passes.choose import choose
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.runtime.flops import distillation_flops
from tcal_compiler.runtime.live import capture_live
from tcal_compiler.runtime.student import make_student

ROOT = Path(__file__).parents[1]
LLAMA = {"vocab_size": 120, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.mark.slow
def test_operations_are_those_of_a_model_of_these_sizes(monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    sizes = importlib.import_module("estimate_conversion").Sizes.of(LLAMA)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)).eval()
    capture = capture_live(model)
    student = make_student(capture, scan := find_attention(capture), choose(scan, "keep=0"))
    assert distillation_flops(student, 24) == 24 * sizes.distilled(24, 2)
    assert sizes.weights == sum(p.numel() for p in model.parameters() if p.dim() == 2)


def test_the_estimate_is_what_the_script_gives_of_the_files_that_it_names(tmp_path, monkeypatch):
    """A teacher of SmolLM2's own sizes and settings takes what SmolLM2 took."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    module = importlib.import_module("estimate_conversion")
    smol = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    smol |= {"num_attention_heads": 9, "num_key_value_heads": 3}
    needs = {"converted": 22, "kept": 8, "parameters": 1, "value_bytes": 1, "stages": []}
    for name, text in (("config.json", json.dumps(smol)), ("memory.json", json.dumps(needs))):
        (tmp_path / name).write_text(text)
    settings = (
        "local_window = 0\n[calib]\nsequences = 10240\ninit_sequences = 384\nholdout = 16\n[align]\nsteps = 1000\n"
    )
    (tmp_path / "c.toml").write_text(settings + "[distill]\nsteps = 244\nbatch = 32\n")
    words = ["x", tmp_path / "config.json", "--memory", tmp_path / "memory.json", "--config", tmp_path / "c.toml"]
    words += ["--name", "smol", "--json", tmp_path / "out.json"]
    monkeypatch.setattr("sys.argv", list(map(str, words)))
    module.main()
    for stage, row in json.loads((tmp_path / "out.json").read_text())["stages"].items():
        assert row["seconds"] == pytest.approx(row["measured_seconds"], abs=0.5), stage
    (tmp_path / "c.toml").write_text("")
    with pytest.raises(SystemExit, match="local_window = 0"):
        module.main()
