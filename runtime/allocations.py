"""Memory that a piece of work would take, found by running it on tensors without values.

Every operation runs on PyTorch's fake tensors, which have shapes and no memory; a dispatch mode adds up the bytes of
the storages that are alive.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from tcal_compiler.kernels.attention_stats.streaming import (
    attention_output_sums_streaming,
    attention_statistics_streaming,
)
from tcal_compiler.kernels.gated_delta_rule.chunked import FORWARD_MATRICES, gated_delta_rule_chunked
from tcal_compiler.kernels.gated_delta_rule.chunked_backward import gated_delta_rule_chunked_backward, rows_at_once
from tcal_compiler.kernels.scores import Scores

aten = torch.ops.aten
HEAP_BLOCK = 32 << 20  # bytes; glibc gives a freed block of more back at once, and may keep a smaller one
HARMLESS = 1e-9  # the answer to a question about a value: finite, and within every tolerance but 0


@dataclass
class Bytes:
    """Of storages: those that are alive, and the most that were at once since `begin`."""

    live: int = 0
    peak: int = 0

    def begin(self) -> None:
        self.peak = self.live

    def add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)

    def free(self, size: int) -> None:
        self.live -= size


@dataclass
class _Held:
    """A storage that is alive, with the size that is counted for it."""

    ref: weakref.ref[Any]
    size: int = 0


class Allocations(TorchDispatchMode):
    """all: the storages that operations inside have made; small: those of at most HEAP_BLOCK."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.small = Bytes(), Bytes()
        self._answers = 0
        self._known: dict[int, _Held] = {}
        self._inside = _inside()
        self._workspace: dict[Any, tuple[int, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            dtype = args[0].dtype
            self._answers += 1  # every score is a little better than the one before, so that it is kept
            return True if dtype is torch.bool else HARMLESS - 1e-18 * self._answers if dtype.is_floating_point else 1
        if func is aten.equal.default:
            return args[0].shape == args[1].shape
        if func is aten.index.Tensor and len(args[1]) == 1 and args[1][0].dtype is torch.bool:
            out = args[0].new_empty(args[1][0].numel(), *args[0].shape[args[1][0].dim() :])  # as if all were chosen
        else:
            out = func(*args, **kwargs)
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor):
                self.add(t)
        if func in self._inside:
            for kind, size in zip((self.all, self.small), self._workspace_of(func, args), strict=True):
                kind.add(size)
                kind.free(size)
        return out

    def _workspace_of(self, func: Any, args: Any) -> tuple[int, int]:
        """Bytes that the op holds beside its results while it runs, all and small; found once for the same shapes."""
        narrow, run = self._inside[func]
        args = narrow(args)
        key = (func, *(tuple(a.shape) if isinstance(a, Tensor) else a for a in args))
        if key not in self._workspace:
            kinds = self.all, self.small
            before = [(k.live, k.peak) for k in kinds]
            for k in kinds:
                k.begin()
            with self:
                results = run(*args)
            sizes = [r.numel() * r.element_size() for r in results]
            made = sum(sizes), sum(n for n in sizes if n <= HEAP_BLOCK)
            both = [k.peak - live - own for k, (live, _), own in zip(kinds, before, made, strict=True)]
            self._workspace[key] = both[0], max(0, both[1])
            for k, (_, peak) in zip(kinds, before, strict=True):
                k.peak = peak
        return self._workspace[key]

    def add(self, tensor: Tensor) -> None:
        """Counts the tensor's storage until it is freed. One that wraps others has no memory of its own."""
        if not is_traceable_wrapper_subclass(tensor):
            self.count(tensor.untyped_storage())

    def count(self, storage: torch.UntypedStorage) -> None:
        """Counts a storage with its present size until it is freed or counted again."""
        key, held = storage._cdata, self._known.get(storage._cdata)
        if held is None or held.ref() is not storage:

            def freed(ref: Any) -> None:
                self._resize(mine, 0)
                if self._known.get(key) is mine:
                    del self._known[key]

            held = mine = self._known[key] = _Held(weakref.ref(storage, freed))
        self._resize(held, storage.nbytes())

    def _resize(self, held: _Held, size: int) -> None:
        for kind in (self.all, self.small):
            before, now = (n if kind is self.all or n <= HEAP_BLOCK else 0 for n in (held.size, size))
            kind.free(before)
            kind.add(now)
        held.size = size


def _inside() -> dict[Any, tuple[Callable[..., Any], Callable[..., tuple[Tensor, ...]]]]:
    """What our own ops, which a dispatch mode sees as one, run on a CPU; before it, what cuts their arguments.

    The delta rule goes through its rows in parts of a bounded size, and holds one while it makes the next: as much of
    the batch as makes two has the same workspace.
    """
    ops = torch.ops.tcal

    def two_parts(args: tuple[Any, ...], rows: int) -> tuple[Any, ...]:
        heads = args[-2].shape[1]  # of the initial state
        return *(a[: 2 * max(1, rows // heads)] for a in args[:-1]), args[-1]

    def forward_parts(args: tuple[Any, ...]) -> tuple[Any, ...]:
        return two_parts(args, FORWARD_MATRICES["cpu"])

    def backward_parts(args: tuple[Any, ...]) -> tuple[Any, ...]:
        return two_parts(args, rows_at_once(args[2], args[4]))  # q, v

    def forward(*args: Any) -> tuple[Tensor, ...]:
        return gated_delta_rule_chunked(*args[:-1], scale=args[-1])

    def backward(*args: Any) -> tuple[Tensor, ...]:
        return gated_delta_rule_chunked_backward(*args[:-1], scale=args[-1])

    def statistics(*args: Any) -> tuple[Tensor, ...]:
        return attention_statistics_streaming(*args[:3], scores=Scores(*args[3:]))

    def output_sums(*args: Any) -> tuple[Tensor, ...]:
        return attention_output_sums_streaming(*args[:4], scores=Scores(*args[4:]))

    def whole(args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args

    return {
        ops.gated_delta_rule.default: (forward_parts, forward),
        ops.gated_delta_rule_backward.default: (backward_parts, backward),
        ops.attention_statistics.default: (whole, statistics),
        ops.attention_output_sums.default: (whole, output_sums),
    }


class _CpuAttention(TorchFunctionMode):
    """The fused kernel that a CPU takes: fake tensors would be given the one that makes whole score matrices."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.scaled_dot_product_attention.default, torch.nn.functional.scaled_dot_product_attention):
            return cpu_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def cpu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention as PyTorch runs it on a CPU: no head is repeated, a mask of bool becomes floats."""
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.zeros(attn_mask.shape, dtype=q.dtype).masked_fill(attn_mask.logical_not(), -torch.inf)
    if q.shape[-1] != v.shape[-1]:
        scores = (q @ k.transpose(-1, -2)).softmax(-1)
        return scores @ v
    kernel = aten._scaled_dot_product_flash_attention_for_cpu.default
    return kernel(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


@contextlib.contextmanager
def _counted_resizes(allocations: Allocations) -> Iterator[None]:
    """A storage that is resized, as FSDP2 does with weights that are put together, passes no dispatch mode."""
    resize = torch.UntypedStorage.resize_

    def resized(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        resize(storage, size)
        allocations.count(storage)
        return storage

    with mock.patch.object(torch.UntypedStorage, "resize_", resized):
        yield


@contextlib.contextmanager
def without_values() -> Iterator[Allocations]:
    """Operations inside run on fake tensors and are counted."""
    allocations = Allocations()
    with _counted_resizes(allocations), FakeTensorMode(allow_non_fake_inputs=True), allocations, _CpuAttention():
        yield allocations


def empty_like_(module: nn.Module) -> int:
    """Replaces every parameter and buffer by one without values, in place; call it inside `without_values`.

    Returns their bytes. Tensors that were one stay one.
    """
    seen: dict[int, Tensor] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, t in list(table.items()):
                if t is None or isinstance(t, FakeTensor):
                    continue
                if id(t) not in seen:
                    made = torch.empty(t.shape, dtype=t.dtype)
                    is_parameter = isinstance(t, nn.Parameter)
                    seen[id(t)] = nn.Parameter(made, requires_grad=False) if is_parameter else made
                table[name] = seen[id(t)]  # type: ignore[assignment]
    return sum(t.numel() * t.element_size() for t in seen.values())
