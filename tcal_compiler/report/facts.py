"""What the manifest of a run folder says, ready for tables and plots. No text layout here.

Indices of layers are those of the plan; a layer's values are lists over its heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..passes.budget import cache_bytes, state_bytes
from ..passes.local_windows import local_held
from ..runtime.manifest import Manifest


@dataclass(frozen=True)
class Layer:
    """One attention site as the plan has it. kept: it stays softmax. window: tokens whose keys and values are kept."""

    index: int
    module: str
    kept: bool
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None
    first: int = 0
    local: int = 0
    local_first: bool = False

    def cache_bytes(self, tokens: int) -> int:
        """Bytes that softmax attention keeps of so many tokens."""
        dims = {"key_dim": self.head_dim, "value_dim": self.value_dim}
        return cache_bytes(tokens, kv_heads=self.kv_heads, window=self.window, first=self.first, **dims)

    @property
    def state_bytes(self) -> int:
        """Bytes of a converted site's state, whatever the length."""
        dims = {"kv_heads": self.kv_heads, "key_dim": self.head_dim, "value_dim": self.value_dim}
        return state_bytes(heads=self.heads, held=local_held(self.local, self.local_first), **dims)


def finite(x: Any) -> bool:
    """Numbers that are not finite lie in the manifest as text."""
    return isinstance(x, int | float) and math.isfinite(x)


@dataclass(frozen=True)
class Facts:
    """A run folder with at least the stage plan complete. name: what to call it."""

    name: str
    manifest: Manifest

    def evidence(self, stage: str) -> dict[str, Any]:
        """What a stage recorded; empty when it is not complete, or of before an earlier stage was made anew."""
        stages = self.manifest.stages
        return stages[stage].evidence if stage in stages and not self.manifest.made_before(stage) else {}

    @cached_property
    def layers(self) -> list[Layer]:
        plan: dict[str, Any] = self.manifest.plan
        config: Any = self.manifest.config
        bounded = config["export"].get("bounded_windows", False)  # runs from before there was a choice kept everything
        return [
            Layer(
                s["layer"],
                s["module"] or "-",
                s["layer"] in plan["keep"],
                s["heads"],
                s["kv_heads"],
                s["head_dim"],
                s["value_dim"],
                s["window"] if bounded else None,
                s.get("first", 0),
                s.get("local_window", 0),
                s.get("local_first", False),
            )
            for s in self.evidence("plan")["sites"]
        ]

    @cached_property
    def policy_scores(self) -> dict[int, float]:
        """Layer -> the value that the policy chose by; empty for policies that measure nothing."""
        return {int(i): v for i, v in (self.evidence("plan").get("scores") or {}).items()}

    @cached_property
    def distillation(self) -> list[dict[str, Any]]:
        """Points with step, predictions (trained on), held_out (what is minimised), kl and nll (held-out, nats)."""
        return self.evidence("distill").get("curve", [])

    @cached_property
    def measured(self) -> dict[int, dict[str, Any]]:
        """Converted layer -> distance, entropy, half_life (lists over heads) and error; empty before calibration."""
        return {s["index"]: s for s in self.evidence("calibrate").get("sites", [])}

    @cached_property
    def aligned_half_life(self) -> dict[int, list[float]]:
        return {int(i): v for i, v in self.evidence("align").get("half_life", {}).items()}

    @cached_property
    def curve(self) -> list[dict[str, Any]]:
        """Points with step, train and held_out; the latter two: layer (as text) -> loss."""
        return self.evidence("align").get("curve", [])

    @cached_property
    def held_out(self) -> dict[int, tuple[float, float]]:
        """Converted layer -> held-out error before alignment and that of the weights that were kept."""
        if not self.curve:
            return {}
        start = self.curve[0]["held_out"]
        return {int(i): (start[i], min(p["held_out"][i] for p in self.curve)) for i in start}

    @cached_property
    def mean_errors(self) -> tuple[float, float, float] | None:
        """Over the converted layers: held-out before and after alignment, and on the text trained on at the last step.

        None before alignment.
        """
        if not self.held_out:
            return None
        layers, trained = len(self.held_out), sum(self.curve[-1]["train"].values())
        before, after = (sum(e[part] for e in self.held_out.values()) / layers for part in (0, 1))
        return before, after, trained / layers

    @cached_property
    def scores(self) -> dict[str, dict[str, Any]]:
        """Model -> perplexity, kl and their errors; empty before tcal eval."""
        return self.evidence("eval").get("results", {})

    @cached_property
    def task_scores(self) -> dict[str, list[dict[str, Any]]]:
        """Model -> its runtime.tasks.TaskScore of every task and metric; empty before tcal eval with tasks."""
        return self.evidence("eval-tasks").get("results", {})

    @cached_property
    def checks(self) -> list[tuple[str, dict[str, Any]]]:
        return [(stage, c) for stage in self.manifest.stages for c in self.evidence(stage).get("checks", [])]

    def memory(self, tokens: int) -> tuple[int, int]:
        """Bytes of state and caches behind so many tokens of one sequence: the teacher's and the student's."""
        teacher = sum(layer.cache_bytes(tokens) for layer in self.layers)
        student = sum(s.cache_bytes(tokens) if s.kept else s.state_bytes for s in self.layers)
        return teacher, student

    @cached_property
    def contexts(self) -> list[int]:
        """Powers of four from 128 tokens up to the context length of the exported model, and that length."""
        config: Any = self.manifest.config
        most = int(config["export"]["max_length"])
        last = min(most, self.evidence("plan")["info"].get("context_length") or most)
        powers = [n for i in range(12) if (n := 128 * 4**i) < last]
        return [*powers, last]
