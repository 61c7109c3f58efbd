"""Real Ray for the tests that need it: one small cluster per session, without a dashboard."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

OBJECT_STORE_BYTES = 200 * 2**20


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A cluster of two CPUs on this machine."""
    from pipeline.cluster import set_environment, start_local

    set_environment()
    import ray

    os.environ.pop("RAY_ADDRESS", None)
    # A failing test shows its captured logs; Ray Data's run to hundreds of lines.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    start_local(
        num_cpus=2,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level="warning",
    )
    yield
    ray.shutdown()
