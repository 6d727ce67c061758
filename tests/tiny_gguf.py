"""A tiny Llama in GGUF, with random weights."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

VOCAB, HIDDEN, LAYERS, HEADS, KV, FFN = 300, 32, 2, 4, 2, 64


def write_llama(path: Path, seed: int = 0, skip: str = "", add_bos: bool | None = None) -> Path:
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
    if add_bos is not None:
        w.add_add_bos_token(add_bos)
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
