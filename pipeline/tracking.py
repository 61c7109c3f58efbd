"""MLflow: one parent run per sweep, one child per cell, kept up to date from the store. The only import of mlflow.

A `Tracker` is a thread in the driver that looks at the store every few seconds and tells the server what is new
(`pipeline.tracking_sync` decides what). Since everything comes from files, nothing is lost when the server is away:
what it has not got is sent the next time, and training never waits for it.

One writer per sweep: a file lock that ends with its process. A second driver of the same sweep waits for it, and takes
over when the first is gone.

`import mlflow` takes two to three seconds, and from outside nothing can be done about it: its `__init__` imports
`mlflow.tracking`, which loads pandas for data-set entities (1.8 s), and `mlflow.genai`, which loads FastAPI for its
gateway (0.3 s). So it is imported in the thread, and only when there is something to say: a sweep whose runs are all
at their end state is recognised from the ledger in the store alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from pipeline.record import source_commit
from pipeline.tracking_content import RunStatus, Value
from pipeline.tracking_sync import KEY_TAG, Known, Ledger, Sweep, Sync

if TYPE_CHECKING:
    from pipeline.config import ExperimentConfig
    from pipeline.store import Store
    from pipeline.sweep import Cell

log = logging.getLogger(__name__)

INTERVAL_S = 5.0
LONGEST_INTERVAL_S = 120.0
FLUSH_S = 60.0
"""Longest wait for the server when a run ends."""
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
_SECRET = re.compile(r"(?i)([?&;][^=&;]*(?:password|passwd|secret|token|key|credential)[^=&;]*=)[^&;]+")


def mask_uri(uri: str) -> str:
    """The URI without user names, passwords, and secrets in its query: for logs, files and the screen."""
    scheme, separator, rest = uri.partition("://")
    place, mark, query = rest.partition("?")
    # Up to the last @, since passwords hold unescaped @ and / often enough; a file's path has no user in front.
    if "@" in place and not place.startswith("/"):
        uri = f"{scheme}{separator}***@{place.rpartition('@')[2]}{mark}{query}"
    return _SECRET.sub(r"\1***", uri)


def without_login(uri: str) -> tuple[str, dict[str, str]]:
    """A web address without its user name and password, and those as the variables that MLflow reads them from.

    Left in the address they would be in every error message of every library below. Other URIs stay as they are."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or "@" not in parts.netloc:
        return uri, {}
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    login = {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl(), login


def mask_text(text: str, uri: str) -> str:
    """`text` (an error message) without the secrets of `uri`."""
    text = text.replace(uri, mask_uri(uri))
    with contextlib.suppress(ValueError):  # not a URI that Python can take apart: replaced as a whole above
        password = urlsplit(uri).password
        text = text.replace(password, "***") if password else text
    return re.sub(r"(://)[^\s/@]+@", r"\1***@", text)


def tracking_uri(store_root: Path) -> str:
    """`MLFLOW_TRACKING_URI`, or an SQLite file in the store; absolute, since workers run in other folders."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store_root.absolute()}/mlflow.db"


def ui_command(store_root: Path, port: int = 5000, host: str = "127.0.0.1") -> tuple[list[str], dict[str, str]]:
    """Command and extra environment of a light MLflow server over the store's SQLite file (0.4 GB instead of 1.8)."""
    artifacts = (store_root.absolute() / "mlartifacts").as_uri()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking_uri(store_root)]
    command += ["--artifacts-destination", artifacts, "--host", host, "--port", str(port), "--workers", "1"]
    return command, {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


class Tracker:
    """Keeps MLflow up to date while it is entered, and brings every run to its end state when it is left.

    It never raises into the run that it follows: trouble with the server is a warning in the log."""

    def __init__(
        self,
        store: Store,
        experiment: ExperimentConfig,
        cells: Sequence[Cell],
        uri: str | None = None,
        interval: float = INTERVAL_S,
        flush: float = FLUSH_S,
    ) -> None:
        self.uri = uri or tracking_uri(store.root)
        self._store = store
        self._folder = store.root / "sweeps" / experiment.name
        self._sweep = (experiment, list(cells))
        self._interval, self._flush = interval, flush
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="mlflow", daemon=True)
        self._lock: IO[str] | None = None
        self._sync: Sync | None = None
        self._server: MlflowServer | None = None
        self._complaint = ""

    @property
    def masked_uri(self) -> str:
        """Where the runs are, fit to be shown."""
        return mask_uri(self.uri)

    def __enter__(self) -> Tracker:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Send what is left, set the end states, stop. Waits for the server for at most `flush` seconds."""
        self._end.set()
        self._thread.join(self._flush + 30.0)
        if self._thread.is_alive():
            log.warning("MLflow at %s does not answer; run the sweep again to bring it up to date", self.masked_uri)

    # --- the thread

    def _loop(self) -> None:
        pause = 0.0
        while not self._end.wait(pause):
            longer = min(max(2 * pause, self._interval), LONGEST_INTERVAL_S)
            pause = self._interval if self._tick(final=False) else longer
        deadline = time.monotonic() + self._flush
        while not self._tick(final=True):
            if time.monotonic() > deadline:
                log.warning("MLflow at %s is not up to date; running the sweep again completes it", self.masked_uri)
                break
            time.sleep(min(2.0, self._flush / 4))
        if self._lock is not None:
            self._lock.close()

    def _tick(self, final: bool) -> bool:
        """One look and what follows from it; whether everything arrived."""
        try:
            if not self._alone():
                return True
            sync = self._sync = self._sync or self._make_sync()
            now = sync.snapshot()
            if not sync.up_to_date(now):
                self._server = self._server or MlflowServer(self.uri, self._store.root)
                sync.push(self._server, now, final)
        except Exception as error:  # whatever it is, training goes on, and the next look tries again
            return self._failed(f"{type(error).__name__}: {error}")
        if sync.problems:
            return self._failed("; ".join(sync.problems))
        if self._complaint:
            log.info("MLflow at %s is up to date again", self.masked_uri)
            self._complaint = ""
        return True

    def _failed(self, why: str) -> bool:
        why = mask_text(" ".join(why.split()), self.uri)[:500]
        if why != self._complaint:
            log.warning("MLflow at %s: %s; it is tried again, and nothing is lost meanwhile", self.masked_uri, why)
        self._complaint = why
        return False

    def _alone(self) -> bool:
        """Whether this driver is the sweep's only writer."""
        if self._lock is not None:
            return True
        self._folder.mkdir(parents=True, exist_ok=True)
        stream = (self._folder / "mlflow.lock").open("w")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            return False
        self._lock = stream
        return True

    def _make_sync(self) -> Sync:
        from pipeline.config_io import dump_yaml  # yaml is not needed before

        experiment, cells = self._sweep
        path, server = self._folder / "mlflow.json", self.masked_uri
        text = dump_yaml(experiment.model_dump(mode="json"))
        sweep = Sweep(experiment.name, experiment.description, text, cells, self._store, source_commit())
        return Sync(sweep, Ledger.read(path, server), lambda ledger: ledger.write(path, server))


