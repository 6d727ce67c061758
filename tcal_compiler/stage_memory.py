"""tcal inspect --memory: what each stage of a conversion holds in memory and leaves on disk, before a weight is read.

The teacher is captured as a shell without weights, and a piece of every stage runs on tensors without values, whose
bytes are counted (runtime/allocations.py). Of what other libraries do inside, only the weights are counted, as often as
they hold them, and a fixed size for the libraries themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from .config import DEFAULT_POLICY, Config
from .dry_run import size_text, stand_in
from .errors import ConfigError
from .passes.capture import SHAPES
from .passes.choose import choose, scored_by
from .passes.find_attention import find_attention
from .passes.json_text import read_json
from .passes.local_windows import with_local_windows
from .passes.make_stateful import check_tokens
from .passes.types import Plan, SiteScan
from .progress import Parts, Progress
from .runtime.capture_teacher import capture_shell
from .runtime.checkpoints import repeated_layers
from .runtime.distill_checks import check_group
from .runtime.meter import Meter, Time
from .runtime.parallel import Group, as_first_of
from .runtime.teacher import Teacher, configured_path, shell_teacher
from .source import Source, check_length
from .trial import Trial

if TYPE_CHECKING:  # loaded late: loading a teacher has not needed it yet, and its memory is counted before
    from .runtime.allocations import Allocations

# What only the libraries that a step calls can say; seen on SmolLM2-135M, Gemma-3 and the embedded teacher.
HEADER = 1500  # bytes that reading a GGUF header takes for every token of the vocabulary
DEQUANTIZED = 3  # how often a tensor of a GGUF file is held while it is turned into float32
EXPORT = 5.8  # how often a step holds the weights
GENERATE = 1.5
EXPORTER = 300_000_000  # bytes of torch.onnx, ONNX and ONNX Runtime, and of what the stages before loaded
PER_TOKEN = 6000  # bytes of a process that generates, for every token of the vocabulary: the tokenizer's most of all
HEAP = 1.8  # what a process holds of small blocks that it makes and frees, over what they have at most at once
LEAST_LAYERS = 4  # of the smaller model that is measured in place of one with many layers
# Parts of this work, with their shares of its time
SHAPE, STAGES, AGAIN = "its shape", "its stages", "its stages with twice the layers"
PARTS = {SHAPE: 1.0, STAGES: 3.0, AGAIN: 4.0}
RUNTIME = 420_000_000  # bytes of a process that generates, before it has a model


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
    part of the peaks of calibrate and align; what exceeds a fifth of the free memory goes to files instead. processes:
    of distillation, of which the first needs its peak.
    """

    teacher: str
    parameters: int
    weight_bytes: int
    value_bytes: int
    policy: str
    converted: int
    kept: int
    processes: int
    stages: list[Need]

    def text(self) -> str:
        """For a reader."""
        lines = [
            f"{self.teacher}: {self.parameters / 1e9:.3g} billion weights, {size_text(self.weight_bytes)} in float32.",
            f"{self.policy}: {self.converted} layers become Gated DeltaNet, {self.kept} stay softmax.\n",
            f"{'stage':10}{'peak memory':>14}{'files':>12}{'temporary':>14}",
        ]
        for s in self.stages:
            peak, files, scratch = map(size_text, (s.peak_bytes, s.file_bytes, s.scratch_bytes))
            lines.append(f"{s.stage:10}{peak:>14}{files:>12}{scratch:>14}")
        each = "" if self.processes == 1 else f", of the first of {self.processes} processes; the others need no more"
        lines += [
            f"\nOf calibrate and align {size_text(self.value_bytes)} are the teacher's values, which go to files where "
            "they are more than a fifth of the free memory.",
            f"distill is what it takes if it is asked for{each}. No weight was read.",
        ]
        return "\n".join(lines)


class _Counted(Meter):
    """peak: bytes that are counted, on top of those that the process had before.

    The small ones that do not stay count HEAP times.
    """

    def __init__(self, allocations: Allocations, base: int) -> None:
        self._allocations, self._base = allocations, base

    def __enter__(self) -> _Counted:
        self._allocations.all.begin()
        self._allocations.small.begin()
        self._start = Time.now()
        return self

    def __exit__(self, *error: object) -> None:
        most, small = self._allocations.all.peak, self._allocations.small
        self.time = Time.now() - self._start
        self.peak = self._base + most + round((HEAP - 1) * (small.peak - small.live))


