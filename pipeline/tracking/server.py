"""MLflow's client as `calls.Server`: the only import of mlflow, at the first call."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from overfill.errors import UserError
from pipeline.tracking.calls import KEY_TAG, Known, Refused
from pipeline.tracking.content import RunStatus, Value
from pipeline.tracking.models import DatasetUse, LoggedStudent
from pipeline.tracking.pyfunc_model import MAX_NEW_TOKENS, REFERENCE_FILE

EXPERIMENT = "overfill"
BATCH = 1000
"""Values of one log_batch call; MLflow takes no more."""
SETTINGS = {
    # MLflow waits up to seven times two minutes for a server that is away; here the next look is the next attempt.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # It prints the URI of every run that ends.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def without_login(uri: str) -> tuple[str, dict[str, str]]:
    """A web address without its user name and password, and those as the variables that MLflow reads them from.

    Left in the address they would be in every error message of every library below. Other URIs stay as they are."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or "@" not in parts.netloc:
        return uri, {}
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    login = {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl(), login


class MlflowServer:
    """`calls.Server` by MLflow's client. Constructing it imports mlflow, and migrates a database of our own."""

    def __init__(self, uri: str, store_root: Path) -> None:
        uri, login = without_login(uri)
        os.environ.update(SETTINGS | dict(os.environ) | login)
        from mlflow import MlflowClient

        logging.getLogger("alembic").setLevel(logging.WARNING)  # a line per migration is nothing for users
        # A full disk is a hundred lines of traceback there, at every look; the tracker says it in one.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
        # Two drivers that open a fresh SQLite file at once would both migrate it, and one would crash.
        with _exclusive(store_root / ".mlflow-migration.lock"):
            self._uri = uri
            self._client = MlflowClient(tracking_uri=uri)
            self._experiment = self._experiment_id(uri, store_root)

    def _experiment_id(self, uri: str, store_root: Path) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        found = self._client.get_experiment_by_name(name)
        if found is None:
            place = (store_root / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
            return self._client.create_experiment(name, artifact_location=place)
        if found.lifecycle_stage == "deleted":
            raise RuntimeError(f"the experiment {name!r} is deleted; restore it, or set MLFLOW_EXPERIMENT_NAME")
        return found.experiment_id

    def find(self, run: str | None, key: str) -> str | None:
        """The run of that id, or with that key tag; None when there is none or it is deleted."""
        from mlflow.exceptions import MlflowException

        if run is not None:
            try:
                return run if self._client.get_run(run).info.lifecycle_stage == "active" else None
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return None
        matching = self._client.search_runs([self._experiment], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        return matching[0].info.run_id if matching else None

    def start(self, name: str, tags: dict[str, str], parent: str | None, started: float | None) -> str:
        """Begin a run under `parent`."""
        nested = {} if parent is None else {"mlflow.parentRunId": parent}
        begun = None if started is None else round(1000 * started)
        return self._client.create_run(self._experiment, begun, {**tags, **nested}, name).info.run_id

    def known(self, run: str) -> Known:
        """Highest step and last value of every metric, and the names of parameters and tags."""
        data = self._client.get_run(run).data
        history = {name: self._client.get_metric_history(run, name) for name in data.metrics}
        steps = {name: max(metric.step for metric in found) for name, found in history.items()}
        return Known(steps, set(data.params), dict(data.metrics), set(data.tags))

    def send(self, run: str, values: Sequence[Value], parameters: dict[str, Any], tags: dict[str, str]) -> None:
        """Log, `BATCH` values at a time and by rising step, so that a kill in between leaves no holes."""
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.exceptions import MlflowException

        metrics = [Metric(v.key, v.value, round(1000 * v.time), v.step) for v in sorted(values, key=lambda v: v.step)]
        told = [Param(name, str(value)) for name, value in parameters.items()]
        described = [RunTag(name, text) for name, text in tags.items()]
        first = BATCH - len(told) - len(described)
        try:
            self._client.log_batch(run, metrics[:first], told, described)
            for start in range(first, len(metrics), BATCH):
                self._client.log_batch(run, metrics[start : start + BATCH])
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            raise Refused(str(error)) from error

    def set_status(self, run: str, status: RunStatus, ended: float | None) -> None:
        """`ended` counts for end states only."""
        if status == "RUNNING":
            self._client.update_run(run, status)
        else:
            self._client.set_terminated(run, status, None if ended is None else round(1000 * ended))

    def upload(self, run: str, files: dict[str, str | Path]) -> None:
        """Store artifacts; a name may have one folder in front."""
        with tempfile.TemporaryDirectory(prefix="overfill-mlflow-") as folder:
            for name, content in files.items():
                target = Path(folder, name)
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(content.read_bytes() if isinstance(content, Path) else content.encode())
            self._client.log_artifacts(run, folder)

    def describe(self, tags: dict[str, str]) -> str:
        """Tag the experiment; returns its id."""
        for name, value in tags.items():
            self._client.set_experiment_tag(self._experiment, name, value)
        return self._experiment

    def link(self, run: str, datasets: Sequence[DatasetUse], student: LoggedStudent | None) -> None:
        """Data sets as inputs of the run, the student as its output; MLflow itself keeps a data set once."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        self._client.log_inputs(
            run,
            [
                DatasetInput(
                    Dataset(use.name, use.digest, use.source_type, use.source, profile=use.profile),
                    [InputTag("mlflow.data.context", use.context)],
                )
                for use in datasets
            ],
        )
        if student is not None and not self._client.get_run(run).outputs.model_outputs:
            self._log_student(run, student)

    def register(self, run: str, name: str) -> str | None:
        """The version of the registered model `name` that is the run's student, made if need be; None without a student.

        Raises UserError for what MLflow refuses."""
        import mlflow
        from mlflow.exceptions import MlflowException

        mlflow.set_tracking_uri(self._uri)  # the registry looks logged models up by a client of its own
        logged = self._client.get_run(run).outputs.model_outputs
        if not logged:
            return None
        try:
            return self._version(run, logged[0].model_id, name)
        except MlflowException as error:
            raise UserError(f"--as {name}: MLflow refuses ({str(error).splitlines()[0][:200]})") from error

    def _version(self, run: str, model: str, name: str) -> str:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        versions = self._client.search_model_versions(f"name = '{name}'")
        same = next((version for version in versions if version.run_id == run), None)
        found = same or self._client.create_model_version(name, f"models:/{model}", run_id=run, model_id=model)
        return str(found.version)

    def _log_student(self, run: str, student: LoggedStudent) -> None:
        from mlflow.entities import LoggedModelOutput

        key = f"tags.`{KEY_TAG}` = '{run}'"
        found = self._client.search_logged_models([self._experiment], key, max_results=1)
        model = (
            found[0]
            if found
            else self._client.create_logged_model(
                self._experiment, student.name, run, {KEY_TAG: run}, student.parameters, "overfill"
            )
        )
        with tempfile.TemporaryDirectory(prefix="overfill-mlflow-") as folder:
            write_model(Path(folder), student, model.model_id, run)
            self._client.log_model_artifacts(model.model_id, folder)
        self._client.finalize_logged_model(model.model_id, "READY")
        self._client.log_outputs(run, [LoggedModelOutput(model.model_id, 0)])


def write_model(folder: Path, student: LoggedStudent, model_id: str, run: str) -> None:
    """Write a pyfunc model that is loaded by a module of ours: no pickle, no copy of the weights."""
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    for name, text in student.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "requirements.txt").write_text("overfill\n", encoding="utf-8")
    signature = ModelSignature(
        Schema([ColSpec(DataType.string)]),
        Schema([ColSpec(DataType.string)]),
        ParamSchema([ParamSpec("max_new_tokens", DataType.long, MAX_NEW_TOKENS)]),
    )
    model = Model(run_id=run, model_id=model_id, signature=signature)
    pyfunc.add_to_model(model, loader_module="pipeline.tracking.pyfunc_model", data=REFERENCE_FILE)
    model.save(str(folder / "MLmodel"))


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
