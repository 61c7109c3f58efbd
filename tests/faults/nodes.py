"""A Ray cluster of two nodes on this machine, as a program of its own: its processes are in one session.

Prints the head's address. `lose SECONDS` on its standard input makes it lose the second node, add another one after so
many seconds, and print `back`. `reclaim SECONDS` gives notice first, as a cloud does that wants a machine back: another
node joins at once, and the second one dies after so many seconds. The head has no CPU: everything but the trials runs on
the second node.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

from pipeline.cluster import set_environment

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

OBJECT_STORE_BYTES = 200 * 2**20
WATCHER = {
    # Clusters with a dashboard have it anyway. Ray looks every 5 s, in which the small training here is over.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.2",
}


def main() -> None:
    """Until the standard input ends."""
    set_environment()
    os.environ.update(WATCHER)
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    node = _add(cluster)
    print(cluster.address, flush=True)
    for line in sys.stdin:
        what, seconds = line.split()
        node = {"lose": _lose, "reclaim": _reclaim}[what](cluster, node, float(seconds))
        print("back", flush=True)


def _add(cluster: Cluster) -> Any:
    return cluster.add_node(num_cpus=2, object_store_memory=OBJECT_STORE_BYTES)


def _lose(cluster: Cluster, node: Any, seconds: float) -> Any:
    cluster.remove_node(node, allow_graceful=False)
    time.sleep(seconds)
    return _add(cluster)


def _reclaim(cluster: Cluster, node: Any, seconds: float) -> Any:
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    end = time.monotonic() + seconds
    accepted, why = GcsClient(address=cluster.address).drain_node(
        node.node_id,
        DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
        "the machine is wanted back",
        int(1000 * (time.time() + seconds)),
    )
    if not accepted:
        raise RuntimeError(f"Ray does not take the notice: {why}")
    other = _add(cluster)
    time.sleep(max(0.0, end - time.monotonic()))
    cluster.remove_node(node, allow_graceful=False)
    return other


if __name__ == "__main__":
    main()
