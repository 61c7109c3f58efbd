"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

# One thread per process: tests run in two processes, and threads that share a core only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from pipeline.training.distributed import Place


@pytest.fixture(scope="session")
def one_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """This process as the only training worker. One for all tests: DeepSpeed remembers its first process group."""
    import torch

    from pipeline.training.distributed import Place, joined

    place = Place(rank=0, workers=1, device=torch.device("cpu"))
    with joined(place, threads=1, meeting_point=f"file://{tmp_path_factory.mktemp('group') / 'meeting-point'}"):
        yield place
