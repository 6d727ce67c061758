"""tcal-compile: turns a softmax-attention Transformer into a hybrid Gated DeltaNet student."""

from __future__ import annotations

from typing import Any

_PUBLIC = {
    "Config": "config",
    "TcalError": "errors",
    "convert": "api",
    "Measures": "evaluation",
    "evaluate_run": "evaluation",
    "verify_run": "runs",
    "generate_text": "runs",
    "register_backend": "backend",
    "StudentForCausalLM": "hf",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    """Public names, imported when first used: importing the package alone loads neither torch nor onnx."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
