"""Whether a cluster can ever hold the workers of a stage, from the shapes of its nodes. Pure; no ray.

Ray does not say so itself: a placement group that can never be met waits for ever. A worker must find its CPUs, GPUs
and memory on one node, so counts are of nodes and not of totals alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from overfill.errors import UserError
from pipeline.config import ResourcesConfig, StageResources

CPUS_PER_TASK = 0.05
"""What a task that reads data reserves beside the workers that it feeds."""
ACCELERATOR = "accelerator_type:"
"""Prefix of the resource by which Ray says what GPUs a node has."""
_SLIVER = 0.001
"""Of such a resource, which a node has once however many work on it."""
HEAD = "head"
ANYWHERE = "anywhere"
_HEAD_NODE = "node:__internal_head__"
"""The resource that Ray gives to the head node alone."""
DRIVER_BYTES = 256 * 2**20
"""What a driver reserves where no resource names its node: of memory, for a sliver of a CPU would keep a worker out that
needs whole ones."""
GPU_MEMORY_GIB = {
    "T4": 16, "P100": 16, "V100": 32, "A10G": 24, "L4": 24, "L40S": 48, "A100": 80, "H20": 141, "H100": 94,
    "H200": 141, "B200": 192, "GB200": 192, "B300": 288, "GB300": 288, "RTX-PRO-6000": 96,
}  # fmt: skip
"""Ray's name of a GPU -> its memory; the most that is sold where a name covers several."""
_TINY = 1e-9


@dataclass(frozen=True)
class NodeShape:
    """Nodes that are alike."""

    resources: Mapping[str, float]
    """Ray's names: CPU, GPU, memory and object_store_memory in bytes, `accelerator_type:L4`."""
    count: int = 1

    @property
    def gpu_memory(self) -> float | None:
        """Bytes of one GPU; None when the node has none or its type is not known."""
        names = [name.removeprefix(ACCELERATOR) for name in self.resources if name.startswith(ACCELERATOR)]
        known = [GPU_MEMORY_GIB[name] for name in names if name in GPU_MEMORY_GIB]
        return max(known) * 2**30 if known and self.resources.get("GPU") else None

    @property
    def memory(self) -> float | None:
        """Bytes of main memory, from the two parts that Ray makes of it; None when the file of a cluster has none."""
        return self.resources["memory"] + self.resources.get("object_store_memory", 0) if self._has_memory else None

    @property
    def _has_memory(self) -> bool:
        return "memory" in self.resources

    def holds(self, bundle: Mapping[str, float]) -> int:
        """How many workers of that bundle one node holds when it is idle."""
        return int(min(self.resources.get(kind, 0.0) / each + _TINY for kind, each in bundle.items() if each > 0))


def worker_bundle(resources: StageResources) -> dict[str, float]:
    """What Ray reserves for one worker."""
    bundle = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        bundle["GPU"] = resources.gpus_per_worker
    if resources.accelerator is not None:
        bundle[ACCELERATOR + resources.accelerator] = _SLIVER
    return bundle


def driver_bundle(drivers: str) -> dict[str, float]:
    """What Ray reserves for a trial, or for the driver of a job: it only waits, so it holds no CPU."""
    if drivers == ANYWHERE:
        return {"memory": DRIVER_BYTES}
    return {_HEAD_NODE if drivers == HEAD else drivers: _SLIVER}


def totals(nodes: Sequence[NodeShape]) -> dict[str, float]:
    """Resource -> what all nodes have of it."""
    kinds = {kind for node in nodes for kind in node.resources}
    return {kind: sum(node.resources.get(kind, 0.0) * node.count for node in nodes) for kind in sorted(kinds)}


