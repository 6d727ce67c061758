"""Tiny untrained teachers: plain PyTorch in many spellings of attention, and transformers families.

B batch, T tokens, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcal_compiler.passes.capture import capture_program, export_module
from tcal_compiler.passes.choose import choose
from tcal_compiler.passes.find_attention import find_attention
from tcal_compiler.passes.local_windows import with_local_windows
from tcal_compiler.passes.site_program import tap_graph
from tcal_compiler.passes.to_sdpa import to_sdpa
from tcal_compiler.passes.types import AttentionSite, Capture, SiteScan
from tcal_compiler.runtime.initialize import naive_
from tcal_compiler.runtime.mixer import GdnMixer
from tcal_compiler.runtime.student import Student, make_student

VOCAB, WIDTH, HEADS, KV_HEADS, DIM = 64, 32, 4, 2, 8
GROUP = HEADS // KV_HEADS
sdpa = F.scaled_dot_product_attention
causal = partial(sdpa, is_causal=True)


def distances(q: Tensor) -> Tensor:
    """[T, T]: how far key s lies behind query t."""
    steps = torch.arange(q.shape[2])
    return steps[:, None] - steps[None, :]


def masked(rule: Callable[[Tensor], Tensor], *, additive: bool = False) -> Callable[..., Tensor]:
    """Attention with a mask computed in the graph from distances."""

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = rule(distances(q))
        mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf")) if additive else seen
        return sdpa(q, k, v, attn_mask=mask, enable_gqa=True)

    return core


def window_and_first(window: int, first: int) -> Callable[..., Tensor]:
    """Attention over the last tokens and the first ones."""

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        far, steps = distances(q), torch.arange(q.shape[2])
        return sdpa(q, k, v, attn_mask=(far >= 0) & ((far < window) | (steps < first)), enable_gqa=True)

    return core


def repeated(x: Tensor, how: str) -> Tensor:
    """[B, K, T, D] -> [B, H, T, D]; only "tile" has another order of heads."""
    b, _, t, _ = x.shape
    if how == "expand":
        return x[:, :, None].expand(b, KV_HEADS, GROUP, t, DIM).reshape(b, HEADS, t, DIM)
    if how == "tile":
        return x[:, None].expand(b, GROUP, KV_HEADS, t, DIM).reshape(b, HEADS, t, DIM)
    if how == "late transpose":
        y = x.transpose(1, 2)[:, :, :, None].expand(b, t, KV_HEADS, GROUP, DIM)
        return y.reshape(b, t, HEADS, DIM).transpose(1, 2)
    return x.repeat_interleave(GROUP, 1)


def with_repeat(how: str) -> Callable[..., Tensor]:
    return lambda q, k, v: causal(q, repeated(k, how), repeated(v, how))


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    far = distances(q)
    return sdpa(q, k, v, attn_mask=(-0.1 * far).masked_fill(far < 0, float("-inf")), enable_gqa=True)


def quadratic_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    far = distances(q)
    return sdpa(q, k, v, attn_mask=(-0.1 * far**2).masked_fill(far < 0, float("-inf")), enable_gqa=True)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ repeated(k, "expand").transpose(-1, -2) / math.sqrt(DIM)
    return scores.masked_fill(distances(q) < 0, float("-inf")).softmax(-1) @ repeated(v, "expand")


CORES: dict[str, Callable[..., Tensor]] = {
    "is_causal": partial(causal, enable_gqa=True),
    "mask": masked(lambda d: d >= 0),
    "additive mask": masked(lambda d: d >= 0, additive=True),
    "scale": partial(causal, scale=0.3, enable_gqa=True),
    "window": masked(lambda d: (d >= 0) & (d < 5)),
    "window and first": window_and_first(5, 2),
    "expand": with_repeat("expand"),
    "tile": with_repeat("tile"),
    "late transpose": with_repeat("late transpose"),
    "interleave": with_repeat("interleave"),
    "bidirectional": partial(sdpa, enable_gqa=True),
    "mask that hides nothing": masked(lambda d: d >= -1_000_000),
    "prefix": masked(lambda d: d >= -2),
    "strided": masked(lambda d: (d >= 0) & (d % 2 == 0)),
    "dropout": partial(causal, dropout_p=0.1, enable_gqa=True),
    "alibi": alibi,
    "quadratic bias": quadratic_bias,
    "written out": written_out,
    "scale by length": lambda q, k, v: causal(q, k, v, scale=1.0 / q.shape[2], enable_gqa=True),
}


def rotate(x: Tensor) -> Tensor:
    """Rotary positions over the last dimension of [B, H, T, D]."""
    angles = torch.arange(x.shape[2])[:, None] * 100.0 ** -torch.arange(0, 1, 2 / DIM)
    first, second = x.chunk(2, -1)
    return torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), -1)


class Attention(nn.Module):
    def __init__(self, core: str, *, rope: bool, bias: bool, fused: bool, norm_qk: bool, memory: bool) -> None:
        super().__init__()
        self.core, self.rope, self.widths = CORES[core], rope, [HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM]
        self.fused = nn.Linear(WIDTH, sum(self.widths), bias=bias) if fused else None
        self.proj = nn.ModuleList([] if fused else [nn.Linear(WIDTH, w, bias=bias) for w in self.widths])
        self.out = nn.Linear(HEADS * DIM, WIDTH, bias=bias)
        self.norm_qk = nn.RMSNorm(DIM) if norm_qk else nn.Identity()
        self.memory = nn.Parameter(torch.randn(1, 6, WIDTH)) if memory else None

    def heads(self, x: Tensor) -> list[Tensor]:
        b, t, _ = x.shape
        parts = self.fused(x).split(self.widths, -1) if self.fused else [p(x) for p in self.proj]
        q, k, v = (p.view(b, t, -1, DIM).transpose(1, 2) for p in parts)
        if self.memory is not None:
            k, v = (p(self.memory).view(1, 6, -1, DIM).transpose(1, 2).expand(b, -1, -1, -1) for p in self.proj[1:])
        q, k = self.norm_qk(q), self.norm_qk(k)
        return [rotate(q), rotate(k), v] if self.rope else [q, k, v]

    def forward(self, x: Tensor, shared_k: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v = self.heads(x)
        y = self.core(q, k if shared_k is None else shared_k, v)
        return self.out(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], HEADS * DIM)), k


class Block(nn.Module):
    def __init__(self, core: str, router: bool, **attention: bool) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), Attention(core, **attention)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))
        self.router = nn.Linear(WIDTH, 2) if router else None

    def forward(self, x: Tensor, shared_k: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, k = self.attn(self.norm(x), shared_k)
        x = x + y
        z = self.mlp(x)
        return x + (z if self.router is None else z * self.router(x).softmax(-1)[..., :1]), k


class TinyModel(nn.Module):
    """input_ids [B, T] -> logits [B, T, VOCAB].

    share: "k" gives the second layer the first one's keys, "weights" runs one block twice. tied: head = embedding.
    """

    def __init__(
        self,
        core: str | tuple[str, ...] = "is_causal",
        *,
        layers: int = 2,
        vocab: int = VOCAB,
        share: str = "",
        tied: bool = False,
        router: bool = False,
        rope: bool = True,
        bias: bool = False,
        fused: bool = False,
        norm_qk: bool = False,
        memory: bool = False,
        sharp: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        cores = (core,) * layers if isinstance(core, str) else core
        kinds = {"rope": rope, "bias": bias, "fused": fused, "norm_qk": norm_qk, "memory": memory}
        self.embed, self.head = nn.Embedding(vocab, WIDTH), nn.Linear(WIDTH, vocab, bias=False)
        self.blocks = nn.ModuleList(Block(c, router, **kinds) for c in cores)
        self.share = share
        if share == "weights":
            self.blocks = nn.ModuleList([self.blocks[0]] * len(cores))
        if tied:
            self.head.weight = self.embed.weight
        with torch.no_grad():
            for block in self.blocks:  # untrained attention is nearly uniform; sharp > 1 makes it look at few tokens
                for name, p in block.attn.named_parameters():
                    p.mul_(sharp if name.startswith("proj") else 1.0)
                    if name.endswith("bias"):
                        p.normal_(0, 0.5)
        self.eval()

    def forward(self, input_ids: Tensor) -> Tensor:
        x, keys = self.embed(input_ids), None
        for block in self.blocks:
            x, k = block(x, keys if self.share == "k" else None)
            keys = k if keys is None else keys
        return self.head(x)


class Bag(nn.Module):
    """A causal model without attention."""

    def __init__(self, vocab: int = VOCAB) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab, WIDTH), nn.Linear(WIDTH, vocab)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids))


def lone_site(window: int | None = None, scale: float = 0.9, **scores: Any) -> AttentionSite:
    """A site's facts without a graph around it."""
    names = dict.fromkeys(("layer", "anchor", "q", "k", "v", "x", "y", "proof"), "")
    sizes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "key_dim": DIM, "value_dim": DIM, "hidden": WIDTH}
    return AttentionSite(index=0, scale=scale, window=window, rope=True, **names, **sizes, **scores)


