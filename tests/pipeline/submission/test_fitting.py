"""Whether workers ever fit: by node, by type of GPU, by memory."""

from __future__ import annotations

import pytest

from overfill.errors import UserError
from pipeline.config import ResourcesConfig, StageResources
from pipeline.submission.fitting import (
    NodeShape,
    check_cluster,
    check_memory,
    check_workers,
    driver_bundle,
    totals,
    worker_bundle,
)

L4 = NodeShape({"CPU": 48.0, "GPU": 4.0, "accelerator_type:L4": 1.0, "memory": 100e9, "object_store_memory": 40e9}, 2)
PLAIN = NodeShape({"CPU": 16.0})
GIB = 2**30


def test_nodes_are_counted_and_not_their_totals_alone():
    assert totals([L4, PLAIN]) == {
        "CPU": 112.0, "GPU": 8.0, "accelerator_type:L4": 2.0, "memory": 200e9, "object_store_memory": 80e9,
    }  # fmt: skip
    check_workers("distill", StageResources(workers=8, gpus_per_worker=1, cpus_per_worker=4), [L4, PLAIN])
    with pytest.raises(UserError, match="hold 2 such workers of 3"):  # and 3 x 30 is less than 2 x 48
        check_workers("distill", StageResources(workers=3, cpus_per_worker=30), [L4])
    with pytest.raises(UserError, match="8 GPU on one node, and the cluster's nodes hold 0"):
        check_workers("distill", StageResources(gpus_per_worker=8), [L4, PLAIN])


def test_a_type_of_gpu_is_a_node_that_has_it():
    named = StageResources(gpus_per_worker=1, accelerator="L4")
    assert worker_bundle(named) == {"CPU": 0.5, "GPU": 1.0, "accelerator_type:L4": 0.001}
    check_workers("benchmark", named, [PLAIN, L4])
    with pytest.raises(UserError, match=r"resources\.benchmark\.accelerator = H100: .*there are: L4"):
        check_workers("benchmark", StageResources(gpus_per_worker=1, accelerator="H100"), [PLAIN, L4])
    with pytest.raises(UserError, match="there are: none"):
        check_workers("benchmark", named, [PLAIN])


def test_memory_is_that_of_the_gpu_or_of_the_node():
    gpu = StageResources(gpus_per_worker=1)
    check_memory("distill", gpu, [L4], 23 * GIB)
    with pytest.raises(UserError, match="needs about 25 GiB, the largest GPU that fits has 24 GiB"):
        check_memory("distill", gpu, [L4], 25 * GIB)
    check_memory("distill", gpu, [L4, NodeShape({"CPU": 8.0, "GPU": 8.0, "accelerator_type:H100": 1.0})], 25 * GIB)
    check_memory("distill", gpu, [NodeShape({"CPU": 8.0, "GPU": 1.0})], 1000 * GIB)  # a GPU that is not known
    with pytest.raises(UserError, match="the largest node that fits has 130 GiB"):
        check_memory("prune", StageResources(), [L4], 200 * GIB)
    check_memory("prune", StageResources(), [PLAIN], 200 * GIB)  # a node type that does not say


def test_what_an_autoscaler_may_add_is_asked_when_there_is_not_enough_now():
    wanted = ResourcesConfig(distill=StageResources(gpus_per_worker=1))
    check_cluster(wanted, [PLAIN], [PLAIN, L4], {})
    with pytest.raises(UserError, match="the cluster has 0"):
        check_cluster(wanted, [PLAIN], [], {})
    two = ResourcesConfig(distill=StageResources(gpus_per_worker=1), prune=StageResources(cpus_per_worker=60))
    check_cluster(two, [PLAIN, NodeShape({"CPU": 64.0})], [L4], {})  # one stage now, the other later
    with pytest.raises(UserError, match="the largest GPU"):
        check_cluster(wanted, [PLAIN], [L4], {"distill": 30 * GIB})


def test_drivers_stay_on_the_head_unless_asked():
    assert driver_bundle("head") == {"node:__internal_head__": 0.001}
    assert driver_bundle("driver") == {"driver": 0.001}
    assert driver_bundle("anywhere") == {"memory": 256 * 2**20}  # no CPU, of which a worker may need every one
    for known in ("head", "anywhere"):
        check_cluster(ResourcesConfig(drivers=known), [PLAIN], [], {})
    named = ResourcesConfig(drivers="driver")
    check_cluster(named, [PLAIN], [NodeShape({"CPU": 8.0, "driver": 1.0})], {})
    with pytest.raises(
        UserError, match=r"resources\.drivers = driver: no node of the cluster has a resource of that name"
    ):
        check_cluster(named, [PLAIN], [L4], {})
