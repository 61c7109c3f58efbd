"""A Ray cluster of two nodes on this machine, as a program of its own: its processes are in one session.

Prints the head's address. A number on its standard input makes it lose the second node, add another one after so many
seconds, and print `back`. The head has no CPU: everything but the trials runs on the second node.
"""

from __future__ import annotations

import sys
import time

from pipeline.cluster import set_environment

OBJECT_STORE_BYTES = 200 * 2**20


def main() -> None:
    """Until the standard input ends."""
    set_environment()
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    node = cluster.add_node(num_cpus=2, object_store_memory=OBJECT_STORE_BYTES)
    print(cluster.address, flush=True)
    for line in sys.stdin:
        cluster.remove_node(node, allow_graceful=False)
        time.sleep(float(line))
        node = cluster.add_node(num_cpus=2, object_store_memory=OBJECT_STORE_BYTES)
        print("back", flush=True)


if __name__ == "__main__":
    main()