def llama(**changes: object) -> nn.Module:
    """A transformers Llama with grouped heads, tied embeddings and the sdpa mask subgraph."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "tie_word_embeddings": True,
            "attn_implementation": "sdpa",
        }
        | changes
    )
    return transformers.LlamaForCausalLM(config).eval()


def program_of(model: nn.Module, vocab: int = VOCAB) -> torch.export.ExportedProgram:
    return export_module(model, has_positions=False, vocab_size=vocab)


def capture_of(model: nn.Module, shapes: tuple[tuple[int, int], ...] = ((2, 9),)) -> Capture:
    return capture_program(program_of(model), teacher=model, implementation="test", shapes=shapes)


@cache
def scanned(core: str | tuple[str, ...] = "is_causal", **options: object) -> tuple[Capture, SiteScan]:
    """Capture and scan of a TinyModel, shared by tests: do not edit."""
    capture = capture_of(TinyModel(core, **options))
    return capture, find_attention(capture)


def student_of(core: str | tuple[str, ...] = "is_causal", policy: str = "none", **options: object) -> Student:
    """A student of its own, around the shared capture."""
    capture, scan = scanned(core, **options)
    return make_student(capture, scan, choose(scan, policy))


def capture_of_student(core: str | tuple[str, ...], policy: str, *, local_window: int) -> Capture:
    """The exported graph of a student with random mixers, whose windows count about as much as their teacher."""
    capture, scan = scanned(core, sharp=3.0)
    student = make_student(capture, with_local_windows(scan, local_window), choose(scan, policy))
    for i, m in enumerate(m for m in student.gm.modules() if isinstance(m, GdnMixer)):
        naive_(m, gen := torch.Generator().manual_seed(i))
        for scale in (m.norm, *([m.local_scale] if m.local else [])):
            scale.data.uniform_(0.5, 1.5, generator=gen)
    program = student.export()
    return capture_program(program, teacher=program.module(), implementation="student", shapes=((2, 9), (1, 1)))


def recomputed(capture: Capture, site: AttentionSite) -> tuple[torch.Tensor, torch.Tensor]:
    """The core's output as the site's facts say, and as the graph computes it."""
    with torch.no_grad():
        taps = tap_graph(to_sdpa(capture)[0].gm, [site.q, site.k, site.v, site.anchor])
        q, k, v, y = taps(*capture.inputs(torch.arange(22).view(2, 11) % VOCAB))
    group = site.num_heads // site.num_kv_heads
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    steps = torch.arange(q.shape[2])
    far = steps[:, None] - steps[None]
    hidden = (far < 0) | ((far >= (site.window or 10**9)) & (steps >= site.first))
    weights = (q @ k.transpose(-1, -2) * site.scale).double()
    if site.softcap:
        weights = site.softcap * (1 - 2 / ((2 * weights / site.softcap).exp() + 1))
    if site.slopes:
        weights = weights - torch.tensor(site.slopes, dtype=torch.float64)[:, None, None] * far
    weights = weights.exp().masked_fill(hidden, 0)
    sink = torch.tensor(site.sinks, dtype=torch.float64).exp()[:, None, None] if site.sinks else 0.0
    return (weights / (weights.sum(-1, keepdim=True) + sink)).to(v.dtype) @ v, y
