"""A teacher that is loaded, captured and scanned, and what may be asked of it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

import torch

from .config import DEFAULT_POLICY, Config
from .errors import ConfigError, UnsupportedModelError
from .passes.choose import budget_of, choose, plan_from_toml, scored_by
from .passes.find_attention import find_attention
from .passes.local_windows import with_local_windows
from .passes.types import Capture, Plan, SiteScan
from .progress import Parts, Progress
from .runtime.capture_teacher import capture_teacher
from .runtime.step_seconds import policy_seconds
from .runtime.teacher import Teacher, load_teacher, load_tokenizer
from .runtime.tokenizer import TokenizerLike

# Shares of loading, from the embedded teacher and SmolLM2-135M as a .gguf file
WEIGHTS, TOKENIZER, GRAPH = "weights", "tokenizer", "the graph, compared with the model"
LOADING = {WEIGHTS: 9.0, TOKENIZER: 1.0, GRAPH: 9.0}


@dataclass(frozen=True)
class Source:
    """A loaded and captured teacher with its tokenizer. capture_seconds: what export and comparison took."""

    teacher: Teacher
    tokenizer: TokenizerLike | None
    capture: Capture
    scan: SiteScan
    capture_seconds: float = math.nan

    def with_local_window(self, tokens: int) -> Source:
        """The same; converted sites have softmax attention over so many tokens beside their state."""
        return replace(self, scan=with_local_windows(self.scan, tokens))


def open_source(
    spec: str,
    *,
    tokenizer: str | None = None,
    allow_pickle: bool = False,
    need_tokenizer: bool = True,
    progress: Progress | None = None,
) -> Source:
    """Loads, captures and scans a teacher. Raises TcalError for whatever is wrong with it."""
    shares = {n: share for n, share in LOADING.items() if need_tokenizer or n != TOKENIZER}
    parts = Parts(progress or Progress(quiet=True), f"loading {spec}", shares)
    parts.begin(WEIGHTS)
    teacher = load_teacher(spec, tokenizer=tokenizer, allow_pickle=allow_pickle, progress=parts.update)
    found = None
    if need_tokenizer:
        parts.begin(TOKENIZER)
        found = load_tokenizer(teacher)
    parts.begin(GRAPH)
    begun = monotonic()
    capture = capture_teacher(teacher)
    scan = find_attention(capture)
    return Source(teacher, found, capture, scan, monotonic() - begun)


def check_device(name: str) -> torch.device:
    """Raises ConfigError for a device that is unknown or not here."""
    count = torch.cuda.device_count()
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError("--device", f"unknown device {name!r}", "cpu or cuda")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(
            "--device", f"{name} is not here: {count} CUDA devices are seen", "cpu; tcal doctor says more"
        )
    return device


def check_length(length: int, source: Source, where: str) -> None:
    """Raises ConfigError when sequences are longer than the teacher's context, where that is known."""
    context = source.teacher.info.get("context_length")
    if context is not None and length > context:
        option = {"calib.length": f"--calib-length {context}"}.get(where, f"{where} {context}")
        raise ConfigError(where, f"is {length} tokens, but the teacher's context holds {context}", option)


def choose_plan(scan: SiteScan, config: Config, out: Path, plan_file: Path | None) -> Plan | None:
    """The plan of an explicit file, of the run's edited plan.toml, or of the policy, in this order.

    The run's own plan.toml counts unless another policy than the one it was made from is asked for. None when the
    policy is a good one that needs the sites measured first.
    """
    if not scan.sites:
        reasons = "; ".join(f"{r.layer or r.node}: {r.reason}" for r in scan.rejected[:4])
        what = f"no attention core can be converted ({reasons or 'the model has no softmax attention'})"
        raise UnsupportedModelError("teacher", what, "tcal inspect TEACHER shows every core with its reason")
    own = out / "plan.toml"
    if plan_file is not None:
        return plan_from_toml(plan_file, scan)
    if own.is_file() and (out / "tcal.json").is_file():
        plan = plan_from_toml(own, scan)
        if config.policy in (None, plan.policy):
            return plan
    policy = DEFAULT_POLICY if config.policy is None else config.policy
    if scored_by(policy) is None:
        return choose(scan, policy, seconds=policy_seconds(scan, policy))
    budget_of(scan, policy)
    return None