def check_cluster(
    resources: ResourcesConfig, now: Sequence[NodeShape], later: Sequence[NodeShape], memory: Mapping[str, float]
) -> None:
    """Raise UserError for a stage that can never run; `memory`: stage -> bytes of a worker, where that is known."""
    for name in type(resources).model_fields:
        stage = getattr(resources, name)
        if isinstance(stage, StageResources):
            check_stage(name, stage, now, later, memory.get(name))
    if resources.drivers not in (HEAD, ANYWHERE) and not any(
        node.holds(driver_bundle(resources.drivers)) for node in [*now, *later]
    ):
        raise UserError(
            f"resources.drivers = {resources.drivers}: no node of the cluster has a resource of that name; give it to a "
            f"node type, or take `{HEAD}` or `{ANYWHERE}`"
        )


def check_stage(
    stage: str,
    resources: StageResources,
    now: Sequence[NodeShape],
    later: Sequence[NodeShape],
    memory: float | None = None,
) -> None:
    """Raise UserError when neither the nodes there are nor all that an autoscaler may start can hold the workers."""
    try:
        check_workers(stage, resources, now)
        check_memory(stage, resources, now, memory or 0.0)
    except UserError:
        if not later:
            raise
        check_workers(stage, resources, later)
        check_memory(stage, resources, later, memory or 0.0)


def check_workers(stage: str, resources: StageResources, nodes: Sequence[NodeShape]) -> None:
    """Raise UserError when the nodes have less than the workers and the data tasks need, even when idle."""
    bundle, there = worker_bundle(resources), totals(nodes)
    _check_accelerator(stage, resources, there)
    for kind, each in bundle.items():
        if kind.startswith(ACCELERATOR):
            continue
        needed = each * resources.workers + (CPUS_PER_TASK if kind == "CPU" else 0.0)
        if needed > there.get(kind, 0.0) + _TINY:
            field = "cpus_per_worker" if kind == "CPU" else "gpus_per_worker"
            raise UserError(
                f"resources.{stage}: {resources.workers} workers with {field} = {each:g} need {needed:g} {kind}, "
                f"the cluster has {there.get(kind, 0.0):g}; lower `workers` or `{field}`, or run on a larger cluster "
                "with --address"
            )
    room = sum(node.holds(bundle) * node.count for node in nodes)
    if room < resources.workers:
        words = " and ".join(f"{each:g} {kind}" for kind, each in bundle.items() if not kind.startswith(ACCELERATOR))
        words += f" ({resources.accelerator})" if resources.accelerator else ""
        raise UserError(
            f"resources.{stage}: a worker needs {words} on one node, and the cluster's nodes hold {room} such workers of "
            f"{resources.workers}; lower `cpus_per_worker` or `gpus_per_worker`, or take larger nodes"
        )


def _check_accelerator(stage: str, resources: StageResources, there: Mapping[str, float]) -> None:
    if resources.accelerator is not None and not there.get(ACCELERATOR + resources.accelerator):
        types = sorted(kind.removeprefix(ACCELERATOR) for kind in there if kind.startswith(ACCELERATOR))
        raise UserError(
            f"resources.{stage}.accelerator = {resources.accelerator}: no node of the cluster has such a GPU; there are: "
            f"{', '.join(types) or 'none'}"
        )


def check_memory(stage: str, resources: StageResources, nodes: Sequence[NodeShape], needed: float) -> None:
    """Raise UserError when no node's memory (of its GPUs, for a stage that has some) holds one worker.

    Nodes whose memory is not known pass."""
    able = [node for node in nodes if node.holds(worker_bundle(resources))]
    gpus = resources.gpus_per_worker
    sizes = [node.gpu_memory if gpus else node.memory for node in able]
    if not sizes or any(size is None or size * (gpus or 1) >= needed for size in sizes):
        return
    largest = max(size for size in sizes if size is not None)
    place = "the largest GPU that fits has" if gpus else "the largest node that fits has"
    raise UserError(
        f"resources.{stage}: a worker needs about {needed / 2**30:.3g} GiB, {place} {largest / 2**30:.3g} GiB; lower "
        "`micro_batch`, set `activation_checkpointing`, raise `workers` with `zero_stage: 3`, or take larger nodes"
    )
