"""What Ray Train does to its workers before the training function runs.

Ray's own `TorchConfig` imports torch in the driver and in the controller, 2 s of a core each, to call
`init_process_group` in every worker. Here the backend only tells the workers where to meet; the workers, which need
torch anyway, join the process group themselves (`pipeline.training.distributed`). It also leaves out two helper actors
that serve features not used here (each is a process of its own): the manager of `datasets=`, because every worker
streams its own part (`pipeline.training.stream`), and, where Ray runs without its dashboard, the placement group
cleaner, which asks the dashboard whether the controller lives and otherwise only repeats that it cannot.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import ray
from ray.train import BackendConfig
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer


class _Rendezvous(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        address, port = worker_group.execute_single(0, get_address_and_port)
        worker_group.execute(_set_rendezvous, str(address), int(port))


def _set_rendezvous(address: str, port: int) -> None:
    os.environ["MASTER_ADDR"] = address
    os.environ["MASTER_PORT"] = str(port)


@dataclass
class RendezvousConfig(BackendConfig):
    """Tells every worker where rank 0 listens (`MASTER_ADDR`, `MASTER_PORT`)."""

    @property
    def backend_cls(self) -> type[Backend]:
        """The backend that this config is for."""
        return _Rendezvous


class Trainer(DataParallelTrainer):
    """Ray Train's trainer without the helper actors that nothing here uses."""

    def _create_default_callbacks(self) -> list[Any]:
        unused = {"DatasetsCallback"} if not self.datasets else set()
        if not _dashboard_runs():
            unused.add("PlacementGroupCleanerCallback")
        return [callback for callback in super()._create_default_callbacks() if type(callback).__name__ not in unused]


def _dashboard_runs() -> bool:
    from ray._private.worker import get_dashboard_url

    return ray.is_initialized() and bool(get_dashboard_url())
