"""`overfill submit`: an experiment as a job of a Ray cluster.

Everything that can be found wrong is found here and before anything is uploaded: the file, paths that only this machine
has, versions, and whether the cluster can ever hold each stage. What travels is `pipeline.submission.package`'s zip; on
the cluster the job is `overfill run` of the same file.

A job's name is a function of what it computes and where to: submitting twice attaches to the job that runs, and after
its end begins another attempt (`-2`, `-3`), in which the store finds what is done already.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from overfill.errors import UserError
from pipeline.config import ExperimentConfig
from pipeline.config_io import dump_yaml, load_experiment, validate
from pipeline.cost import cell_costs
from pipeline.fingerprint import fingerprint, identity_config
from pipeline.masking import mask_uri
from pipeline.planning import size
from pipeline.record import COMMIT_VARIABLE, source_commit
from pipeline.submission.cluster_file import ClusterFile, read_cluster_file
from pipeline.submission.fitting import ANYWHERE, DRIVER_BYTES, HEAD, check_cluster, driver_bundle
from pipeline.submission.package import EXPERIMENT, Package, make_package
from pipeline.sweep import Cell, outline

if TYPE_CHECKING:
    from pipeline.submission.job_server import JobServer

STOP_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
"""How long Ray lets a job that is stopped leave everything in order, before it kills it; its default is 3."""
AFTER_GRACE_S = 30
"""For what follows the stages' own grace period: the last lines to MLflow, and Ray's own end."""
REMOTE = re.compile(r"(?:s3|gs)://[^/@]+(?:/.*)?\Z")


@dataclass(frozen=True)
class Request:
    """What `overfill submit` was asked for."""

    file: str
    overrides: Sequence[str] = ()
    store: str | None = None
    name: str | None = None
    """Name of the job, the experiment's when left out."""
    variables: Sequence[str] = ()
    """Names of environment variables whose values the job gets."""
    cluster: str | None = None
    """Cluster file; `cluster.yaml` of the working folder when left out, if it is there."""


@dataclass(frozen=True)
class Submission:
    """A job, ready to be sent."""

    experiment: str
    job: str
    """Name of its first attempt."""
    config: ExperimentConfig
    cells: list[Cell]
    store: str
    package: Package
    variables: dict[str, str]
    """Environment of the job; values may be secret."""
    cluster: ClusterFile | None

    @property
    def entrypoint(self) -> str:
        """The command that the head runs."""
        return f"python -m pipeline.cli run {EXPERIMENT} --address auto --store {shlex.quote(self.store)}"

    @property
    def memory(self) -> dict[str, float]:
        """Stage -> bytes of its largest worker over all cells."""
        needed: dict[str, float] = {}
        for cell in self.cells:
            for stage, cost in cell_costs(cell).items():
                if cost.memory is not None:
                    needed[stage] = max(cost.memory, needed.get(stage, 0.0))
        return needed


def prepare(request: Request) -> Submission:
    """Read and check everything that can be checked without the cluster."""
    cluster = read_cluster_file(request.cluster)
    config = load_experiment(request.file, request.overrides)
    if cluster is not None:
        config = _with_cluster_resources(config, cluster)
    store = _store(request.store, cluster)
    _check_paths(config, request.file)
    cells = outline(config, request.file)
    for cell in cells:
        _check_paths(cell.config, request.file)
    text = dump_yaml(config.model_dump(mode="json", exclude_unset=True))
    return Submission(
        experiment=config.name,
        job=job_name(request.name or config.name, cells, store),
        config=config,
        cells=cells,
        store=store,
        package=make_package(text),
        variables=_variables(request.variables, cluster),
        cluster=cluster,
    )


def _with_cluster_resources(config: ExperimentConfig, cluster: ClusterFile) -> ExperimentConfig:
    """The experiment with the cluster's resources where it says nothing itself."""
    values = config.model_dump(mode="json", exclude_unset=True)
    own = values.get("resources", {})
    merged = {**cluster.settings.resources, **own}
    for stage, given in cluster.settings.resources.items():
        if isinstance(given, dict) and isinstance(own.get(stage), dict):
            merged[stage] = {**given, **own[stage]}
    where = f"{cluster.path}: metadata.overfill"
    return validate(ExperimentConfig, {**values, "resources": merged}, where) if merged else config


def is_remote(store: str) -> bool:
    """Whether a store is objects below a URL, which no node mounts."""
    return REMOTE.match(store) is not None


def _store(given: str | None, cluster: ClusterFile | None) -> str:
    store = given or (cluster.settings.store if cluster else None)
    if store is None:
        raise UserError("--store: say where results go on the cluster, or set metadata.overfill.store in cluster.yaml")
    if mask_uri(store) != store:
        raise UserError(f"--store {mask_uri(store)}: credentials in a URL would reach logs; give them to the nodes")
    if not store.startswith("/") and not is_remote(store):
        raise UserError(
            f"--store {store}: give an absolute path, on storage that every node of the cluster mounts, "
            "or s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"
        )
    return store.rstrip("/") or "/"