class MlflowServer:
    """`tracking_sync.Server` by MLflow's client. Constructing it imports mlflow, and migrates a database of our own."""

    def __init__(self, uri: str, store_root: Path) -> None:
        uri, login = without_login(uri)
        os.environ.update(SETTINGS | dict(os.environ) | login)
        from mlflow import MlflowClient

        for name in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(name).setLevel(logging.WARNING)  # a line per migration is nothing for users
        # Two drivers that open a fresh SQLite file at once would both migrate it, and one would crash.
        with _exclusive(store_root / ".mlflow-migration.lock"):
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
        """Highest step of every metric, and the names of the parameters."""
        data = self._client.get_run(run).data
        history = {name: self._client.get_metric_history(run, name) for name in data.metrics}
        return Known({name: max(metric.step for metric in found) for name, found in history.items()}, set(data.params))

    def send(self, run: str, values: Sequence[Value], parameters: dict[str, Any], tags: dict[str, str]) -> None:
        """Log, `BATCH` values at a time and by rising step, so that a kill in between leaves no holes."""
        from mlflow.entities import Metric, Param, RunTag

        metrics = [Metric(v.key, v.value, round(1000 * v.time), v.step) for v in sorted(values, key=lambda v: v.step)]
        told = [Param(name, str(value)) for name, value in parameters.items()]
        described = [RunTag(name, text) for name, text in tags.items()]
        first = BATCH - len(told) - len(described)
        self._client.log_batch(run, metrics[:first], told, described)
        for start in range(first, len(metrics), BATCH):
            self._client.log_batch(run, metrics[start : start + BATCH])

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


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
