"""The assets that ship: the embedded teacher, its text, and the tiny teacher in plain PyTorch."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "tcal_compiler" / "assets"
TEACHER, TEXT, TINY = ASSETS / "teacher", ASSETS / "text", ASSETS / "tiny"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small matrices: more threads gain nothing and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((TEACHER / "training.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TEACHER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tiny() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_torch_teacher", ROOT / "examples" / "tiny_torch_teacher.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_teacher_is_small_and_stored_as_float16_safetensors() -> None:
    assert sum(p.stat().st_size for p in TEACHER.iterdir()) <= 10_000_000
    assert {w.dtype for w in load_file(TEACHER / "model.safetensors").values()} == {torch.float16}
    assert not [p for p in ASSETS.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_teacher_has_grouped_heads_and_enough_layers(model, record) -> None:
    config = model.config
    assert config.num_hidden_layers >= 6
    assert config.num_key_value_heads < config.num_attention_heads
    assert next(model.parameters()).dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]


def test_heldout_perplexity_is_the_recorded_one(model, tokenizer, record) -> None:
    ids = tokenizer((TEXT / "heldout.txt").read_text(encoding="utf-8"), return_tensors="pt").input_ids
    rows = ids[0, : 16 * 512].view(16, 512)
    with torch.inference_mode():
        losses = [F.cross_entropy(model(row[None]).logits[0, :-1], row[1:]).item() for row in rows]
    measured = math.exp(sum(losses) / len(losses))
    assert measured == pytest.approx(record["heldout_first16_perplexity"], rel=0.02)


@pytest.mark.parametrize(
    "text", ["Plain words, twice.  Two spaces\n\n\ttab", "“It is naïve,” — 日本 🙂\r\n", " <|x|> 1,234"]
)
def test_tokenizer_returns_the_text(tokenizer, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert ids == tokenizer(text, add_special_tokens=False).input_ids
    assert max(ids) < len(tokenizer) == 4096


def test_end_of_text_is_bos_eos_and_pad(tokenizer, model) -> None:
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (end, end, end)
    assert model.config.eos_token_id == model.config.bos_token_id == end


def test_text_files_share_no_paragraph_and_have_their_size() -> None:
    held, calibration = ((TEXT / f"{name}.txt").read_text(encoding="utf-8") for name in ("heldout", "calibration"))
    assert 200_000 < len(held.encode()) <= 300_000
    assert 600_000 < len(calibration.encode()) <= 700_000
    long = [{p for p in text.split("\n") if len(p) >= 120} for text in (held, calibration)]
    assert not long[0] & long[1]


def test_record_names_what_matters_and_no_folder(record) -> None:
    assert {"command", "seed", "tokens_seen", "device", "torch", "transformers", "heldout_perplexity"} <= record.keys()
    assert {"source", "licence", "splits"} <= record["data"].keys()
    assert "/" not in record["command"] + record["data"]["prepare_command"]


def test_tiny_factory_is_the_shipped_program(tiny) -> None:
    model, program = tiny.factory(), torch.export.load(TINY / "teacher.pt2").module()
    assert not model.training
    generator = torch.Generator().manual_seed(0)
    for batch, length in ((2, 8), (3, 131)):
        ids = torch.randint(256, (batch, length), generator=generator)
        with torch.inference_mode():
            expected = model(ids)
            assert expected.shape == (batch, length, 256)
            assert torch.equal(program(ids), expected)


def test_tiny_has_learnt_something(tiny) -> None:
    data = torch.tensor(list((TEXT / "heldout.txt").read_bytes()[: 16 * 256])).view(16, 256)
    with torch.inference_mode():
        loss = F.cross_entropy(tiny.factory()(data)[:, :-1].flatten(0, 1), data[:, 1:].flatten()).item()
    assert loss / math.log(2) < 3.0  # bits per byte; 8 untrained


def test_tiny_export_can_be_made_again_and_names_no_source_file(tiny, tmp_path: Path) -> None:
    model, path = tiny.factory(), tmp_path / "teacher.pt2"
    tiny.export(model, path)
    ids = torch.arange(21)[None] % 256
    with torch.inference_mode():
        assert torch.equal(torch.export.load(path).module()(ids), model(ids))
    for saved in (path, TINY / "teacher.pt2"):
        assert b"tiny_torch_teacher.py" not in saved.read_bytes()


def test_tiny_training_lowers_the_loss(tiny) -> None:
    text = b"to be or not to be, that is the question. " * 40
    model = tiny.train(text, steps=30, batch=4, length=32)
    data = torch.tensor(list(text[:64]))[None]
    with torch.inference_mode():
        assert F.cross_entropy(model(data)[0, :-1], data[0, 1:]).item() < 3.0  # ln 256 = 5.5 untrained
