"""What measure_conversion.py may be asked to make: a start, and how many steps of which training."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from pydantic import TypeAdapter

from tcal_compiler.runtime.config import INIT_PARTS, AlignConfig, DistillConfig, InitName, check_parts

RECIPES = ("published", "mended")  # of published_recipe.py


@dataclass(frozen=True)
class Start:
    """An initialisation, or one of RECIPES, and the parts of it that are left out."""

    init: Any
    without: tuple[Any, ...] = ()

    @classmethod
    def of(cls, text: str) -> Start:
        """An init of tcal-compile or a recipe, as in taylor."""
        return cls(text if text in RECIPES else TypeAdapter(InitName).validate_python(text))

    def less(self, parts: tuple[str, ...]) -> Start:
        """Without these parts. Raises ValueError where it does not have them."""
        check_parts(self.init, parts)
        return replace(self, without=parts)

    def has(self, parts: tuple[str, ...]) -> bool:
        return set(parts) <= set(INIT_PARTS.get(self.init, ()))

    @property
    def name(self) -> str:
        return self.init + (f" without {', '.join(self.without)}" if self.without else "")


@dataclass(frozen=True)
class Schedule:
    """Where a student starts, and how many steps it is trained."""

    start: Start
    align: int
    distill: int

    @classmethod
    def of(cls, text: str) -> Schedule:
        """ "300": closed-form, 300 steps of alignment; "880+120" and 120 of distillation; "naive:0+120" without."""
        init, _, steps = text.rpartition(":")
        aligned, _, distilled = steps.partition("+")
        return cls(Start.of(init or "closed-form"), int(aligned), int(distilled or 0))

    @property
    def init(self) -> Any:
        return self.start.init

    @property
    def name(self) -> str:
        parts = [] if self.start == Start("closed-form") else [self.start.name]
        parts += [f"aligned-{self.align}"] if self.align or not parts else []
        return "-".join([*parts, f"distilled-{self.distill}"] if self.distill else parts)

    @property
    def spelled(self) -> str:
        return f"{self.init}:{self.align}+{self.distill}"


def with_ablations(starts: Iterable[Any], without: list[tuple[str, ...]]) -> list[Any]:
    """Starts or schedules, each followed by itself without these parts, where it has them."""
    found = []
    for item in starts:
        found.append(item)
        for parts in without:
            if isinstance(item, Start) and item.has(parts):
                found.append(item.less(parts))
            if isinstance(item, Schedule) and item.start.has(parts):
                found.append(replace(item, start=item.start.less(parts)))
    return found


def align_config(args: argparse.Namespace, steps: int, lr_teacher: float | None) -> AlignConfig:
    given = {"lr_new": args.lr_new, "lr_teacher": lr_teacher, "weight_decay": args.weight_decay, "noise": args.noise}
    return AlignConfig(steps=steps, batch=args.batch, **{k: v for k, v in given.items() if v is not None})


def distill_config(args: argparse.Namespace, steps: int) -> DistillConfig:
    rates = {"lr_gdn": args.distill_lr_gdn, "lr_other": args.distill_lr_other}
    return DistillConfig(
        steps=steps,
        batch=args.distill_batch or args.batch,
        score_every=max(1, steps // 4),
        teacher_dtype=args.distill_dtype,
        student_dtype=args.distill_dtype,
        compile=args.distill_compile,
        checkpoint_activations=args.distill_recompute,
        **{k: v for k, v in rates.items() if v is not None},
    )


@dataclass(frozen=True)
class Trial:
    """Steps of distillation of every candidate set of kl, and of them those of warm-up; by default as the policy has
    them.
    """

    steps: int
    warmup: int | None = None

    @classmethod
    def list_of(cls, text: str) -> list[Trial]:
        """ "20,40/20": 20 steps, and 40 with 20 of warm-up."""
        return [cls(*map(int, part.split("/"))) for part in text.split(",")]

    @property
    def name(self) -> str:
        return f"{self.steps}" + ("" if self.warmup is None else f"/{self.warmup}")

    def config(self, args: argparse.Namespace) -> DistillConfig:
        found = distill_config(args, 1).trial(self.steps)
        return found if self.warmup is None else found.model_copy(update={"warmup": self.warmup})


NO_TRIAL = Trial(0)
