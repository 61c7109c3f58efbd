"""What the connected cluster is asked for, with Ray's answers in place of Ray."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest

from overfill.errors import UserError
from pipeline.cluster import UNLIMITED_NODES, capacity, check_holds, connected, largest_node, node_shapes, usage
from pipeline.config import StageResources
from pipeline.submission.fitting import NodeShape

HEAD = {"Alive": True, "Resources": {"CPU": 0.0, "node:__internal_head__": 1.0}}
GPU_NODE = {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0, "accelerator_type:L4": 1.0}}
LOST = {"Alive": False, "Resources": {"CPU": 500.0}}


@pytest.fixture
def autoscaling(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head, one node with GPUs, and an autoscaler that may start four of those and any number of large ones."""
    groups = [
        SimpleNamespace(resources={"CPU": 8, "GPU": 2, "accelerator_type:L4": 1}, max_count=4),
        SimpleNamespace(resources={"CPU": 64}, max_count=-1),
    ]
    config = SimpleNamespace(node_group_configs=groups)
    monkeypatch.setattr("ray.nodes", lambda: [HEAD, GPU_NODE, LOST])
    monkeypatch.setattr("ray._private.state.state.get_cluster_config", lambda: config)


@pytest.mark.usefixtures("autoscaling")
def test_nodes_that_may_be_added_count_and_lost_ones_do_not():
    now, later = node_shapes()
    assert [node.resources["CPU"] for node in now] == [0.0, 8.0]
    assert later[1] == NodeShape({"CPU": 64.0}, UNLIMITED_NODES)
    assert (capacity().gpus, capacity().cpus) == (8.0, 32.0 + 64.0 * UNLIMITED_NODES)
    check_holds("distill", StageResources(workers=8, gpus_per_worker=1))
    with pytest.raises(UserError, match="need 9 GPU, the cluster has 8"):
        check_holds("distill", StageResources(workers=9, gpus_per_worker=1))


@pytest.mark.usefixtures("autoscaling")
def test_a_whole_node_is_the_largest_that_the_stage_may_run_on():
    assert largest_node(StageResources()) == 64.0
    assert largest_node(StageResources(accelerator="L4")) == 8.0
    assert largest_node(StageResources(accelerator="H100")) == 0.0


def test_use_is_what_is_reserved(monkeypatch):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0, "memory": 1e9})
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 6.5, "memory": 1e9})
    assert usage() == {"CPU": (1.5, 8.0), "GPU": (2.0, 2.0)}


def test_a_refused_token_and_a_cluster_that_is_not_there_are_the_users_to_mend(monkeypatch):
    from ray._private.utils import check_version_info
    from ray.exceptions import AuthenticationError

    monkeypatch.setattr("pipeline.cluster._knock", lambda address: None)

    def refuse(error: Exception) -> None:
        def init(**_: object) -> None:
            raise error

        monkeypatch.setattr("ray.init", init)

    refuse(AuthenticationError("bad t0ken"))
    with pytest.raises(UserError, match=r"--address head:6379: the cluster does not accept this token") as caught:
        connected("head:6379").__enter__()
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError) as mismatch:
        check_version_info({"ray_version": "2.40.0", "python_version": "3.9.1"}, "127.0.0.1")
    refuse(mismatch.value)
    with pytest.raises(
        UserError, match=r"--address head:6379: the cluster runs Ray 2\.40\.0 and Python 3\.9\.1, this"
    ) as told:
        connected("head:6379").__enter__()
    assert "\n" not in str(told.value)
    refuse(ConnectionError("nobody\nthere"))
    with pytest.raises(UserError, match=r"no Ray cluster there \(nobody\)"):
        connected("head:6379").__enter__()


def test_where_nobody_answers_one_line_says_so(monkeypatch, capfd):
    monkeypatch.setattr("pipeline.cluster.ANSWER_S", 0.2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = f"127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(
        UserError, match=rf"--address {free}: no Ray cluster there \(no answer within 0\.2 s\); leave it out"
    ):
        connected(free).__enter__()
    for address in ("head", "head:port"):
        with pytest.raises(UserError, match=f"--address {address}: no Ray cluster there"):
            connected(address).__enter__()
    assert capfd.readouterr() == ("", "")
