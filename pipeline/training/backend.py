"""Ray Train, started with less.

A run of Ray Train begins with a controller process, helper actors and the workers; each is a Python that imports Ray
and pandas for 2 s of a core, and `TorchConfig` adds torch to all of them to call `init_process_group`. On a laptop that
is most of a short stage. Here

- the controller runs in the process that calls `fit`, if that is an actor (a Tune trial is one);
- the backend only tells the workers where to meet: they need torch anyway and join the process group themselves;
- two helper actors are left out: the manager of `datasets=`, because every worker streams its own part
  (`pipeline.training.stream`), and, where Ray runs without a dashboard, the placement group cleaner, which asks the
  dashboard whether the controller lives and otherwise only repeats that it cannot.

Measured on two cores, from `fit` to the training function, second run of a cluster: 12.3 s as Ray Train comes, 5.2 s
with its controller as an actor.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import Any

import ray
from ray.train import BackendConfig, Result
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailurePolicy
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
    """Ray Train's trainer with a failure policy of ours, and without the processes that nothing here uses."""

    def __init__(self, failure_policy: FailurePolicy, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._failure_policy = failure_policy

    def _initialize_and_run_controller(self, **arguments: Any) -> Result:
        arguments["failure_policy"] = self._failure_policy
        if ray.get_runtime_context().get_actor_id() is None:
            return super()._initialize_and_run_controller(**arguments)  # workers want an actor as their controller
        controller = TrainController(**arguments)
        asyncio.run(controller.run())
        return controller.get_result()

    def _create_default_callbacks(self) -> list[Any]:
        unused = {"DatasetsCallback"} if not self.datasets else set()
        if not dashboard_runs():
            unused.add("PlacementGroupCleanerCallback")
        return [callback for callback in super()._create_default_callbacks() if type(callback).__name__ not in unused]


def dashboard_runs() -> bool:
    """Whether the connected Ray has a dashboard, as clusters do and a Ray of our own on one machine does not."""
    # `get_dashboard_url` names an address in actors even where the dashboard was left out.
    from ray._private.services import get_webui_url_from_internal_kv

    return bool(get_webui_url_from_internal_kv())
