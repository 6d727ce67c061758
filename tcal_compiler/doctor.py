"""What is installed here, and whether the op computes right on this machine."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from .kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_reference

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxscript",
    "gguf",
    "tokenizers",
)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _grad(x: torch.Tensor) -> torch.Tensor:
    assert x.grad is not None
    return x.grad


def kernel_errors(device: torch.device) -> dict[str, float]:
    """Relative errors (root mean square) of outputs and gradients of gated_delta_rule in float32 against float64."""
    gen = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    batch, tokens, heads, dim = 2, 100, 3, 64
    q, k = (torch.nn.functional.normalize(draw(batch, tokens, heads, dim), dim=-1) for _ in range(2))
    args = [
        q,
        k,
        draw(batch, tokens, heads, dim),
        -draw(batch, tokens, heads).abs(),
        draw(batch, tokens, heads).sigmoid(),
    ]
    args.append(draw(batch, heads, dim, dim))
    weight = draw(batch, tokens, heads, dim)
    exact = [a.clone().requires_grad_() for a in args]
    out, state = gated_delta_rule_reference(*exact, scale=dim**-0.5)
    ((out * weight).sum() + state.sum()).backward()
    mine = [a.float().to(device).requires_grad_() for a in args]
    o2, s2 = gated_delta_rule(*mine[:3], g=mine[3], beta=mine[4], initial_state=mine[5])
    ((o2 * weight.float().to(device)).sum() + s2.sum()).backward()
    pairs = {"output": (o2, out), "state": (s2, state)}
    pairs |= {
        f"d{n}": (_grad(m), _grad(e))
        for n, m, e in zip(("q", "k", "v", "g", "beta", "state"), mine, exact, strict=True)
    }
    return {n: ((a.double().cpu() - b).norm() / b.norm()).item() for n, (a, b) in pairs.items()}


def examine() -> dict[str, Any]:
    """Versions, devices and kernel errors, as plain JSON values."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    found |= {name: _version(name) for name in _PACKAGES}
    found["cuda device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for name in devices:
        errors = kernel_errors(torch.device(name))
        verdict = "right" if max(errors.values()) < 1e-3 else "WRONG"
        worst = max(errors, key=lambda n: errors[n])
        found[f"gated_delta_rule on {name}"] = (
            f"{verdict}: largest relative error {errors[worst]:.1e} ({worst}) against float64"
        )
    return found
