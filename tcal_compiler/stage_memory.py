"""tcal inspect --memory: what each stage of a conversion holds in memory and leaves on disk, before a weight is read.

The teacher is captured as a shell without weights, and a piece of every stage runs on tensors without values, whose
bytes are counted (runtime/allocations.py). Of what other libraries do inside, only the weights are counted, as often as
they hold them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from .config import DEFAULT_POLICY, Config
from .dry_run import size_text, stand_in
from .passes.capture import SHAPES
from .passes.choose import choose, scored_by
from .passes.find_attention import find_attention
from .passes.types import Plan, SiteScan
from .runtime.allocations import Allocations, empty_like_, without_values
from .runtime.capture_teacher import capture_shell
from .runtime.meter import Meter, Time
from .runtime.teacher import Teacher, shell_teacher
from .source import Source, check_length
from .trial import Trial

# How often a step holds the weights, which only the libraries that it calls can say; seen on SmolLM2-135M and Gemma-3.
LOAD = {"transformers": 1.0, "gguf": 2.0}  # weights in float32 files are mapped, and read when capture looks at them
EXPORT = 5.0
GENERATE = 2.0
RUNTIME = 150_000_000  # bytes of a process that generates, before it has a model


@dataclass(frozen=True)
class Need:
    """peak: bytes of resident memory. files: bytes that stay on disk, scratch: those there for a while."""

    stage: str
    peak_bytes: int
    file_bytes: int = 0
    scratch_bytes: int = 0


@dataclass(frozen=True)
class Needs:
    """weight_bytes: of the teacher in float32, each weight once. value_bytes: the teacher's values at converted sites,
    part of the peaks of calibrate and align; what exceeds a fifth of the free memory goes to files instead.
    """

    teacher: str
    parameters: int
    weight_bytes: int
    value_bytes: int
    policy: str
    converted: int
    kept: int
    stages: list[Need]

    def text(self) -> str:
        """For a reader."""
        lines = [
            f"{self.teacher}: {self.parameters / 1e9:.3g} billion weights, {size_text(self.weight_bytes)} in float32.",
            f"{self.policy}: {self.converted} layers become Gated DeltaNet, {self.kept} stay softmax.\n",
            f"{'stage':10}{'peak memory':>14}{'files':>12}{'for a while':>14}",
        ]
        for s in self.stages:
            peak, files, scratch = map(size_text, (s.peak_bytes, s.file_bytes, s.scratch_bytes))
            lines.append(f"{s.stage:10}{peak:>14}{files:>12}{scratch:>14}")
        lines += [
            f"\nOf calibrate and align {size_text(self.value_bytes)} are the teacher's values, which go to files where "
            "they are more than a fifth of the free memory.",
            "distill is what it takes if it is asked for. No weight was read.",
        ]
        return "\n".join(lines)


class _Counted(Meter):
    """peak: bytes that are counted, on top of those that the process had before."""

    def __init__(self, allocations: Allocations, base: int) -> None:
        self._allocations, self._base = allocations, base

    def __enter__(self) -> _Counted:
        self._allocations.peak, self._start = self._allocations.live, Time.now()
        return self

    def __exit__(self, *error: object) -> None:
        self.time, self.peak = Time.now() - self._start, self._base + self._allocations.peak


def memory_needs(spec: str, *, config: Config | None = None) -> Needs:
    """What `convert` would need for a teacher of which only the configuration is there, on a CPU.

    Distillation is measured whether the configuration asks for it or not.

    Raises:
        TeacherError: neither a transformers folder nor a .gguf file, or one that no model can be made of.
        UnsupportedModelError: no attention core can be converted.
        ConfigError: a policy that does not fit the teacher.
    """
    config = config or Config()
    teacher = shell_teacher(spec)
    start = psutil.Process().memory_info().rss
    capture = capture_shell(teacher)
    source = Source(teacher, None, capture, find_attention(capture))
    check_length(config.calib.length, source, "calib.length")
    plan = _plan(source.scan, config)
    distill = config.distill if config.distill.active else config.distill.model_copy(update={"steps": 2})
    config = config.model_copy(update={"distill": distill})
    base = psutil.Process().memory_info().rss
    with without_values() as memory:
        weights = empty_like_(capture.gm)
        parameters = sum(p.numel() for p in capture.gm.parameters())
        ids = torch.zeros(config.calib.rows, config.calib.length, dtype=torch.long)
        trial = Trial(source, plan, ids, config, meter=lambda: _Counted(memory, base), timed=False)
        load = Need("load", start + (0 if _is_mapped(teacher) else round(LOAD[teacher.kind] * weights)))
        stages = [load, Need("capture", base + _capturing(source, memory))]
        for name in ("calibrate", "align", "distill"):
            cost = trial.stage(name)
            stages.append(Need(name, cost.peak, cost.files, cost.scratch))
            if name == "calibrate":
                values = trial.values_in_all
        student = trial.weights
    stages.append(Need("export", base + weights + round(EXPORT * student), 2 * student))
    stages.append(Need("generate", RUNTIME + round(GENERATE * student)))
    kept, converted = len(plan.keep), len(plan.convert)
    return Needs(teacher.source, parameters, weights, values, plan.policy, converted, kept, stages)


def _is_mapped(teacher: Teacher) -> bool:
    """Whether loading leaves the weights in their files: those of a folder that are in float32 already."""
    if teacher.kind != "transformers":
        return False
    config = json.loads((Path(teacher.source) / "config.json").read_text(encoding="utf-8"))
    return config.get("dtype", config.get("torch_dtype")) in (None, "float32")


def _plan(scan: SiteScan, config: Config) -> Plan:
    """For a policy that measures the sites: as many at even distances."""
    policy = config.policy or DEFAULT_POLICY
    return choose(scan, policy) if scored_by(policy) is None else stand_in(scan, policy)[0]


def _capturing(source: Source, memory: Allocations) -> int:
    """Of the comparisons of the captured graph with the model."""
    capture = source.capture
    with _Counted(memory, 0) as m, torch.no_grad():
        for shape in SHAPES:
            args = capture.inputs(torch.zeros(shape, dtype=torch.long))
            expected = capture.gm(*args)
            (capture.gm(*args) - expected).abs().max()
    return m.peak
