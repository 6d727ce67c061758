"""A model of your own, in plain PyTorch: exported to teacher.pt2, looked at, converted.

python examples/own_model.py --out own-run --until align
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tcal_compiler
from tcal_compiler import Config


class Layer(nn.Module):
    """Pre-norm attention with fused projections, and an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.before(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp(self.between(x))


class OwnModel(nn.Module):
    """Token ids [B, T] -> logits [B, T, V], with learned positions. Yours would be trained."""

    def __init__(self, vocab: int = 256, width: int = 48, heads: int = 3, layers: int = 3, context: int = 256) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def export(model: nn.Module, path: Path) -> None:
    """With dynamic batch and length, from an example of at least 2 x 2."""
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    ids = torch.zeros(2, 8, dtype=torch.long)
    torch.export.save(torch.export.export(model.eval(), (ids,), dynamic_shapes=(dynamic,), strict=False), path)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--until", default="export", help="last stage to run")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    export(OwnModel(), args.out / "teacher.pt2")
    config = Config.model_validate(
        {"policy": "keep=0", "calib": {"sequences": 8, "length": 96}, "align": {"steps": 10, "batch": 4}}
    )
    run = tcal_compiler.convert(
        str(args.out / "teacher.pt2"), tokenizer="bytes", out=args.out / "run", config=config, until=args.until
    )
    print((run / "report.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
