"""A Ray cluster on one machine in a process of its own: a head with a job server, and raylets that can be lost.

Reads one command per line from its standard input and answers each with one line of JSON. When the input ends, or the
process that holds it dies, so does the cluster. Run as `python cluster_host.py PORT`, with the job server's port.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

OBJECT_STORE_BYTES = 80 * 2**20
SYSTEM = {
    "health_check_period_ms": 500,  # a lost node is noticed in seconds, not in a quarter of a minute
    "idle_worker_killing_time_threshold_ms": 30_000,  # one that has imported torch serves the next stage too
}
FAKE_GPU = "accelerator_type:FAKE"


class Host:
    """The cluster; one method per command."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._folder = tempfile.mkdtemp(prefix="ovf-")  # short: Ray's sockets are below it
        self.start()

    def start(self) -> None:
        """A head for drivers alone, and two nodes of one CPU, one of which says that it has a type of GPU nobody sells."""
        from ray.cluster_utils import Cluster

        head = self._node("head") | {
            "num_cpus": 0,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": self._port,
            "dashboard_agent_listen_port": 0,  # any: another Ray on this machine may have Ray's own
            "include_dashboard": True,
            "_system_config": SYSTEM,
        }
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.add("a")
        self.add("b", FAKE_GPU)

    def add(self, name: str, *others: str) -> None:
        """Another node of one CPU with a resource of its own name, and others."""
        resources = dict.fromkeys((name, *others), 1)
        self._cluster.add_node(num_cpus=1, resources=resources, **self._node(name))

    @property
    def address(self) -> str:
        """Where drivers join, who are on a machine of the cluster."""
        return str(self._cluster.address)

    def _node(self, name: str) -> dict[str, Any]:
        """A folder of its own for each node: otherwise they unpack a job's files over each other."""
        return {"temp_dir": f"{self._folder}/{name}", "object_store_memory": OBJECT_STORE_BYTES}

    def lose(self, pid: str) -> None:
        """The node whose raylet has this process id is lost without a word."""
        self._cluster.remove_node(self._node_of(pid), allow_graceful=False)

    def _node_of(self, pid: str) -> Any:
        return {process.process.pid: node for node in self._cluster.worker_nodes for process in raylets(node)}[int(pid)]

    def reclaim(self, pid: str) -> None:
        """Give notice that the node whose raylet has this process id is taken away a minute from now."""
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        accepted, why = GcsClient(address=self.address).drain_node(
            self._node_of(pid).node_id,
            DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
            "the machine is wanted back",
            int(1000 * (time.time() + 60)),
        )
        if not accepted:
            raise RuntimeError(why)

    def restart(self) -> None:
        """Everything is lost, and a new cluster comes up at the same address."""
        self.end()
        self.start()

    def end(self) -> None:
        """No process is left."""
        self._cluster.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)


def raylets(node: object) -> list:
    """The raylet of a node, as Ray's process records."""
    return node.all_processes["raylet"]


def main() -> None:
    """Answer commands until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what Ray prints is no answer
    host = Host(int(sys.argv[1]))
    answers.write(json.dumps({"address": host.address}) + "\n")
    with contextlib.suppress(KeyboardInterrupt):
        for line in sys.stdin:
            command, *arguments = line.split()
            call: Callable[..., None] = getattr(host, command)
            call(*arguments)
            answers.write(json.dumps({"done": command}) + "\n")
    host.end()


if __name__ == "__main__":
    main()