def memory_needs(
    spec: str, *, config: Config | None = None, processes: int = 1, progress: Progress | None = None
) -> Needs:
    """What `convert` would need for a teacher of which only the configuration is there, on a CPU.

    processes: that share the steps of distillation.

    Distillation is measured whether the configuration asks for it or not. Where layers repeat, two models of fewer
    layers are measured, with as large a share of them kept, and every figure is read off the line through both.

    Raises:
        TeacherError: neither a transformers folder nor a .gguf file, or one that no model can be made of.
        UnsupportedModelError: no attention core can be converted.
        ConfigError: a policy that does not fit the teacher, or a distillation that so many processes cannot share.
    """
    config = config or Config()
    distill = config.distill if config.distill.active else config.distill.model_copy(update={"steps": 2})
    config = config.model_copy(update={"distill": distill})
    if distill.shard and processes == 1:
        raise ConfigError("distill.shard", "is true, and --processes 1", "--processes 2, or distill.shard = false")
    check_group(Group(0, processes), distill, distill.batch)
    parts = Parts(progress or Progress(quiet=True), f"memory for {spec}", PARTS)
    parts.begin(SHAPE)
    layers, period = repeated_layers(configured_path(spec))
    first = shell_teacher(spec, layers=min(layers, LEAST_LAYERS) or None)  # so that the libraries are loaded
    start = psutil.Process().memory_info().rss
    with as_first_of(processes, sharded=distill.shard) as group:
        found = _measured(spec, config, layers, period, parts, group)
    load = Need("load", start + loading_bytes(first, found.weight_bytes))
    return replace(found, stages=[load, *found.stages])


