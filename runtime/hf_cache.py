"""What a student remembers between calls, as the cache that transformers' generation hands around and reorders.

B rows of a batch, P tokens seen, padding included.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from tcal_compiler.errors import ConfigError, DataError
from tcal_compiler.passes.stateful_graph import StatefulGraph


class StudentCache(Cache):
    """The state of one student: key and value caches of kept layers, recurrent states of converted ones.

    Args:
        student: the only model that may read and write it.
        graph: its stateful graph.
        slots: tokens that key and value caches have room for from the start; None lets them grow.

    Attributes:
        states: in the order of the graph's `state_names`; None before the first token.
        mask: [B, P] int64, 0 for padding; None before the first token.

    `copy.deepcopy` gives a state to come back to: recurrent states cannot forget their last tokens.
    """

    def __init__(self, student: nn.Module, graph: StatefulGraph, *, slots: int | None = None) -> None:
        super().__init__(layers=[])
        self._owner = weakref.ref(student)
        self._depth = graph.depth
        self.slots = slots
        self.states: tuple[Tensor, ...] | None = None
        self.mask: Tensor | None = None

    def check(self, student: nn.Module, batch: int, new: int) -> None:
        """Raises ConfigError for another model's state, DataError for another batch or a full static cache."""
        if self._owner() is not student:
            what = "holds the state of another model"
            raise ConfigError("cache", what, "a cache that this very model made, or none")
        if self.mask is not None and len(self.mask) != batch:
            what = f"has {batch} rows, the cache {len(self.mask)}"
            raise DataError("input_ids", what, "cache.batch_repeat_interleave or batch_select_indices")
        if self.slots is not None and self.get_seq_length() + new > self.slots:
            what = f"{self.get_seq_length()} tokens and {new} more do not fit in a static cache of {self.slots}"
            raise DataError("cache", what, "a larger one: generate(max_new_tokens=...) makes it as large as needed")

    def seen(self, ids: Tensor) -> Tensor:
        """mask, [B, 0] before the first token, for new ids [B, T]."""
        return ids.new_zeros(len(ids), 0) if self.mask is None else self.mask

    def start(self, graph: StatefulGraph, like: Tensor) -> tuple[Tensor, ...]:
        """states, empty ones before the first token, for new ids like [B, T]."""
        if self.states is not None:
            return self.states
        return tuple(s.to(like.device) for s in graph.empty_state(len(like), past=self.slots or 0))

    def _map(self, change: Any) -> None:
        if self.states is not None and self.mask is not None:
            self.states, self.mask = tuple(map(change, self.states)), change(self.mask)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t.index_select(0, indices.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, 0))

    def reset(self) -> None:
        """Forgets all tokens."""
        self.states = self.mask = None

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            what = f"cannot forget its last {abs(tokens_to_remove)} tokens: recurrent states keep no history"
            raise ConfigError("cache", what, "copy.deepcopy(cache) before them; no assisted generation")

    def activate_past_recording(self) -> None:
        raise ConfigError("cache", "recurrent states keep no history to go back to", "no assisted generation")

    def update(self, *_: Any, **__: Any) -> Any:
        raise ConfigError("cache", "is written by its own student's graph only", "the cache class of that other model")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.mask is None else self.mask.shape[1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1 if self.slots is None else self.slots

    def __len__(self) -> int:
        return self._depth

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._depth} layers, {self.get_seq_length()} tokens, slots={self.slots})"

    @property
    def batch_size(self) -> int:
        return -1 if self.mask is None else len(self.mask)

    @property
    def is_initialized(self) -> bool:
        return self.states is not None

    is_compileable = False  # type: ignore[assignment]
    is_croppable = False  # type: ignore[assignment]

    @property
    def is_linear(self) -> list[bool]:
        return [False] * self._depth  # what it has seen has a length, whatever its layers are

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * self._depth


def full_mask(cache: StudentCache, ids: Tensor, mask: Tensor | None) -> Tensor:
    """The mask [B, P + T] of everything seen and the new ids [B, T].

    mask: of that shape already, or None. Raises DataError when it says otherwise of what was seen.
    """
    seen = cache.seen(ids)
    if mask is None:
        return torch.cat([seen, torch.ones_like(ids)], 1)
    mask = (mask != 0).long()
    if not torch.equal(mask[:, : seen.shape[1]], seen):
        what = "hides other tokens than when they were fed"
        raise DataError("attention_mask", what, "the mask that they were fed with, and the new tokens' behind it")
    return mask
