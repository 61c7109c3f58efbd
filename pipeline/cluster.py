"""The Ray connection: a cluster of its own on this machine, or one that is there.

On a laptop Ray is started for this run and ends with it: no dashboard, no usage report, a small object store, loggers
kept out of the terminal. With an address (`auto`, `ray://...` or the address that a submitted job finds in
`RAY_ADDRESS`) the cluster is taken as it is. Half a CPU per training worker leaves room for Ray Data beside it, so that
two cells can run on two cores without waiting for each other for ever.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from overfill.errors import UserError
from pipeline.config import ExperimentConfig, StageResources
from pipeline.interruption import deaf_to_hangup, heard, leave_closed_terminal
from pipeline.machine import usable_cpus
from pipeline.masking import mask_uri
from pipeline.submission.fitting import NodeShape, check_cluster, check_stage, totals, worker_bundle

OBJECT_STORE_BYTES = 512 * 2**20
"""Ray's shared memory on a laptop: token blocks are small, and models travel through files."""

ANSWER_S = 15.0
"""How long a cluster may take to say that it is there."""
SYSTEM = {"idle_worker_killing_time_threshold_ms": 30_000}
"""Of a cluster of our own: a process that has imported torch serves a stage of the next half minute too. Ray's second is
shorter than the time between two stages of a cell."""

QUIET_LOGGERS = (
    "ray._private.authentication.authentication_token_setup",  # that a cluster of our own uses a token
    "ray.tune",  # that there are no result files, which we switch off
)

_VERSIONS = re.compile(r"^ +(?:Ray|Python): (\S+)$", re.MULTILINE)
"""In what Ray says of versions that do not match: its own and Python's of the cluster, then those of this process."""

TRACEBACKS = "ray.tune.execution.tune_controller"
"""What it logs as an error is the traceback of a trial whose process died; the trial is tried again, and where that does
not help, its cell says so (`pipeline.tune.LOST_TRIAL`)."""

UNLIMITED_NODES = 10_000
"""As many as count where an autoscaler has no limit."""

# Settings of Ray that are read from the environment, here and in every process that Ray starts.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours: step checkpoints are there, and the next run goes on
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # CSV, JSON and TensorBoard copies of what the store has
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


@dataclass(frozen=True)
class Capacity:
    """What a cluster has in all."""

    cpus: float
    gpus: float


