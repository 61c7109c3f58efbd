"""`overfill submit --manifest kuberay`: the job as Kubernetes objects, instead of a request to a job server.

A ConfigMap carries what a job otherwise uploads (`pipeline.submission.package`), and a RayJob makes a cluster, runs the
job on it and takes it down again. Every pod mounts the volume of the store and the package, which Ray unpacks from its
file. Fields as of KubeRay's `ray.io/v1`. Values of variables named by `--env` come from a Secret, so none is printed.
"""

from __future__ import annotations

import base64
import math
import re
import sys
from typing import Any

import typer

from overfill.errors import UserError
from pipeline.config import StageResources
from pipeline.config_io import dump_yaml
from pipeline.record import libraries
from pipeline.submission.fitting import ANYWHERE, HEAD
from pipeline.submission.submit import Request, Submission, is_remote, job_environment, prepare

PACKAGE = "overfill.zip"
MOUNT = "/etc/overfill"
SECRET = "overfill-environment"  # noqa: S105 - the name of one
CONFIG_MAP_LIMIT = 1 << 20
"""Kubernetes takes no larger ConfigMap."""


def print_manifest(system: str, request: Request) -> None:
    """Print the objects for `kubectl apply --server-side -f -`. Raises UserError for another system than kuberay."""
    if system != "kuberay":
        raise UserError(f"--manifest {system}: only kuberay is known")
    submission = prepare(request)
    for note in notes(submission):
        sys.stdout.write(f"# {note}\n")
    typer.echo("---\n".join(dump_yaml(item) for item in objects(submission)), nl=False)


def notes(submission: Submission) -> list[str]:
    """What to know before applying it."""
    lines = [
        "kubectl apply --server-side -f THIS   (a package is too large for the annotation of a plain apply)",
        f"needs: {_needed_for(submission.store)}",
    ]
    if submission.variables:
        lines.append(f"needs: a Secret `{SECRET}` with the keys {', '.join(sorted(submission.variables))}")
    return lines


def _needed_for(store: str) -> str:
    if is_remote(store):
        return f"an image with this package's extra for {store}, and pods that may write there (a service account)"
    return f"a PersistentVolumeClaim `overfill` that all pods can mount, for {store}"


def objects(submission: Submission) -> list[dict[str, Any]]:
    """ConfigMap and RayJob."""
    name, drivers = object_name(submission.job), submission.config.resources.drivers
    if drivers not in (HEAD, ANYWHERE):
        raise UserError(
            f"--manifest kuberay: resources.drivers = {drivers}: the cluster that a RayJob brings has no such nodes; take "
            f"`{HEAD}` or `{ANYWHERE}`"
        )
    content = base64.b64encode(submission.package.content).decode("ascii")
    if len(content) > CONFIG_MAP_LIMIT:
        raise UserError(f"--manifest kuberay: the package has {len(content):,} bytes, a ConfigMap holds 1 MiB")
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "binaryData": {PACKAGE: content},
    }
    return [config_map, ray_job(submission, name)]


def object_name(job: str) -> str:
    """A name that Kubernetes takes: lower case, at most 40, since KubeRay puts more behind it; the fingerprint stays."""
    plain = re.sub(r"[^a-z0-9-]+", "-", job.lower()).strip("-")
    return plain if len(plain) <= 40 else f"{plain[:27].strip('-')}-{plain[-12:]}"


def ray_job(submission: Submission, name: str) -> dict[str, Any]:
    """The RayJob: a head for drivers, and workers as many and as large as the experiment's largest stage."""
    own = {key: value for key, value in job_environment(submission).items() if key not in submission.variables}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name},
        "spec": {
            "entrypoint": submission.entrypoint,
            "runtimeEnvYAML": dump_yaml({"working_dir": f"file://{MOUNT}/{PACKAGE}", "env_vars": own}),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": {
                "rayVersion": libraries()["ray"],
                "authOptions": {"mode": "token"},
                "enableInTreeAutoscaling": True,
                "headGroupSpec": {
                    # No CPUs for work: drivers and trials alone.
                    "rayStartParams": {"num-cpus": "0"},
                    "template": _pod(submission, name, "ray-head", cpus=2, gpus=0, memory=8),
                },
                "workerGroupSpecs": [_workers(submission, name)],
            },
        },
    }


def _workers(submission: Submission, name: str) -> dict[str, Any]:
    """One pod per worker of the widest stage."""
    resources = submission.config.resources
    stages = [
        stage for key in type(resources).model_fields if isinstance(stage := getattr(resources, key), StageResources)
    ]
    cpus = math.ceil(max(stage.cpus_per_worker for stage in stages)) + 1  # one for the data that feeds the worker
    gpus = math.ceil(max(stage.gpus_per_worker for stage in stages))
    weights = max(cell.shape.weight_bytes("bf16") for cell in submission.cells)
    needed = 2 * weights if gpus else max(submission.memory.values())  # models reach a GPU through main memory
    return {
        "groupName": "workers",
        "replicas": 0,
        "minReplicas": 0,
        "maxReplicas": max(stage.workers for stage in stages),
        "rayStartParams": {},
        "template": _pod(submission, name, "ray-worker", cpus, gpus, memory=8 + math.ceil(needed / 2**30)),
    }


def _pod(submission: Submission, name: str, container: str, cpus: float, gpus: float, memory: int) -> dict[str, Any]:
    image = submission.cluster.settings.image if submission.cluster else None
    if image is None:
        raise UserError(
            "--manifest kuberay: set metadata.overfill.image in cluster.yaml to an image with this package's "
            "dependencies; docs/cluster.md has a Dockerfile"
        )
    limits = {"cpu": f"{cpus:g}", "memory": f"{memory}Gi"} | ({"nvidia.com/gpu": f"{gpus:g}"} if gpus else {})
    mounts = [{"name": "package", "mountPath": MOUNT}]
    volumes: list[dict[str, Any]] = [{"name": "package", "configMap": {"name": name}}]
    if not is_remote(submission.store):
        mounts.append({"name": "store", "mountPath": submission.store})
        volumes.append({"name": "store", "persistentVolumeClaim": {"claimName": "overfill"}})
    secret = [
        {"name": variable, "valueFrom": {"secretKeyRef": {"name": SECRET, "key": variable}}}
        for variable in sorted(submission.variables)
    ]
    return {
        "spec": {
            "containers": [
                {
                    "name": container,
                    "image": image,
                    "env": secret,
                    "resources": {"limits": limits, "requests": limits},
                    "volumeMounts": mounts,
                }
            ],
            "volumes": volumes,
        }
    }
