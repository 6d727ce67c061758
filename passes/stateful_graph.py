"""What a stateful graph carries from token to token, and in which order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from .types import Check

PARTS = {"softmax": ("key", "value"), "gdn": ("recurrent_state",), "local": ("conv_state",)}


@dataclass(frozen=True)
class LayerState:
    """What one attention core carries from token to token.

    softmax: key [B, K, P, Dk] and value [B, K, P, Dv]. gdn: recurrent_state [B, H, Dk, Dv]. local, attention over the
    last tokens beside a state: conv_state [B, 2 held, K max(Dk, Dv)], keys and values (kernels/local_attention/step.py)
    under the name by which onnxruntime-genai knows a state of a fixed size; a site with both is two of these, of one
    index.
    window: visible tokens including oneself, None for all. held: where not None, so many tokens are remembered, the
    `first` ones and the last.
    """

    index: int
    kind: Literal["softmax", "gdn", "local"]
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    held: int | None = None
    first: int = 0

    @property
    def grows(self) -> bool:
        """Whether the state grows with the tokens."""
        return self.kind == "softmax" and self.held is None

    @property
    def parts(self) -> tuple[str, ...]:
        return PARTS[self.kind]

    def shape(self, part: str, *, batch: int, past: int = 0) -> tuple[int, ...]:
        if part == "recurrent_state":
            return batch, self.num_heads, self.key_dim, self.value_dim
        if part == "conv_state":
            return batch, 2 * (self.held or 0), self.num_kv_heads * max(self.key_dim, self.value_dim)
        slots = past if self.held is None else self.held
        return batch, self.num_kv_heads, slots, self.key_dim if part == "key" else self.value_dim


@dataclass(frozen=True)
class StatefulGraph:
    """gm(input_ids [B, T], attention_mask [B, P + T], *past) -> (logits [B, T, V], *present), all int64 or float.

    past and present are, layer by layer, the parts of `layers`. attention_mask is 1 for tokens and 0 for padding, over
    the P tokens fed before and the T new ones. Padding may stand anywhere: it leaves recurrent states exactly as they
    were, is never attended to, and takes no slot of a cache for longer than its chunk. Caches have S >= 0 slots; one
    with fewer than P + T grows to that.
    """

    gm: GraphModule
    layers: tuple[LayerState, ...]
    vocab_size: int
    checks: tuple[Check, ...] = ()

    @property
    def depth(self) -> int:
        """How many layers there are."""
        return len({layer.index for layer in self.layers})

    @property
    def state_names(self) -> tuple[str, ...]:
        return tuple(f"{layer.index}.{part}" for layer in self.layers for part in layer.parts)

    @property
    def input_names(self) -> tuple[str, ...]:
        return ("input_ids", "attention_mask", *(f"past_key_values.{n}" for n in self.state_names))

    @property
    def output_names(self) -> tuple[str, ...]:
        return ("logits", *(f"present.{n}" for n in self.state_names))

    def empty_state(self, batch: int, *, past: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """The state before the first token; past > 0 gives caches of that many zero slots, for tracing."""
        shapes = [layer.shape(part, batch=batch, past=past) for layer in self.layers for part in layer.parts]
        return tuple(torch.zeros(s, dtype=dtype) for s in shapes)
