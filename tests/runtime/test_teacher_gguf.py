"""GGUF teachers, with a tiny Llama written here."""

from __future__ import annotations

import importlib.util
import os
from contextlib import nullcontext
from itertools import product
from unittest.mock import Mock

import numpy as np
import pytest
import tokenizers
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tcal_compiler.errors import DataError, TeacherError
from tcal_compiler.runtime import checkpoints
from tcal_compiler.runtime.checkpoints import shell_of
from tcal_compiler.runtime.gguf_reader import plain_gguf_reader
from tcal_compiler.runtime.teacher import load_teacher, load_tokenizer
from tcal_compiler.runtime.tokenizer import HfTokenizer, _adds_bos, prompt_start, read_tokenizer

gguf = pytest.importorskip("gguf")

from tiny_gguf import VOCAB, write_llama  # noqa: E402


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
    assert "pip install gguf" in e.value.hint


def test_a_header_is_read_through_plain_arrays_and_once(tmp_path, monkeypatch):
    file, usual = write_llama(tmp_path / "tiny.gguf"), gguf.GGUFReader
    with plain_gguf_reader():
        reader = gguf.GGUFReader(str(file))
    assert gguf.GGUFReader is usual
    for name, field in usual(str(file)).fields.items():
        assert all(type(part) is np.ndarray for part in reader.fields[name].parts)
        assert reader.fields[name].contents() == field.contents()
    monkeypatch.setattr(gguf, "GGUFReader", Mock(wraps=usual))
    monkeypatch.setattr(checkpoints, "plain_gguf_reader", nullcontext)
    for layers, seen in ((1, 1), (2, 1)):
        assert shell_of(file, layers=layers).config.num_hidden_layers == layers
        assert gguf.GGUFReader.call_count == seen
    os.utime(file, (1, 1))
    shell_of(file)
    assert gguf.GGUFReader.call_count == 2


@pytest.mark.parametrize("asked", [True, False, None])
def test_the_bos_token_that_the_file_asks_for(tmp_path, monkeypatch, asked):
    """Some versions of transformers leave it out."""
    file = write_llama(tmp_path / "tiny.gguf", add_bos=asked)
    usual = AutoTokenizer.from_pretrained

    def without(*args: object, **kwargs: object) -> object:
        hf = usual(*args, **kwargs)
        hf.backend_tokenizer.post_processor = None
        return hf

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", without)
    found = load_tokenizer(load_teacher(str(file)))
    assert prompt_start(found) == ((found.bos_token_id,) if asked else ())
    found.save(tmp_path / "saved")
    monkeypatch.undo()
    assert prompt_start(read_tokenizer(tmp_path / "saved")) == prompt_start(found)


def test_of_a_large_file_one_byte_says_whether_bos_is_added(tmp_path):
    file = write_llama(tmp_path / "tiny.gguf", add_bos=True)
    os.truncate(file, 1 << 40)
    assert _adds_bos(file)


def test_a_bos_token_with_a_space(tmp_path):
    model = tokenizers.models.BPE({"x": 0, "<begin of text>": 1}, [])
    found = HfTokenizer(
        PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), bos_token="<begin of text>")
    )
    found.put_bos_first()
    assert found.encode("x", special=True) == [1, 0]


def test_a_tokenizer_that_splits_its_own_words_is_refused(tmp_path, monkeypatch):
    """As transformers 5.17 reads Gemma-3's."""
    words = [a + b + c + d for a, b, c, d in product("ab", "cde", "fg", "hij")]
    vocabulary = {t: i for i, t in enumerate([*"abcdefghij", *words])}
    merges = [[w[:1], w[1:2]] for w in words] + [[w[:2], w[2:3]] for w in words] + [[w[:3], w[3:]] for w in words]
    vocabulary |= {m[0] + m[1]: len(vocabulary) + i for i, m in enumerate(merges) if m[0] + m[1] not in vocabulary}
    file = write_llama(tmp_path / "tiny.gguf")
    for given, fits in ((merges, True), ([], False)):
        model = tokenizers.models.BPE(vocabulary, [tuple(m) for m in given])
        hf = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model))
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, hf=hf, **kwargs: hf)
        if fits:
            assert read_tokenizer(tmp_path, gguf_file=file.name).encode("adfh") == [vocabulary["adfh"]]
        else:
            with pytest.raises(DataError, match="misreads its tokenizer: 0 of 36 words of it are one id"):
                read_tokenizer(tmp_path, gguf_file=file.name)
