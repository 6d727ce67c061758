"""Data-parallel processes of one job, as torchrun starts them: each takes a share of every step.

Sums over processes are those of one process but for the order of additions.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tcal_compiler.errors import ConfigError

T = TypeVar("T", bound=Tensor)
BUCKET = 64 * 2**20  # bytes after which tensors to be summed are sent


@dataclass(frozen=True)
class Group:
    """This process among `size`: it has number `rank`, and 0 is the one that writes."""

    rank: int = 0
    size: int = 1

    def part(self, index: Tensor) -> Tensor:
        """This process's share of index [N]: every size-th, so that shares differ by one at most."""
        return index[self.rank :: self.size]

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its sum over the processes: the same bits in all of them."""
        if self.size > 1:
            for bucket in _buckets(tensors):
                flat = torch.cat([t.reshape(-1) for t in bucket])
                dist.all_reduce(flat)
                for t, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                    t.copy_(part.view_as(t))

    def each(self, number: int, device: torch.device) -> list[int]:
        """The number that every process gives, up to 2**53. device: of the work that the group shares."""
        numbers = torch.zeros(self.size, dtype=torch.float64, device=device)
        numbers[self.rank] = number
        self.sum_([numbers])
        return [int(n) for n in numbers.tolist()]

    def gather(self, part: Tensor, rows: int) -> Tensor:
        """[rows, ...], of which process r has the ceil(rows / size) rows from r times as many on, as far as they go."""
        share = -(-rows // self.size)
        padded = part.new_zeros(share, *part.shape[1:])
        padded[: len(part)] = part
        out = part.new_empty(share * self.size, *part.shape[1:])
        dist.all_gather(list(out.split(share)), padded)
        return out[:rows].clone() if len(out) > rows else out

    def follow_(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by what process 0 has."""
        if self.size > 1:
            for t in tensors:
                dist.broadcast(t, 0)


def _buckets(tensors: Iterable[T]) -> Iterator[list[T]]:
    """Tensors of one dtype and device that are sent at once: one call for each of hundreds would take its time."""
    bucket: list[T] = []
    for t in tensors:
        size = sum(b.numel() * b.element_size() for b in bucket)
        if bucket and ((t.dtype, t.device) != (bucket[0].dtype, bucket[0].device) or size > BUCKET):
            yield bucket
            bucket = []
        bucket.append(t)
    if bucket:
        yield bucket


SOLO = Group()


class _Bucket:
    """Parameters whose gradients are summed over the processes by one call, and room for these in float32."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.missing = self.expected = 0
        ends = list(accumulate((p.numel() for p in parameters), initial=0))
        self._flat = torch.zeros(ends[-1], device=parameters[0].device)
        self.sums = [  # with the strides of the optimiser's state
            self._flat.as_strided(p.shape, torch.empty_like(p, device="meta").stride(), end)
            for p, end in zip(parameters, ends, strict=False)
        ]
        self._work: dist.Work | None = None

    @torch.no_grad()
    def send(self) -> None:
        """Moves the gradients here, 0 for none, and begins to sum them."""
        found = [(v, p.grad) for v, p in zip(self.sums, self.parameters, strict=True) if p.grad is not None]
        if len(found) < len(self.sums):
            self._flat.zero_()
        if found:
            torch._foreach_copy_([v for v, _ in found], [g for _, g in found])
        for p in self.parameters:
            p.grad = None
        self._work = dist.all_reduce(self._flat, async_op=True)

    def wait(self) -> None:
        assert self._work is not None
        self._work.wait()
        self._work, self.missing = None, self.expected


class Gradients:
    """Float32 gradients of parameters, summed over the processes while the backward pass goes on.

    They travel in buckets, from the last parameter to the first: one is sent when those before it were and all of its
    gradients are there.

    Args:
        late: parameters that more than one backward pass of a step reaches: they are sent when all is done.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], group: Group, *, late: Iterable[nn.Parameter]) -> None:
        self._parameters, self._group = dict(parameters), group
        self._hooks = list[torch.utils.hooks.RemovableHandle]()
        self._buckets, self._sent = list[_Bucket](), 0
        self._reached: dict[str, bool] | None = None  # known after a step; a graph reaches the same ones in each
        if group.size > 1:
            self._late = {id(p) for p in late}
            early = [p for p in reversed(self._parameters.values()) if id(p) not in self._late]
            rest = [p for p in self._parameters.values() if id(p) in self._late]
            self._buckets = [_Bucket(b) for some in (early, rest) for b in _buckets(some)]
            self._sums = {id(p): v for b in self._buckets for p, v in zip(b.parameters, b.sums, strict=True)}

    def take(self) -> dict[str, Tensor | None]:
        """Those of the backward passes since the last call, which are gone then; None where no process has one.

        All processes have to call it. The next call overwrites what this one gave.
        """
        if self._group.size == 1:
            found = {n: None if p.grad is None else p.grad.float() for n, p in self._parameters.items()}
            for p in self._parameters.values():
                p.grad = None
            return found
        if self._reached is None:
            self._reached = self._look()
        for bucket in self._buckets[self._sent :]:
            bucket.send()
        for bucket in self._buckets:
            bucket.wait()
        self._sent = 0
        return {n: self._sums[id(p)] if self._reached[n] else None for n, p in self._parameters.items()}

    def close(self) -> None:
        """Ends the watch over the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _look(self) -> dict[str, bool]:
        """Which parameters have a gradient in any process; from now on buckets wait for those."""
        here = [float(p.grad is not None) for p in self._parameters.values()]
        counts = torch.tensor(here, device=self._buckets[0].sums[0].device)
        self._group.sum_([counts])
        reached = {n: c > 0 for n, c in zip(self._parameters, counts.tolist(), strict=True)}
        awaited = {id(p) for n, p in self._parameters.items() if reached[n] and id(p) not in self._late}
        for number, bucket in enumerate(self._buckets):
            watched = [p for p in bucket.parameters if id(p) in awaited]
            bucket.expected = len(watched) or len(bucket.parameters)  # of others: until `take`
            for p in watched:
                self._hooks.append(p.register_post_accumulate_grad_hook(lambda _, n=number: self._arrived(n)))
        return reached

    def _arrived(self, number: int) -> None:
        self._buckets[number].missing -= 1
        while self._sent < len(self._buckets) and self._buckets[self._sent].missing == 0:
            self._buckets[self._sent].send()
            self._sent += 1


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def current() -> Group:
    """The group that this process has joined; itself alone where it has joined none."""
    if dist.is_available() and dist.is_initialized():
        return Group(dist.get_rank(), dist.get_world_size())
    return SOLO


@contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """The group of all processes that torchrun started, for work on device: NCCL on CUDA, else gloo.

    Raises ConfigError when torchrun did not say who this process is.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as e:
        raise ConfigError("torchrun", f"the processes cannot meet: {str(e).splitlines()[0]}") from e
    try:
        yield current()
    finally:
        dist.destroy_process_group()


@contextmanager
def as_first_of(size: int, *, sharded: bool) -> Iterator[Group]:
    """As `joined` with so many processes of which only the first is here: for tensors without values.

    What the others would send never comes, and nothing waits for it. sharded: what cuts weights is loaded too.
    """
    if size == 1:
        yield SOLO
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore  # makes the backend known

    if sharded:
        importlib.import_module("torch.distributed.fsdp")
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield current()
    finally:
        dist.destroy_process_group()


def barrier(group: Group) -> None:
    """Returns when every process of the group has come here."""
    if group.size > 1:
        dist.barrier()
