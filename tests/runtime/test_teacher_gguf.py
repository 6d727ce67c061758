"""GGUF teachers, with a tiny Llama written here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tcal_compiler.errors import DataError, TeacherError
from tcal_compiler.runtime.teacher import load_teacher, load_tokenizer

gguf = pytest.importorskip("gguf")
VOCAB, HIDDEN, LAYERS, HEADS, KV, FFN = 300, 32, 2, 4, 2, 64


def write_llama(path: Path, seed: int = 0, skip: str = "") -> Path:
    """A random Llama in float32 with a byte-level BPE vocabulary."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    rng = np.random.default_rng(seed)
    w = gguf.GGUFWriter(str(path), "llama")
    w.add_name("tiny")
    w.add_context_length(64)
    w.add_embedding_length(HIDDEN)
    w.add_block_count(LAYERS)
    w.add_feed_forward_length(FFN)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(HIDDEN // HEADS)
    w.add_rope_freq_base(10000.0)
    w.add_vocab_size(VOCAB)
    letters = list(bytes_to_unicode().values())
    merges = ["t h", "th e"]
    tokens = ["<s>", "<|endoftext|>", *letters, "th", "the"]
    tokens += [f"<extra{i}>" for i in range(VOCAB - len(tokens))]
    w.add_tokenizer_model("gpt2")
    w.add_token_list(tokens)
    w.add_token_types([3, 3] + [1] * (len(letters) + 2) + [3] * (VOCAB - len(letters) - 4))
    w.add_token_merges(merges)
    w.add_bos_token_id(0)
    w.add_eos_token_id(1)
    small = HIDDEN // HEADS * KV
    shapes = {"token_embd": (VOCAB, HIDDEN), "output_norm": (HIDDEN,), "output": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        parts = {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN), "attn_k": (small, HIDDEN)}
        parts |= {"attn_v": (small, HIDDEN), "attn_output": (HIDDEN, HIDDEN)}
        parts |= {"ffn_gate": (FFN, HIDDEN), "ffn_up": (FFN, HIDDEN), "ffn_down": (HIDDEN, FFN)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in parts.items()}
    for name, shape in shapes.items():
        if name != skip:
            w.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def test_a_gguf_file(tmp_path):
    teacher = load_teacher(str(write_llama(tmp_path / "tiny.gguf")))
    assert teacher.kind == "gguf" and isinstance(teacher.module, nn.Module)
    known = {"vocab_size": VOCAB, "context_length": 64, "family": "llama", "eos_token_id": 1, "tokenizer": "gguf"}
    assert known.items() <= teacher.info.items()
    assert not hasattr(teacher.module.config, "quantization_config")
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in teacher.module.parameters())
    with torch.no_grad():
        logits = teacher.module(torch.arange(5)[None], use_cache=False).logits
    assert logits.shape == (1, 5, VOCAB) and logits.isfinite().all()
    tokenizer = load_tokenizer(teacher)
    ids = tokenizer.encode("the thé")
    assert tokenizer.decode(ids) == "the thé" and len(ids) == 5  # the, space, th, two bytes of é
    assert tokenizer.num_tokens == VOCAB and tokenizer.eos_token_id == 1


def test_a_gguf_file_cut_at_any_point_is_refused(tmp_path):
    whole = write_llama(tmp_path / "tiny.gguf").read_bytes()
    file = tmp_path / "cut.gguf"
    for cut in [0, 3, 4, 8, 20, 60, 300, *range(1000, len(whole), len(whole) // 12), len(whole) - 40]:
        file.write_bytes(whole[:cut])
        with pytest.raises(TeacherError, match=r"is empty|unknown format|cannot read this GGUF file of"):
            load_teacher(str(file))


def test_a_gguf_file_without_a_weight(tmp_path):
    file = write_llama(tmp_path / "tiny.gguf", skip="blk.1.ffn_up")
    with pytest.raises(TeacherError, match="1 weights of the model are not in its files"):
        load_teacher(str(file))


def test_a_gguf_of_another_kind(tmp_path):
    w = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "clip")
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    with pytest.raises(TeacherError, match="cannot read this GGUF"):
        load_teacher(str(tmp_path / "x.gguf"))


def test_gguf_with_another_tokenizer_or_without_the_package(tmp_path, monkeypatch):
    file = write_llama(tmp_path / "tiny.gguf")
    assert load_tokenizer(load_teacher(str(file), tokenizer="bytes")).num_tokens == 256
    with pytest.raises(DataError, match="no such tokenizer"):
        load_teacher(str(file), tokenizer=str(tmp_path / "none"))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else real(name, *a))
    with pytest.raises(TeacherError) as e:
        load_teacher(str(file))
    assert "pip install 'tcal-compile[gguf]'" in e.value.hint
