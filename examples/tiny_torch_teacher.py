"""A tiny byte-level teacher in plain PyTorch: what a model from outside transformers must look like.

It takes input_ids [B, T] and returns logits [B, T, 256]. Positions come from torch.arange inside forward, attention is
causal scaled_dot_product_attention with grouped K/V heads, nothing else reads across time.

    python examples/tiny_torch_teacher.py --text FILE --out teacher.pt2   # trains (CPU, under 90 s), saves and exports

`factory` returns the trained model: pass examples.tiny_torch_teacher:factory where a module:factory is expected.
"""

from __future__ import annotations

import argparse
import importlib.resources
import math
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

VOCAB = 256  # a token is a byte
ASSETS = Path("assets") / "tiny" / "weights.safetensors"


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, hidden // heads
        self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, self.heads * self.head_dim))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, inner: int) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(hidden, eps=1e-5)
        self.attn = Attention(hidden, heads, kv_heads)
        self.mlp_norm = nn.RMSNorm(hidden, eps=1e-5)
        self.mlp = MLP(hidden, inner)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.attn_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class TinyTeacher(nn.Module):
    """Four layers over bytes; about 0.2 million parameters."""

    def __init__(
        self, hidden: int = 64, layers: int = 4, heads: int = 4, kv_heads: int = 2, inner: int = 176, base: float = 1e4
    ) -> None:
        super().__init__()
        self.rotary_dim, self.base = hidden // heads, base
        self.embed = nn.Embedding(VOCAB, hidden)
        self.layers = nn.ModuleList(Block(hidden, heads, kv_heads, inner) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden, eps=1e-5)
        self.head = nn.Linear(hidden, VOCAB, bias=False)
        nn.init.normal_(self.embed.weight, std=0.5)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device, dtype=torch.float32)
        exponents = torch.arange(0, self.rotary_dim, 2, device=input_ids.device, dtype=torch.float32) / self.rotary_dim
        angles = positions[:, None] * self.base**-exponents
        cos, sin = angles.cos(), angles.sin()
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions on [B, H, T, D]; the first half of D pairs with the second."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def train(text: bytes, steps: int = 600, batch: int = 8, length: int = 256, seed: int = 0) -> TinyTeacher:
    """A seeded model trained on the bytes of a text, in eval mode."""
    torch.manual_seed(seed)
    model, lr = TinyTeacher(), 5e-3
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    began = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        starts = torch.randint(len(data) - length, (batch, 1))
        window = data[starts + torch.arange(length + 1)].long()
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            seconds = time.perf_counter() - began
            left = seconds * (steps / (step + 1) - 1)
            print(
                f"step {step + 1}/{steps}  {loss.item() / math.log(2):.3f} bits per byte  {left:.0f} s left", flush=True
            )
    return model.eval()


def shipped_weights() -> Path:
    """The trained weights: of this checkout when run from one, else of the installed package."""
    here = Path(__file__).resolve().parent.parent / "tcal_compiler" / ASSETS
    return here if here.exists() else Path(str(importlib.resources.files("tcal_compiler"))) / ASSETS


def factory(weights: str | Path | None = None) -> TinyTeacher:
    """The trained tiny teacher in eval mode. weights: a .safetensors file; default: the one that ships."""
    model = TinyTeacher()
    model.load_state_dict(load_file(weights or shipped_weights()))
    return model.eval()


def export(model: nn.Module, path: Path) -> None:
    """Saves as a .pt2 with dynamic batch and sequence, without the stack traces, which name files of this machine."""
    example = torch.zeros(2, 8, dtype=torch.int64)
    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(model, (example,), dynamic_shapes=dynamic, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    torch.export.save(program, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text", type=Path, help="train on the bytes of this file; default: export the shipped weights"
    )
    parser.add_argument("--out", type=Path, required=True, help="the .pt2 file to write")
    parser.add_argument("--weights", type=Path, help="write the trained weights to this .safetensors file")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = train(args.text.read_bytes(), args.steps, seed=args.seed) if args.text else factory()
    if args.weights:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, args.weights)
    export(model, args.out)


if __name__ == "__main__":
    main()
