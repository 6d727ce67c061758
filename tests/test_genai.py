"""examples/generate_genai.py: onnxruntime-genai gives the tokens of our own session, alone and in padded batches; why
padding is moved to the right for it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("onnxruntime_genai", reason="the extra `genai`")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import generate_genai
from tiny_models import VOCAB, capture_of_student

from tcal_compiler.errors import DataError
from tcal_compiler.passes.capture import example_ids
from tcal_compiler.passes.make_stateful import make_stateful
from tcal_compiler.runtime.config import ExportConfig
from tcal_compiler.runtime.onnx_export import export_onnx
from tcal_compiler.runtime.onnx_parity import torch_generate
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


def padded(prompts: list[list[int]], side: str, token: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """ids [B, T] and mask [B, T]."""
    ids = np.full((len(prompts), max(map(len, prompts))), token, np.int32)
    mask = np.zeros_like(ids)
    for row, real, prompt in zip(ids, mask, prompts, strict=True):
        place = slice(len(prompt)) if side == "right" else slice(len(ids[0]) - len(prompt), None)
        row[place], real[place] = prompt, 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_padded_on_either_side(shared_run: Path, side: str):
    """Prompts that end or begin with any token, genai's own default for padding among them."""
    prompts = [[*b"The "[: i % 4], *[0] * (i % 3), 8 * i] for i in range(32)]
    expected = OnnxSession(shared_run / "onnx", threads=1).generate_batch(prompts, 12, padding=side)
    ids, mask = padded(prompts, side)
    assert generate_genai.unpadded(ids, mask) == prompts
    assert generate_genai.continuations(shared_run / "onnx", generate_genai.unpadded(ids, mask), 12) == expected


WINDOWS = {  # kept layers, and those that have windows of unequal lengths or none beside their states
    "keep=0": ("is_causal",) * 3,
    "none": ("window", "is_causal", "alibi"),
}


@pytest.mark.parametrize("policy", WINDOWS)
def test_windows_beside_states(tmp_path: Path, policy: str):
    """From prompts within and beyond the window, alone and as a padded batch; no choice is closer than 0.009."""
    stateful = make_stateful(capture_of_student(WINDOWS[policy], policy, local_window=7), max_length=64)
    kinds = [layer.kind for layer in stateful.layers]
    assert kinds.count("local") == 2 and kinds.count("softmax") == (policy == "keep=0")
    info = {"context_length": 64, "eos_token_id": 3}
    export_onnx(stateful, tmp_path, config=ExportConfig(max_length=64), info=info)
    prompts = [example_ids(1, n, VOCAB, seed=seed)[0].tolist() for n, seed in ((1, 3), (5, 2), (17, 1), (30, 5))]
    expected = [torch_generate(stateful, p, 20)[0] for p in prompts]
    assert len({tuple(e) for e in expected}) == 4 and 3 not in {t for e in expected for t in e}
    assert [generate_genai.continuations(tmp_path, [p], 20)[0] for p in prompts] == expected
    assert generate_genai.continuations(tmp_path, prompts, 20) == expected
    assert OnnxSession(tmp_path, threads=1).generate_batch(prompts, 20) == expected


def test_what_is_no_padded_batch():
    for ids, mask in (np.ones((2, 3)), np.ones((2, 2))), (np.ones((2, 3)), np.array([[0, 1, 1], [0, 0, 0]])):
        with pytest.raises(DataError, match="a token in every row"):
            generate_genai.unpadded(ids, mask)


def test_a_row_that_ends_without_an_end_token(shared_run: Path, monkeypatch: pytest.MonkeyPatch):
    assert OnnxSession(shared_run / "onnx", threads=1).eos_token_id is None
    assert generate_genai.padding_token(4, [[1, 3], [2]]) == 1 and generate_genai.padding_token(9, [[8]]) == 7
    monkeypatch.setattr(generate_genai, "padding_token", lambda *_: ord(" "))
    with pytest.raises(DataError, match="ends a row at token 32"):
        generate_genai.continuations(shared_run / "onnx", [list(b"The old man")], 30)


COUNTING = """
<ir_version: 10, opset_import: ["" : 21]>
counting (int64[batch, sequence] input_ids, int64[batch, total] attention_mask,
          float[batch, 1, past, 8] past_key_0, float[batch, 1, past, 8] past_value_0)
  => (float[batch, sequence, 64] logits, float[batch, 1, total, 8] key_0, float[batch, 1, total, 8] value_0)
<float[2] off_on = {0, 1}, int64 width = {64}, int64[1] last = {1},
 int64[2] axes = {1, 3}, int64[4] wide = {1, 1, 1, 8}>
{
  count = ReduceSum (attention_mask, last)
  zeros = Sub (input_ids, input_ids)
  counts = Add (zeros, count)
  logits = OneHot (counts, width, off_on)
  slots = Unsqueeze (attention_mask, axes)
  floats = Cast <to = 1> (slots)
  key_0 = Expand (floats, wide)
  value_0 = Identity (key_0)
}
"""


def test_genai_takes_no_padding_on_the_left(tmp_path: Path):
    """A decoder that is none of ours, whose next token is the number of tokens that its mask counts."""
    import onnxruntime_genai as genai

    onnx.save(onnx.parser.parse_model(COUNTING), tmp_path / "model.onnx")
    names = {"past_key_names": "past_key_%d", "past_value_names": "past_value_%d"}
    decoder = {"filename": "model.onnx", "head_size": 8, "hidden_size": 8, "num_attention_heads": 1}
    decoder |= {"num_key_value_heads": 1, "num_hidden_layers": 1, "session_options": {"provider_options": []}}
    decoder |= {"inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask"} | names}
    decoder |= {"outputs": {"present_key_names": "key_%d", "present_value_names": "value_%d"}}
    model = {"type": "decoder", "vocab_size": 64, "context_length": 64, "eos_token_id": 63, "pad_token_id": 60}
    config = {"model": model | {"decoder": decoder}, "search": {"past_present_share_buffer": False}}
    (tmp_path / "genai_config.json").write_text(json.dumps(config))
    counted = {}
    for side in ("right", "left"):
        options = genai.GeneratorParams(loaded := genai.Model(str(tmp_path)))
        options.set_search_options(max_length=20, do_sample=False, batch_size=2)
        generator = genai.Generator(loaded, options)
        generator.append_tokens(padded([[7, 7, 7, 7, 7], [7, 7]], side, token=60)[0])
        generator.generate_next_token()
        counted[side] = generator.get_next_tokens().tolist()
    assert counted == {"right": [5, 2], "left": [5, 5]}