def _check_paths(config: ExperimentConfig, file: str) -> None:
    """Raises UserError for a path that means something on this machine only."""
    places = [("data.path", config.data.path)]
    models = {"teacher": config.teacher} | ({} if config.released is None else {"released": config.released})
    for section, given in models.items():
        if given.model is not None and (given.model.startswith((".", "~")) or Path(given.model).is_dir()):
            places.append((f"{section}.model", given.model))
    for field, path in places:
        if path is not None and not path.startswith("/"):
            raise UserError(
                f"{file}: {field} = {path}: this path is of this machine, the cluster has no such; put the files where "
                f"every node sees them and give that absolute path, with --set {field}=/..."
            )
    for section, given in models.items():
        model = given.model
        if model is not None and model.startswith("/") and not Path(model).is_dir() and given.shape is None:
            raise UserError(
                f"{file}: {section}.model = {model}: not on this machine, so its shape is not known here; give the fields "
                f"of its config.json under `{section}.shape`"
            )


def job_name(name: str, cells: Sequence[Cell], store: str) -> str:
    """A name that depends on what is computed and where it goes; resources and descriptions change nothing."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name):
        raise UserError(f"--name {name}: use letters, digits, points, hyphens and underscores, at most 80")
    told = ("name", "description")
    identities = set()
    for cell in cells:
        values: dict[str, Any] = {key: v for key, v in identity_config(cell.config).items() if key not in told}
        identities.add(fingerprint([values, cell.config.data.path]))
    return f"{name}-{fingerprint([sorted(identities), store])}"


def _variables(names: Sequence[str], cluster: ClusterFile | None) -> dict[str, str]:
    """The job's environment: what was named and no more. Raises UserError for a name that is not set here."""
    variables: dict[str, str] = {}
    if cluster is not None and cluster.settings.tracking_uri:
        variables["MLFLOW_TRACKING_URI"] = cluster.settings.tracking_uri
    for name in names:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError("--env: give the name of an environment variable alone; its value is taken from here")
        if name not in os.environ:
            raise UserError(f"--env {name}: not set here; export it first, or leave it out")
        variables[name] = os.environ[name]
    return variables


def submit(request: Request, address: str | None, console: Console) -> tuple[JobServer, str]:
    """Check, upload what the cluster does not have, start the job or find the one that runs; the server and its name."""
    submission = prepare(request)
    from pipeline.submission.job_server import JobServer, check_versions

    server = JobServer(address)
    check_versions(server)
    nodes = server.nodes()
    later = submission.cluster.nodes if submission.cluster else ()
    check_cluster(submission.config.resources, nodes, later, submission.memory)
    package = submission.package
    console.print(
        f"{submission.experiment}: {len(submission.cells)} cells to {server.shown} (Ray {server.ray_version}, "
        f"{len(nodes)} nodes), store {mask_uri(submission.store)}",
        highlight=False,
        soft_wrap=True,
    )
    number, running = newest_attempt(server, submission.job)
    if running:
        job = attempt_name(submission.job, number)
        console.print(f"job {job} runs already; attached to it", highlight=False, soft_wrap=True)
        return server, job
    job = start(server, submission, number + 1)
    names = ", ".join(sorted(submission.variables)) or "none"
    console.print(
        f"job {job}: {len(package.names)} files, {size(package.size)}; variables: {names}",
        highlight=False,
        soft_wrap=True,
    )
    return server, job


def attempt_name(job: str, number: int) -> str:
    """The first attempt has the job's own name, later ones a number behind it."""
    return job if number == 1 else f"{job}-{number}"


def newest_attempt(server: JobServer, job: str) -> tuple[int, bool]:
    """(number of the newest attempt, whether it has not ended); (0, False) when there is none."""
    newest, running = 0, False
    for details in server.list_jobs():
        match = re.fullmatch(rf"{re.escape(job)}(?:-(\d+))?", details.submission_id or "")
        if match and (number := int(match[1] or 1)) > newest:
            newest, running = number, not details.status.is_terminal()
    return newest, running


def start(server: JobServer, submission: Submission, number: int) -> str:
    """Start an attempt; when another submitter was faster, it is theirs that counts."""
    from pipeline.submission.job_server import Refused

    job = attempt_name(submission.job, number)
    with tempfile.TemporaryDirectory(prefix="overfill-submit-") as folder:
        archive = Path(folder, "overfill.zip")
        archive.write_bytes(submission.package.content)
        try:
            server.submit_job(
                entrypoint=submission.entrypoint,
                submission_id=job,
                runtime_env={"working_dir": str(archive), "env_vars": job_environment(submission)},
                metadata={"overfill_experiment": submission.experiment, "overfill_store": mask_uri(submission.store)},
                **driver_placement(submission.config.resources.drivers),
            )
        except Refused as error:
            if "already exists" not in str(error):
                raise
    return job


def driver_placement(drivers: str) -> dict[str, Any]:
    """Where Ray starts the job's command, as arguments of its job API; it is the head without any."""
    if drivers == HEAD:
        return {}
    bundle = driver_bundle(drivers)
    return {"entrypoint_memory": DRIVER_BYTES} if drivers == ANYWHERE else {"entrypoint_resources": bundle}


def job_environment(submission: Submission) -> dict[str, str]:
    """Variables of every process of the job: Ray's settings of this project, and what the user named."""
    from pipeline.cluster import ENVIRONMENT

    own = {STOP_VARIABLE: str(math.ceil(submission.config.resources.grace_s) + AFTER_GRACE_S)}
    if (commit := source_commit()) is not None:
        own[COMMIT_VARIABLE] = commit  # the package that travels is no repository
    return ENVIRONMENT | own | submission.variables