def set_environment() -> None:
    """Settings that must be in place before Ray is imported; what the user has set stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Capacity]:
    """Be connected to Ray; a cluster that was started for this is stopped at the end.

    Raises UserError when there is no cluster at `address`."""
    set_environment()
    import ray

    logging.getLogger("ray").setLevel(logging.WARNING)
    for noisy in QUIET_LOGGERS:
        logging.getLogger(noisy).setLevel(logging.ERROR)
    logging.getLogger(TRACEBACKS).setLevel(logging.CRITICAL)
    _start(address or os.environ.get("RAY_ADDRESS") or "local")
    if threading.current_thread() is threading.main_thread():
        for number in set(heard()) - {signal.SIGINT}:
            signal.signal(number, _interrupt)  # after Ray's own, which prints a stack of C++ frames
    try:
        yield capacity()
    finally:
        ray.shutdown()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """A request to end is a Ctrl-C: everything is left as it stands, and the next run goes on from there."""
    if number == signal.SIGHUP:
        leave_closed_terminal()
        signal.signal(number, signal.SIG_IGN)  # a closed terminal says it twice
    raise KeyboardInterrupt


def _start(address: str) -> None:
    import ray
    from ray.exceptions import AuthenticationError

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING, "ignore_reinit_error": True}
    try:
        if address == "local":
            start_local(num_cpus=usable_cpus(), object_store_memory=OBJECT_STORE_BYTES, **options)
        else:
            _knock(address)
            ray.init(address=address, **options)
    except AuthenticationError as error:
        raise UserError(
            f"--address {mask_uri(address)}: the cluster does not accept this token, or asks for one; set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or put its token into ~/.ray/auth_token"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        if len(versions := _VERSIONS.findall(str(error))) == 4:
            ray_there, python_there, ray_here, python_here = versions
            raise UserError(
                f"--address {mask_uri(address)}: the cluster runs Ray {ray_there} and Python {python_there}, this process "
                f"Ray {ray_here} and Python {python_here}; run it with the cluster's"
            ) from error
        reason = str(error).splitlines()[0][:160]
        raise UserError(
            f"--address {mask_uri(address)}: no Ray cluster there ({reason}); leave it out to run on this machine"
        ) from error


def _knock(address: str) -> None:
    """Ask the cluster for no more than its id: Ray itself logs a line a second before it says that nobody answers, or that
    the token is not the cluster's.

    Raises AuthenticationError and ConnectionError, as Ray does."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.services import canonicalize_bootstrap_address
    from ray.core.generated.gcs_service_pb2 import GetClusterIdRequest
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
    from ray.exceptions import AuthenticationError

    head = None if "://" in address else canonicalize_bootstrap_address(address)
    if head is None:
        return
    with init_grpc_channel(head) as channel:
        try:
            NodeInfoGcsServiceStub(channel).GetClusterId(GetClusterIdRequest(), timeout=ANSWER_S, wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise AuthenticationError("the token is missing or wrong") from error
            raise ConnectionError(f"no answer within {ANSWER_S:g} s") from error


def start_local(attempts: int = 3, **options: Any) -> None:
    """Start a cluster of our own. Ray gives a node 30 s to come up, which a busy machine may need: then it is tried anew.

    Raises UserError when it does not come up at all."""
    import ray

    for attempt in range(1, attempts + 1):
        try:
            with deaf_to_hangup():
                ray.init(address="local", include_dashboard=False, _system_config=SYSTEM, **options)
            return
        except Exception as error:  # Ray raises a bare Exception here
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            if attempt == attempts:
                raise UserError("Ray does not come up on this machine: it is too busy; try again later") from error


def capacity() -> Capacity:
    """CPUs and GPUs of the connected cluster, with the nodes that an autoscaler may add."""
    now, later = node_shapes()
    most = [totals(now), totals(later)]
    return Capacity(
        cpus=max(nodes.get("CPU", 0.0) for nodes in most),
        gpus=max(nodes.get("GPU", 0.0) for nodes in most),
    )


def largest_node(resources: StageResources) -> float:
    """CPUs of the largest node that can hold a worker of a stage."""
    now, later = node_shapes()
    able = [node for node in [*now, *later] if node.holds(worker_bundle(resources))]
    return max((node.resources["CPU"] for node in able), default=0.0)


def node_shapes() -> tuple[list[NodeShape], list[NodeShape]]:
    """The nodes of the connected cluster, and those it may grow to where an autoscaler says so (none otherwise)."""
    import ray
    from ray._private.state import state

    now = [NodeShape(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    config = state.get_cluster_config()
    later = []
    for group in config.node_group_configs if config is not None else ():
        count = group.max_count if group.max_count >= 0 else UNLIMITED_NODES
        later.append(NodeShape({kind: float(amount) for kind, amount in group.resources.items()}, count))
    return now, later


def usage() -> dict[str, tuple[float, float]]:
    """CPU and GPU -> (reserved, there) of the connected cluster; kinds that it does not have are left out."""
    import ray

    there, free = ray.cluster_resources(), ray.available_resources()
    return {kind: (there[kind] - free.get(kind, 0.0), there[kind]) for kind in ("CPU", "GPU") if there.get(kind)}


def remove_abandoned_groups() -> int:
    """Give back what was reserved for the workers of trials that were killed; the number of such placement groups.

    Ray removes a group when the actor that made it *and* its job are gone. Until the driver ended, a killed trial's
    workers would keep their CPUs, and a stage that wants a whole node would wait for ever."""
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # pyright: ignore[reportAttributeAccessIssue]
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    table = state._connect_and_get_accessor().get_placement_group_table()
    job = ray.get_runtime_context().get_job_id()
    count = 0
    for group in map(PlacementGroupTableData.FromString, table):
        # Those that the driver itself has made, for its trials, have no actor at all, which counts as a dead one.
        actor = ray.ActorID(group.creator_actor_id)
        removed = group.state == PlacementGroupTableData.PlacementGroupState.REMOVED
        if group.creator_job_id.hex() == job and not actor.is_nil() and group.creator_actor_dead and not removed:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
            count += 1
    return count


def concurrent_cells(config: ExperimentConfig, has: Capacity, cells: int) -> int:
    """How many cells run at once: as many as the widest stage allows, at least one.

    A CPU is counted per CPU thread, though a worker reserves less of it: threads that share a core gain nothing."""
    if config.resources.max_concurrent is not None:
        return min(config.resources.max_concurrent, cells)
    # A teacher is made once, while other cells wait.
    stages = [config.resources.distill, config.resources.evaluate]
    stages += [config.resources.tasks] if config.evaluate.tasks else []
    return max(1, min(cells, *(_fits(stage, has) for stage in stages)))


def _fits(stage: StageResources, has: Capacity) -> int:
    by_cpu = has.cpus // (stage.workers * max(stage.cpus_per_worker, stage.threads if not stage.gpus_per_worker else 0))
    by_gpu = has.gpus // (stage.workers * stage.gpus_per_worker) if stage.gpus_per_worker else by_cpu
    return int(min(by_cpu, by_gpu))


def check_fits(config: ExperimentConfig) -> None:
    """Raises UserError for a stage whose workers the connected cluster can never hold."""
    check_cluster(config.resources, *node_shapes(), memory={})


def check_holds(stage: str, resources: StageResources) -> None:
    """Raises UserError when the connected cluster can never hold the workers of a stage."""
    check_stage(stage, resources, *node_shapes())
