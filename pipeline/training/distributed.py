"""A worker's place among the workers: its device, its process group, and the few collectives that the loop needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Place:
    """Rank among `workers`, and the device that this worker computes on."""

    rank: int
    workers: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this worker writes what is written once."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the workers' tensors, in place."""
        if self.workers > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_first(self, value: Any) -> Any:
        """What rank 0 passed, on every rank."""
        if self.workers == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        """Wait for every worker."""
        if self.workers > 1:
            dist.barrier()


@contextmanager
def process_group(gpus_per_worker: float, threads: int) -> Iterator[Place]:
    """Join the workers' process group; leave it at the end. DeepSpeed wants one even for a single worker."""
    from ray import train

    context = train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    if gpus_per_worker:
        from ray.train.torch import get_device

        device = get_device()
        torch.cuda.set_device(device)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(workers),
        LOCAL_RANK=str(device.index if device.type == "cuda" else context.get_local_rank()),
        LOCAL_WORLD_SIZE=str(context.get_local_world_size()),
    )
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=workers, timeout=TIMEOUT)
    try:
        yield Place(rank, workers, device)
    finally:
        dist.destroy_process_group()
