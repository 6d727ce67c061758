"""Whether an operator's Triton kernels may run: on a GPU, where they have proved themselves against float64.

The proof is one small comparison of the caller's head dims and dtype, once per process, operator, device, dtype and
dims. Compilers for new cards have been wrong before (Triton 3.4 to 3.7.0 on Hopper), and a wrong result raises no error
by itself. Where the proof fails there is one warning, and the operator runs in plain PyTorch. A kernel that accesses
illegal memory ends the process's CUDA context instead, so that a proof cannot stand for runs of its tests on a GPU.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .launch import compiled_at_once

LARGEST_HEAD_DIM = 256
ALLOWED_TF32 = 5e-3  # of float32 whose products may take one tf32 product
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # rms error over rms, of any result

Check = Callable[..., dict[str, float]]  # (device, dtype, *dims) -> error of each result


def takes_tf32(x: Tensor) -> bool:
    """Whether products of x on CUDA may round their factors to TensorFloat32, as torch's own may then."""
    return x.is_cuda and x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def takes_triton(op: str, check: Check, x: Tensor, *dims: int, tf32: bool = False) -> bool:
    """Whether a call whose first tensor is x goes to Triton; dims are what the kernels are compiled for, as tf32 is."""
    if not x.is_cuda or x.dtype not in ALLOWED or max(dims) > LARGEST_HEAD_DIM or not x.numel():
        return False
    return proved(op, check, x.device.index, x.dtype, *dims, tf32=tf32)


@cache
def proved(op: str, check: Check, device: int, dtype: torch.dtype, *dims: int, tf32: bool = False) -> bool:
    """Whether Triton is installed and right for these; says once why not.

    Raises RuntimeError inside a CUDA graph capture, where nothing can be compared.
    """
    where = f"{op} runs in plain PyTorch on this GPU"
    if importlib.util.find_spec("triton") is None:
        warnings.warn(f"{where}: Triton is not installed", stacklevel=2)
        return False
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{op}: the first call for {dtype}, dims {dims} lies in a CUDA graph: call once before")
    try:
        with torch.cuda.device(device):
            errors = check(torch.device("cuda", device), dtype, *dims)
    except Exception as e:  # whatever a compiler can raise: the other path is right in any case
        warnings.warn(f"{where}: Triton failed with {e!r}", stacklevel=2)
        return False
    allowed = ALLOWED_TF32 if tf32 else ALLOWED[dtype]
    wrong = {name: error for name, error in errors.items() if not error <= allowed}
    if wrong:
        found = ", ".join(f"{name} {error:.1e}" for name, error in wrong.items())
        warnings.warn(
            f"{where}: Triton's results for {dtype}, dims {dims}, differ from float64 by more than "
            f"{allowed:.0e}: {found}",
            stacklevel=2,
        )
    return not wrong


@dataclass(frozen=True)
class Proof:
    """run() gives Triton's results, exact() those in float64; both in the order of names."""

    names: Sequence[str]
    run: Callable[[], Sequence[Tensor]]
    exact: Callable[[], Sequence[Tensor]]


def errors_of(device: torch.device, *proofs: Proof) -> dict[str, float]:
    """`relative_errors` of all proofs, whose kernels are compiled at once; what is exact is computed meanwhile."""
    with compiled_at_once(lambda: [proof.run() for proof in proofs], device):
        exact = [proof.exact() for proof in proofs]
    found: dict[str, float] = {}
    for proof, results in zip(proofs, exact, strict=True):
        found |= relative_errors(proof.names, proof.run(), results)
    return found


def relative_errors(names: Sequence[str], actual: Sequence[Tensor], exact: Sequence[Tensor]) -> dict[str, float]:
    """Error of each result over its size, both as root mean squares."""
    pairs = zip(names, actual, exact, strict=True)
    return {n: ((x.double() - y).norm() / y.norm().clamp_min(1e-30)).item() for n, x, y in pairs}


def exactly(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.double() for x in tensors)
