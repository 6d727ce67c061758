"""What is installed here, what the machine has left, and whether operators and kernels compute right on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import Tensor

from .dry_run import size_text
from .kernels.attention_stats import attention_statistics, attention_statistics_reference
from .kernels.attention_stats import op as stats_op
from .kernels.delta_gates import op as gates_op
from .kernels.gated_delta_rule import dispatch as rule_op
from .kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_reference
from .kernels.gated_delta_step import gated_delta_step, gated_delta_step_reference
from .kernels.gated_delta_step import op as step_op
from .kernels.gated_rms_norm import gated_rms_norm, gated_rms_norm_reference
from .kernels.gated_rms_norm import op as norm_op
from .kernels.gates import op as l2_op
from .kernels.scores import Scores
from .kernels.self_check import ALLOWED, Check, relative_errors
from .progress import Progress, clock
from .runtime.onnx_probe import CASES, operator_errors

ALWAYS = ("torch", "transformers", "tokenizers", "onnx", "onnxscript", "onnxruntime")
OPTIONAL = {  # what each is for
    "gguf": "GGUF teachers",
    "matplotlib": "report.html",
    "pyarrow": "text from .parquet files",
    "zstandard": "text from .jsonl.zst files",
    "datasets": "text of datasets:NAME@SPLIT",
    "triton": "the kernels on a GPU",
    "onnxruntime-gpu": "ONNX Runtime on a GPU",
    "onnxruntime-genai": "examples/generate_genai.py",
}
FOR_GPU = ("triton", "onnxruntime-gpu")
HEAD_DIM, HEADS = 64, 9
OP_TOL = 1e-3  # of an error in float32; what is computed right is below a hundredth of it
TRITON: dict[str, tuple[Check, tuple[int, ...]]] = {
    "gated_delta_rule": (rule_op.self_check, (HEAD_DIM, HEAD_DIM)),
    "packed gated_delta_rule": (rule_op.packed_self_check, (HEAD_DIM, HEAD_DIM)),
    "gated_delta_step": (step_op.self_check, (HEAD_DIM, HEAD_DIM, True, True)),
    "gated_rms_norm": (norm_op.self_check, (HEAD_DIM,)),
    "l2_normalize": (l2_op.self_check, (HEAD_DIM,)),
    "delta_gates": (gates_op.self_check, (HEADS,)),
    "attention_statistics": (stats_op.self_check, (HEAD_DIM, HEAD_DIM)),
}

_WRONG = re.compile(r"WRONG: largest relative|FAILS with |^MISSING \(")  # see verdict, failure and onnx_verdict

Run = Callable[..., tuple[Tensor, ...]]
Case = tuple[dict[str, Tensor], Run, Run, tuple[str, ...]]  # float64 inputs, the op, its reference, names of results


def package(name: str) -> str:
    """Its version; where it is not installed, what would install it and what for."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if name in FOR_GPU and not torch.cuda.is_available():
            return f"not installed: for {OPTIONAL[name]}, which torch does not see"
        return f"not installed: pip install {name}" + (f", for {OPTIONAL[name]}" if name in OPTIONAL else "")


def _inputs() -> dict[str, Tensor]:
    """Of all operators in float64: B = 2, T = 100, H = 3; those of the step are the first tokens."""
    gen = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    shape = (2, 100, 3)
    q, k = (torch.nn.functional.normalize(draw(*shape, HEAD_DIM), dim=-1) for _ in range(2))
    found = {"q": q, "k": k, "v": draw(*shape, HEAD_DIM), "g": -draw(*shape).abs(), "beta": draw(*shape).sigmoid()}
    return found | {"state": draw(2, 3, HEAD_DIM, HEAD_DIM), "gate": draw(*shape, HEAD_DIM), "w": draw(3, HEAD_DIM)}


def _cases() -> dict[str, Case]:
    x, scale = _inputs(), HEAD_DIM**-0.5
    rule = {n: x[n] for n in ("q", "k", "v", "g", "beta", "state")}
    few = {n: t if n == "state" else t[:, :3] for n, t in rule.items()}
    heads = {n: x[n].transpose(1, 2) for n in "qkv"}
    norm = {"o": x["v"], "gate": x["gate"], "w": x["w"]}
    scores = Scores(scale)
    return {
        "gated_delta_rule": (
            rule,
            lambda q, k, v, g, beta, state: gated_delta_rule(q, k, v, g=g, beta=beta, initial_state=state),
            lambda *args: gated_delta_rule_reference(*args, scale=scale),
            ("output", "state"),
        ),
        "gated_delta_step": (
            few,
            lambda q, k, v, g, beta, state: gated_delta_step(q, k, v, g=g, beta=beta, state=state),
            lambda *args: gated_delta_step_reference(*args, scale=scale),
            ("output", "state"),
        ),
        "gated_rms_norm": (
            norm,
            lambda o, gate, w: (gated_rms_norm(o, gate, w),),
            lambda o, gate, w: (gated_rms_norm_reference(o, gate, w),),
            ("output",),
        ),
        "attention_statistics": (
            heads,
            lambda q, k, v: attention_statistics(q, k, v, scores=scores),
            lambda q, k, v: attention_statistics_reference(q, k, v, scale=scale, window=None),
            ("context", "distance", "entropy", "mass"),
        ),
    }


TRAINED = ("gated_delta_rule", "gated_rms_norm")  # those with a gradient


