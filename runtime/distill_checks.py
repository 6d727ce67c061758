"""What a distillation refuses before it begins."""

from __future__ import annotations

from tcal_compiler.errors import ConfigError
from tcal_compiler.passes.types import Plan

from .config import DistillConfig
from .parallel import Group


def check_train(config: DistillConfig, plan: Plan) -> None:
    """Raises ConfigError when the part to train is empty."""
    if config.active and config.train == "attention" and not plan.keep:
        what = f'is "attention", but the plan keeps no softmax site: {len(plan.convert)} are converted'
        raise ConfigError("distill.train", what, '"all" or "gdn", or a policy that keeps some')


def check_processes(group: Group, config: DistillConfig) -> None:
    """Raises ConfigError when the configuration is for another number of processes; needs no model and no text."""
    if not config.active:
        return
    if config.shard and group.size == 1:
        what = "is true, but one process is all there is to share the weights"
        hint = 'torchrun --nproc-per-node 2 "$(which tcal)" distill RUN, or distill.shard = false'
        raise ConfigError("distill.shard", what, hint)
    if config.hidden and group.size > 1:
        what = f"is {config.hidden:g}, but with {group.size} processes there is no such term"
        raise ConfigError("distill.hidden", what, "0, or one process")


def check_group(group: Group, config: DistillConfig, train: int) -> None:
    """Raises ConfigError when the steps cannot be shared by the processes."""
    check_processes(group, config)
    if group.size > 1 and min(config.batch, train) < group.size:
        what = f"a step of {min(config.batch, train)} sequences cannot be shared by {group.size} processes"
        raise ConfigError("distill.batch", what, "a larger distill.batch, or fewer processes")


def check_short(config: DistillConfig, length: int) -> None:
    """Raises ConfigError when sequences of so many tokens cannot be cut into pieces of distill.short_length."""
    short = config.short_length
    if not config.active or short is None or (short < length and length % short == 0):
        return
    fit = [n for n in range(8, length // 2 + 1) if length % n == 0]
    near = f"{min(fit, key=lambda n: abs(n - short))}, or " if fit else ""
    what = f"is {short}, which does not cut sequences of {length} tokens (calib.length) into equal pieces"
    raise ConfigError("distill.short_length", what, f"{near}a calib.length that is a multiple of it")
