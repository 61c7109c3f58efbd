"""The cluster files of this project, through Ray's own checks; what is read from them; and the Kubernetes manifest."""

from __future__ import annotations

import base64
import copy
import io
import re
import shlex
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from overfill.errors import UserError
from pipeline.config import ResourcesConfig
from pipeline.config_io import parse_yaml, validate
from pipeline.submission.cluster_file import read_cluster_file
from pipeline.submission.manifest import notes, objects, print_manifest
from pipeline.submission.submit import Request, Submission, prepare

ROOT = Path(__file__).parents[3]
FILES = {"aws": "cluster.yaml", "gcp": "clusters/gcp.yaml", "local": "clusters/on-premise.yaml"}


@pytest.mark.parametrize(("provider", "name"), FILES.items())
def test_ray_prepares_and_accepts_the_file_as_it_stands(provider, name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    content = parse_yaml((ROOT / name).read_text(), name)
    assert content["provider"]["type"] == provider
    prepared = prepare_config(copy.deepcopy(content))
    validate_config(prepared)
    with pytest.raises(Exception, match="Additional properties"):
        validate_config(prepared | {"overfill": {}})  # so it is `metadata` that makes room for our settings
    for local in content["file_mounts"].values():
        assert local.startswith("~") or (ROOT / local).exists(), f"{name}: {local} is not in the repository"


@pytest.mark.parametrize("name", FILES.values())
def test_drivers_have_a_head_of_their_own_and_nothing_listens_to_the_world(name):
    content = parse_yaml((ROOT / name).read_text(), name)
    start = " ".join(content["head_start_ray_commands"])
    assert "--num-cpus=0" in start
    assert "--dashboard-host=127.0.0.1" in start
    assert "RAY_AUTH_MODE=token" in start
    types = content.get("available_node_types", {})
    if types:
        head = types[content["head_node_type"]]
        assert head["resources"]["CPU"] == 0
        assert "spot" not in str(head)
        assert "preemptible" not in str(head)
        assert types["gpu"]["min_workers"] == 0
        assert content["idle_timeout_minutes"] > 0
    store = read_cluster_file(str(ROOT / name)).settings.store
    assert any(Path(store).parent.as_posix() in command for command in content["setup_commands"])


@pytest.mark.parametrize("name", FILES.values())
def test_commands_of_the_file_are_shell(name):
    content = parse_yaml((ROOT / name).read_text(), name)
    for key in [key for key in content if key.endswith("_commands")]:
        for command in content[key]:
            shlex.split(command)
            assert command.count("(") == command.count(")")


@pytest.mark.parametrize("name", FILES.values())
def test_our_settings_are_resources_of_an_experiment(name):
    found = read_cluster_file(str(ROOT / name))
    resources = validate(ResourcesConfig, found.settings.resources, name)
    assert resources.distill.gpus_per_worker == 1
    if found.nodes:
        assert {node.resources.get("GPU", 0.0) * node.count for node in found.nodes} == {0.0, 16.0}


def test_mistakes_in_our_settings_are_named(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("cluster_name: x\nmetadata: {overfill: {stroe: /mnt}}\n")
    with pytest.raises(UserError, match="metadata.overfill: stroe: no such field; did you mean `store`"):
        read_cluster_file(str(path))
    path.write_text("cluster_name: x\n")
    assert read_cluster_file(str(path)).settings.store is None
    assert read_cluster_file(str(path)).nodes == ()


@pytest.fixture
def submission(tmp_path, monkeypatch):
    """The recipe of a 3B model with a cluster file that names an image."""
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    cluster = tmp_path / "c.yaml"
    cluster.write_text("cluster_name: x\nmetadata: {overfill: {store: /mnt/runs, image: registry/overfill:1}}\n")
    return prepare(Request(str(ROOT / "sweeps" / "llama-3.2-3b.yaml"), variables=["HF_TOKEN"], cluster=str(cluster)))


def test_a_ray_job_has_what_kuberay_requires(submission):
    config_map, job = objects(submission)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    name = job["metadata"]["name"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= 47  # KubeRay puts a suffix behind it
    cluster = job["spec"]["rayClusterSpec"]
    assert job["spec"]["entrypoint"] == submission.entrypoint
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"] == "registry/overfill:1"
        assert container["resources"]["limits"]["memory"].endswith("Gi")
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/mnt/runs", "/etc/overfill"}
        assert isinstance(group["rayStartParams"], dict)
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["groupName"]
    assert (workers["minReplicas"], workers["maxReplicas"]) == (0, 8)
    assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    environment = parse_yaml(job["spec"]["runtimeEnvYAML"], "x")
    assert environment["working_dir"] == "file:///etc/overfill/overfill.zip"
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(config_map["binaryData"]["overfill.zip"]))) as archive:
        assert archive.testzip() is None
        assert "experiment.yaml" in archive.namelist()
    assert config_map["metadata"]["name"] == name


def test_a_ray_job_on_an_object_store_mounts_no_volume_for_it(submission):
    _, job = objects(replace(submission, store="s3://bucket/runs"))
    pod = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert [volume["name"] for volume in pod["volumes"]] == ["package"]
    assert [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]] == ["/etc/overfill"]
    assert not any("PersistentVolumeClaim" in note for note in notes(replace(submission, store="s3://bucket/runs")))


def test_a_ray_job_has_no_nodes_for_drivers_but_its_own(submission):
    def asked(drivers: str) -> Submission:
        resources = submission.config.resources.model_copy(update={"drivers": drivers})
        return replace(submission, config=submission.config.model_copy(update={"resources": resources}))

    assert objects(asked("anywhere")) == objects(submission)  # the trials follow the file, the driver its head
    with pytest.raises(UserError, match=r"resources\.drivers = driver: the cluster that a RayJob brings"):
        objects(asked("driver"))


def test_values_of_variables_come_from_a_secret(submission, capsys):
    text = str(objects(submission)[1])
    assert "s3cret" not in text
    assert "'secretKeyRef': {'name': 'overfill-environment', 'key': 'HF_TOKEN'}" in text
    assert any("HF_TOKEN" in note for note in notes(submission))


def test_the_working_directory_of_a_manifest_is_one_that_ray_takes(submission):
    from ray.runtime_env import RuntimeEnv

    RuntimeEnv(**parse_yaml(objects(submission)[1]["spec"]["runtimeEnvYAML"], "x"))


def test_a_manifest_needs_an_image_and_a_known_system(tmp_path):
    request = Request(str(ROOT / "sweeps" / "quickstart.yaml"), store="/mnt/runs")
    with pytest.raises(UserError, match=r"metadata\.overfill\.image"):
        print_manifest("kuberay", request)
    with pytest.raises(UserError, match="only kuberay"):
        print_manifest("nomad", request)