def op_errors(op: str, device: torch.device) -> dict[str, float]:
    """rms error over rms of what an operator gives in float32 there, gradients included, against float64."""
    inputs, run, reference, names = _cases()[op]
    grad = op in TRAINED
    exact = {n: t.clone().requires_grad_(grad) for n, t in inputs.items()}
    mine = {n: t.float().to(device).requires_grad_(grad) for n, t in inputs.items()}
    wanted, found = list(reference(*exact.values())), list(run(*mine.values()))
    if grad:
        gen = torch.Generator().manual_seed(1)
        weights = [torch.randn(t.shape, generator=gen, dtype=torch.float64) for t in wanted]
        torch.autograd.backward(wanted, weights)
        torch.autograd.backward(found, [w.to(device, t.dtype) for w, t in zip(weights, found, strict=True)])
        wanted += [t.grad for t in exact.values() if t.grad is not None]
        found += [t.grad for t in mine.values() if t.grad is not None]
        names = (*names, *(f"gradient of {n}" for n in inputs))
    return relative_errors(names, [t.detach().cpu() for t in found], [t.detach() for t in wanted])


def verdict(errors: dict[str, float], allowed: float) -> str:
    """Whether all errors are allowed, and the largest of them; NaN is not allowed."""
    worst = max(errors, key=lambda n: errors[n] if errors[n] == errors[n] else float("inf"))
    right = "right" if errors[worst] <= allowed else "WRONG"
    return f"{right}: largest relative error {errors[worst]:.1e} ({worst}) against float64"


def failure(e: Exception) -> str:
    """An error of a compiler, a driver or a library, in one line."""
    return f"FAILS with {type(e).__name__}: {' '.join(str(e).split())[:200]}"


def op_verdict(op: str, device: torch.device) -> str:
    """Of an operator there in float32; a GPU whose driver or memory fails is told of too."""
    try:
        return verdict(op_errors(op, device), OP_TOL)
    except Exception as e:  # once a kernel has accessed illegal memory, every call of that process's GPU raises
        return failure(e)


def triton_verdict(check: Check, device: torch.device, dims: tuple[int, ...]) -> str:
    """Of a kernel's own proof, in every dtype that it takes; where it fails, the operator runs in plain PyTorch."""
    said = []
    for dtype, allowed in ALLOWED.items():
        try:
            found = verdict(check(device, dtype, *dims), allowed)
        except Exception as e:  # whatever a compiler can raise
            found = failure(e)
        if not found.startswith("right"):
            found += "; it runs in plain PyTorch, try another version of triton"
        said.append(f"{str(dtype).removeprefix('torch.')} {found}")
    return "; ".join(said)


def onnx_verdict(op: str) -> str:
    try:
        return verdict(operator_errors(op), OP_TOL)
    except Exception as e:  # ONNX Runtime's own types share no base
        said = " ".join(str(e).split())[:120]
        return f"MISSING ({said}): onnxruntime 1.25 or newer has it"


def _machine() -> dict[str, str]:
    memory, place = psutil.virtual_memory(), Path.cwd()
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": f"{os.cpu_count()}, of which torch uses {torch.get_num_threads()}",
        "memory": f"{size_text(memory.available)} free of {size_text(memory.total)}",
        "disk": f"{size_text(psutil.disk_usage(str(place)).free)} free at {place}",
    }
    for i in range(torch.cuda.device_count()):
        try:
            free, total = torch.cuda.mem_get_info(i)
            found[f"GPU {i}"] = f"{torch.cuda.get_device_name(i)}, {size_text(free)} free of {size_text(total)}"
        except RuntimeError as e:  # a driver that is too old, a card that another process has to itself
            found[f"GPU {i}"] = failure(e)
    if not torch.cuda.device_count():
        found["GPU"] = "none that torch sees; a conversion takes the CPU then"
    return found


def conclusion(found: dict[str, str]) -> str:
    """One line on what examine found; what is optional and not installed is all right."""
    wrong = [n for n, v in found.items() if _WRONG.search(v) or (n in ALWAYS and v.startswith("not installed"))]
    return f"{len(wrong)} not right: {', '.join(wrong)}" if wrong else "all right"


def _checked(progress: Progress, work: str, checks: dict[str, Callable[[], str]]) -> dict[str, str]:
    """What each of the checks says, and meanwhile which of them is being made."""
    found: dict[str, str] = {}
    started = time.monotonic()

    def so_far() -> str:
        took, done = time.monotonic() - started, len(found)
        left = took / done * (len(checks) - done) if done else 0.0
        text = f"{''.join([*checks][done : done + 1])}, {done}/{len(checks)}, {clock(took)} so far"
        return f"{text}, about {clock(left)} left" if left >= 1 else text

    progress.begin(work, so_far)
    for row, check in checks.items():
        found[row] = check()
    return found


def examine(progress: Progress | None = None) -> dict[str, str]:
    """Machine, versions, ONNX Runtime's operators, and every operator of ours against float64."""
    import onnxruntime

    progress, cpu, cuda = progress or Progress(quiet=True), torch.device("cpu"), torch.device("cuda")
    found = _machine() | {name: package(name) for name in (*ALWAYS, *OPTIONAL)}
    found["onnxruntime runs on"] = ", ".join(
        p.removesuffix("ExecutionProvider") for p in onnxruntime.get_available_providers()
    )
    checks: dict[str, Callable[[], str]] = {f"{op} in onnxruntime": partial(onnx_verdict, op) for op in CASES}
    checks |= {f"{op} on cpu": partial(op_verdict, op, cpu) for op in _cases()}
    found |= _checked(progress, "operators against float64", checks)
    if torch.cuda.is_available():
        checks = {f"{op} on cuda": partial(op_verdict, op, cuda) for op in _cases()}
        checks |= {f"{op} in Triton": partial(triton_verdict, c, cuda, dims) for op, (c, dims) in TRITON.items()}
        found |= _checked(progress, "the GPU's kernels, each compiled first, against float64", checks)
    return found