def _measured(spec: str, config: Config, layers: int, period: int, parts: Parts, group: Group) -> Needs:
    """Of every stage but load. layers: how many the teacher has; period: after how many their kinds repeat."""
    few = period * -(-LEAST_LAYERS // period)
    if 3 * few <= layers:
        shell = _Shell(spec, config, few)
        if len(shell.source.scan.sites) == few and not shell.source.scan.rejected:
            plan = _plan(_repeated(shell.source.scan, layers), config)
            unit = math.lcm(period, layers // math.gcd(layers, len(plan.keep)) if plan.keep else 1)
            few = unit * -(-LEAST_LAYERS // unit)
            if 3 * few <= layers:
                parts.begin(STAGES)
                less = _Shell(spec, config, few).needs(_share(plan, few, layers), group)
                parts.begin(AGAIN)
                more = _Shell(spec, config, 2 * few).needs(_share(plan, 2 * few, layers), group)
                return _extended(less, more, plan, layers / few - 1)
    parts.begin(STAGES)
    shell = _Shell(spec, config)
    return shell.needs(_plan(shell.source.scan, config), group)


class _Shell:
    """A captured teacher without weights, of so many layers."""

    def __init__(self, spec: str, config: Config, layers: int | None = None) -> None:
        self.config, self.teacher = config, shell_teacher(spec, layers=layers)
        capture = capture_shell(self.teacher)
        scan = with_local_windows(find_attention(capture), config.local_window)
        self.source = Source(self.teacher, None, capture, scan)
        check_length(config.calib.length, self.source, "calib.length")

    def needs(self, plan: Plan, group: Group) -> Needs:
        """Measured."""
        teacher, capture, calib = self.teacher, self.source.capture, self.config.calib
        from .runtime.allocations import empty_like_, without_values

        base = psutil.Process().memory_info().rss
        with without_values() as memory:
            weights = empty_like_(capture.gm)
            parameters = sum(p.numel() for p in capture.gm.parameters())
            ids = torch.zeros(calib.rows, calib.length, dtype=torch.long)
            meter = partial(_Counted, memory, base)
            trial = Trial(self.source, plan, ids, self.config, meter=meter, timed=False, group=group)
            stages = [Need("capture", base + _capturing(self.source, memory))]
            for name in ("calibrate", "align", "distill"):
                cost = trial.stage(name)
                stages.append(Need(name, cost.peak, cost.files, cost.scratch))
                if name == "calibrate":
                    values = trial.values_in_all
                    if scored_by(plan.policy):  # before it; with any number of models
                        score = trial.score(1)
                        stages.insert(1, Need("score", score.peak, score.files, score.scratch))
            student = trial.weights
        peak = base + EXPORTER + weights + round(EXPORT * student) + _compared_logits(self.source)
        stages.append(Need("export", peak, 2 * student))
        vocabulary = PER_TOKEN * capture.vocab_size
        stages.append(Need("generate", RUNTIME + vocabulary + round(GENERATE * student)))
        kept, converted = len(plan.keep), len(plan.convert)
        counts = plan.policy, converted, kept, group.size
        return Needs(teacher.source, parameters, weights, values, *counts, stages)


def _repeated(scan: SiteScan, layers: int) -> SiteScan:
    """The sites of so many layers, of which these are the first."""
    sites = (replace(scan.sites[i % len(scan.sites)], index=i) for i in range(layers))
    return SiteScan(tuple(sites), ())


def _share(plan: Plan, few: int, layers: int) -> Plan:
    """As large a share of fewer layers kept, at even distances."""
    kept = len(plan.keep) * few // layers
    keep = tuple(i * few // kept for i in range(kept)) if kept else ()
    return Plan(keep, tuple(i for i in range(few) if i not in keep), plan.policy)


def _extended(less: Needs, more: Needs, plan: Plan, times: float) -> Needs:
    """Every figure on the line through two models: less at 0, more at 1, the result at `times`."""

    def figure(a: int, b: int) -> int:
        return round(a + (b - a) * times)

    stages = [
        Need(
            a.stage,
            *(figure(getattr(a, n), getattr(b, n)) for n in ("peak_bytes", "file_bytes", "scratch_bytes")),
        )
        for a, b in zip(less.stages, more.stages, strict=True)
    ]
    sizes = {n: figure(getattr(less, n), getattr(more, n)) for n in ("parameters", "weight_bytes", "value_bytes")}
    kept, converted = len(plan.keep), len(plan.convert)
    counts = {"converted": converted, "kept": kept, "processes": less.processes}
    return Needs(less.teacher, **sizes, policy=plan.policy, **counts, stages=stages)


def loading_bytes(teacher: Teacher, weights: int) -> int:
    """Bytes that loading takes at most at once. teacher: with any number of layers; weights: bytes in float32 of all.

    Weights in float32 files are mapped, and read when capture looks at them. The tensors of a GGUF file become float32
    one after the other, the table of tokens first; of the file what was read stays in memory meanwhile.
    """
    assert teacher.module is not None
    if teacher.kind == "gguf":
        *_, second, largest = sorted(4 * p.numel() for p in teacher.module.parameters())
        file, header = Path(teacher.source).stat().st_size, HEADER * teacher.info["vocab_size"]
        return header + file + max(DEQUANTIZED * largest, weights + (DEQUANTIZED - 1) * second)
    stored = _stored(teacher)
    return 0 if stored == torch.float32 else weights + weights * stored.itemsize // 4


def _stored(teacher: Teacher) -> torch.dtype:
    """Of the weights in a transformers folder, as its configuration has it."""
    config = read_json((Path(teacher.source) / "config.json").read_bytes())
    name = config.get("dtype", config.get("torch_dtype")) or "float32"
    found = getattr(torch, str(name), None)
    return found if isinstance(found, torch.dtype) else torch.float32


def _plan(scan: SiteScan, config: Config) -> Plan:
    """For a policy that measures the sites: as many at even distances."""
    policy = config.policy or DEFAULT_POLICY
    return choose(scan, policy) if scored_by(policy) is None else stand_in(scan, policy)[0]


def _compared_logits(source: Source) -> int:
    """Of the check that chunks equal one pass: two tensors in float64."""
    longest = max((max(s.window or 0, s.local) for s in source.scan.sites), default=0)
    return 2 * 2 * check_tokens(longest) * source.capture.vocab_size * 8


def _capturing(source: Source, memory: Allocations) -> int:
    """Of the comparisons of the captured graph with the model."""
    capture = source.capture
    with _Counted(memory, 0) as m, torch.no_grad():
        for shape in SHAPES:
            args = capture.inputs(torch.zeros(shape, dtype=torch.long))
            expected = capture.gm(*args)
            (capture.gm(*args) - expected).abs().max()
    return m.peak
