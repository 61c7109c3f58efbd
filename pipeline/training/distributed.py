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

    def code_from_first(self, code: int) -> int:
        """As `from_first` for a number below 256, at the cost of one small broadcast: cheap enough for every step."""
        if self.workers == 1:
            return code
        box = torch.tensor([code], dtype=torch.uint8, device=self.device)
        dist.broadcast(box, src=0)
        return int(box.item())

    def every(self, value: bool) -> bool:
        """Whether every worker has passed True."""
        return int(self.sum(torch.tensor([not value], dtype=torch.int32, device=self.device)).item()) == 0

    def barrier(self) -> None:
        """Wait for every worker."""
        if self.workers > 1:
            dist.barrier()


@contextmanager
def process_group(gpus_per_worker: float, threads: int) -> Iterator[Place]:
    """Join the process group of this Ray Train run; leave it at a good end."""
    from ray import train

    context = train.get_context()
    device, local_rank = torch.device("cpu"), context.get_local_rank()
    if gpus_per_worker:
        from ray.train.torch import get_device

        device = get_device()
        torch.cuda.set_device(device)
        local_rank = device.index
    place = Place(context.get_world_rank(), context.get_world_size(), device)
    with joined(place, threads, local_rank, context.get_local_world_size()):
        yield place


@contextmanager
def joined(
    place: Place, threads: int, local_rank: int = 0, local_workers: int = 1, meeting_point: str = "env://"
) -> Iterator[None]:
    """Be in a process group, which DeepSpeed wants even for one worker; it reads its place from the environment.

    An error does not leave it: peers would lose their connections at once, and Ray Train, which decides by the errors of
    its first look, could see theirs and not the cause. It ends every worker's process anyway."""
    torch.set_num_threads(threads)
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.workers),
        LOCAL_RANK=str(local_rank),
        LOCAL_WORLD_SIZE=str(local_workers),
        LOCAL_SIZE=str(local_workers),  # without it DeepSpeed runs `numactl` at every reduction on a CPU
    )
    dist.init_process_group(
        "nccl" if place.device.type == "cuda" else "gloo",
        init_method=meeting_point,
        rank=place.rank,
        world_size=place.workers,
        timeout=TIMEOUT,
    )
    yield
    dist.destroy_process_group()
