"""Tiny untrained causal Transformers: families of the transformers library from their configurations, and plain ones.

Nothing is downloaded. B batch, T tokens, H heads, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH, HEADS, KV_HEADS, TABLE, WINDOW = 256, 64, 4, 2, 256, 8
IMPLEMENTATIONS = ("sdpa", "eager")

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": TABLE,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _BASE | {"num_key_value_heads": KV_HEADS}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = (
    _BASE
    | _EXPERTS
    | {
        "num_key_value_heads": HEADS,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
)
_LINEAR = _GROUPED | {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_BOTH_TYPES = ["sliding_attention", "full_attention"]

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", _GROUPED | {"tie_word_embeddings": True}),
    "Qwen2": ("Qwen2", _GROUPED),
    "Qwen3": ("Qwen3", _GROUPED | {"head_dim": 32}),
    "Mistral (full)": ("Mistral", _GROUPED | {"sliding_window": None}),
    "Mistral (sliding window)": ("Mistral", _GROUPED | {"sliding_window": WINDOW}),
    "Gemma": ("Gemma", _GROUPED | {"head_dim": 16}),
    "Gemma2": ("Gemma2", _GROUPED | {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16}),
    "Gemma3": (
        "Gemma3Text",
        _GROUPED | {"head_dim": 16, "sliding_window": WINDOW, "layer_types": _BOTH_TYPES, "query_pre_attn_scalar": 24},
    ),
    "Phi-3": ("Phi3", _GROUPED | {"original_max_position_embeddings": TABLE}),
    "Phi": ("Phi", _BASE),
    "GPT-2": ("GPT2", {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "n_positions": TABLE}),
    "GPT-J": (
        "GPTJ",
        {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "n_positions": TABLE, "rotary_dim": 8},
    ),
    "GPT-NeoX": ("GPTNeoX", _BASE),
    "OPT": ("OPT", _BASE | {"ffn_dim": 96, "word_embed_proj_dim": WIDTH}),
    "OLMo": ("Olmo", _GROUPED),
    "OLMo2": ("Olmo2", _GROUPED),
    "SmolLM3": ("SmolLM3", _GROUPED | {"no_rope_layers": [1, 0]}),
    "StableLM": ("StableLm", _GROUPED),
    "Starcoder2": ("Starcoder2", _GROUPED | {"sliding_window": None}),
    "Granite": ("Granite", _GROUPED | {"attention_multiplier": 0.2}),
    "Cohere": ("Cohere", _GROUPED),
    "Cohere2": ("Cohere2", _GROUPED | {"sliding_window": WINDOW, "layer_types": _BOTH_TYPES}),
    "Falcon": ("Falcon", _BASE | {"new_decoder_architecture": False, "alibi": False}),
    "Falcon (alibi)": ("Falcon", _BASE | {"new_decoder_architecture": False, "alibi": True}),
    "BLOOM": ("Bloom", {"vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": 2, "n_head": HEADS}),
    "MPT": ("Mpt", {"vocab_size": VOCAB, "d_model": WIDTH, "n_layers": 2, "n_heads": HEADS, "max_seq_len": TABLE}),
    "GPT-OSS": (
        "GptOss",
        _GROUPED
        | {"head_dim": 16, "sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"layer_types": _BOTH_TYPES},
    ),
    "Mixtral": ("Mixtral", _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "Qwen3-MoE": ("Qwen3Moe", _GROUPED | _EXPERTS | {"head_dim": 16, "num_experts": 4}),
    "DeepSeek-V2": ("DeepseekV2", _LATENT | {"topk_method": "greedy"}),
    "DeepSeek-V3": ("DeepseekV3", _LATENT),
    "Qwen3-Next": (
        "Qwen3Next",
        _LINEAR | _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32, "linear_conv_kernel_dim": 4},
    ),
    "Qwen3.5": ("Qwen3_5Text", _LINEAR | {"linear_conv_kernel_dim": 4}),
}


def transformers_model(family: str, implementation: str) -> nn.Module:
    """A causal model of the family with random weights, in eval mode."""
    import transformers

    name, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    return transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation, dtype=torch.float32
    ).eval()


class NanoAttention(nn.Module):
    """Causal attention as small GPT programs write it: fused, manual, einsum or grouped einsum."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        kv = KV_HEADS if spelling == "grouped einsum" else HEADS
        self.dim, self.kv_heads = WIDTH // HEADS, kv
        self.qkv = nn.Linear(WIDTH, WIDTH + 2 * kv * self.dim)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.1)
        self.register_buffer("tril", torch.ones(TABLE, TABLE).tril()[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        kv = self.kv_heads * self.dim
        q, k, v = (z.view(b, t, -1, self.dim) for z in self.qkv(x).split([WIDTH, kv, kv], -1))
        y = {"fused": self.fused, "manual": self.manual, "einsum": self.einsum, "grouped einsum": self.grouped}[
            self.spelling
        ](q, k, v)
        return self.out(y.reshape(b, t, WIDTH))

    def fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        drop = self.drop.p if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=drop, is_causal=True).transpose(1, 2)

    def manual(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        t = q.shape[2]
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.tril[:, :, :t, :t] == 0, float("-inf"))
        return (self.drop(F.softmax(scores, dim=-1)) @ v).transpose(1, 2).contiguous()

    def einsum(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[1]
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(self.dim)
        scores = scores + torch.full((t, t), float("-inf"), device=q.device).triu(1)
        return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)

    def grouped(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, t = q.shape[:2]
        q = q.view(b, t, KV_HEADS, HEADS // KV_HEADS, self.dim)
        scores = torch.einsum("btkgd,bskd->bkgts", q * self.dim**-0.5, k)
        scores = torch.where(self.tril[0, 0, :t, :t] == 1, scores, torch.finfo(scores.dtype).min)
        return torch.einsum("bkgts,bskd->btkgd", scores.softmax(-1), v)


class TorchAttention(nn.Module):
    """nn.MultiheadAttention, with its weights asked for (written out) or not (fused)."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        mask = torch.full((t, t), float("-inf"), device=x.device).triu(1)
        return self.attention(x, x, x, attn_mask=mask, need_weights=self.need_weights)[0]


class FlexAttention(nn.Module):
    """torch's flex_attention with a causal mask_mod, or with alibi as its score_mod."""

    def __init__(self, alibi: bool) -> None:
        super().__init__()
        self.alibi = alibi
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        b, t, _ = x.shape
        q, k, v = (z.view(b, t, HEADS, -1).transpose(1, 2) for z in self.qkv(x).split(WIDTH, -1))
        block = create_block_mask(lambda b, h, i, j: i >= j, None, None, t, t, device=str(x.device))
        score = (lambda s, b, h, i, j: s - 0.1 * (i - j)) if self.alibi else None
        y = flex_attention(q, k, v, score_mod=score, block_mask=block)
        return self.out(y.transpose(1, 2).reshape(b, t, WIDTH))


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), attention
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class EncoderLayer(nn.Module):
    """nn.TransformerEncoderLayer used as a decoder, by a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 96, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        return self.layer(x, src_mask=mask, is_causal=True)


class PlainModel(nn.Module):
    """input_ids [B, T] -> logits [B, T, VOCAB], learned positions, tied head."""

    def __init__(self, make_block: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(TABLE, WIDTH)
        self.blocks = nn.ModuleList([make_block(), make_block()])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def _block(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Block(make())


PLAIN: dict[str, Callable[[], nn.Module]] = {
    "small GPT, fused": _block(partial(NanoAttention, "fused")),
    "small GPT, manual softmax": _block(partial(NanoAttention, "manual")),
    "small GPT, einsum": _block(partial(NanoAttention, "einsum")),
    "small GPT, grouped einsum": _block(partial(NanoAttention, "grouped einsum")),
    "nn.MultiheadAttention": _block(partial(TorchAttention, False)),
    "nn.MultiheadAttention, need_weights": _block(partial(TorchAttention, True)),
    "nn.TransformerEncoderLayer": EncoderLayer,
    "flex_attention": _block(partial(FlexAttention, False)),
    "flex_attention, alibi": _block(partial(FlexAttention, True)),
}


def plain_model(name: str) -> nn.Module:
    """A plain PyTorch model with random weights, in eval mode."""
    return PlainModel(PLAIN[name]).eval()
