"""Data-parallel processes of one job, as torchrun starts them: each holds all weights and takes a share of every step.

Sums over processes are those of one process but for the order of additions.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tcal_compiler.errors import ConfigError

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

    def follow_(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by what process 0 has."""
        if self.size > 1:
            for t in tensors:
                dist.broadcast(t, 0)


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device that are sent at once: one call for each of hundreds would take its time."""
    bucket: list[Tensor] = []
    for t in tensors:
        size = sum(b.numel() * b.element_size() for b in bucket)
        if bucket and ((t.dtype, t.device) != (bucket[0].dtype, bucket[0].device) or size > BUCKET):
            yield bucket
            bucket = []
        bucket.append(t)
    if bucket:
        yield bucket


SOLO = Group()


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


def barrier(group: Group) -> None:
    """Returns when every process of the group has come here."""
    if group.size > 1:
        dist.barrier()
