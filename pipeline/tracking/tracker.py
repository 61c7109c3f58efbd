"""MLflow: one parent run per sweep, one child per cell, kept up to date from the store.

A `Tracker` is a thread in the driver that looks at the store every few seconds and tells the server what is new
(`pipeline.tracking.sync` decides what). Since everything comes from files, nothing is lost when the server is away:
what it has not got is sent the next time, and training never waits for it.

One writer per sweep: a file lock that ends with its process (on an object store, a lease). A second driver of the same
sweep takes over when the first is gone. At its own end it waits until the ledger says that the first has told of every
cell that is done, for the first may have had its last look already, or be dead with a lease that has yet to run out. What
is still being worked on it leaves to whoever works on it.

`import mlflow` takes two to three seconds, and from outside nothing can be done about it: its `__init__` imports
`mlflow.tracking`, which loads pandas for data-set entities (1.8 s), and `mlflow.genai`, which loads FastAPI for its
gateway (0.3 s). So it is imported in the thread, and only when there is something to say: a sweep whose runs are all
at their end state is recognised from the ledger in the store alone.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from pipeline.interruption import EndNow
from pipeline.lease import TTL
from pipeline.masking import mask_text, mask_uri
from pipeline.record import source_commit
from pipeline.tracking.ledger import LEDGER_FILE, Ledger
from pipeline.tracking.sync import Sweep, Sync

if TYPE_CHECKING:
    from pipeline.config import ExperimentConfig
    from pipeline.store import Store
    from pipeline.sweep import Cell
    from pipeline.tracking.server import MlflowServer

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
INTERVAL_S = 5.0
LONGEST_INTERVAL_S = 120.0
FLUSH_S = 60.0
"""Longest wait for the server when a run ends."""
HURRY_S = 10.0
"""The same when the user has asked for the end."""
OTHER_WRITES = f"another driver of this sweep writes to it, or its machine was lost less than {TTL:.0f} s ago"


def tracking_uri(store_root: Path) -> str:
    """`MLFLOW_TRACKING_URI`, or an SQLite file in the store; absolute, since workers run in other folders."""
    return os.environ.get("MLFLOW_TRACKING_URI") or default_uri(store_root)


def default_uri(store_root: Path) -> str:
    """An SQLite file in the store, or in this node's copy of it."""
    return f"sqlite:///{store_root.absolute()}/mlflow.db"


def ui_command(store_root: Path, port: int = 5000, host: str = LOOPBACK) -> tuple[list[str], dict[str, str]]:
    """Command and extra environment of a light MLflow server over the store's SQLite file (0.4 GB instead of 1.8).

    It serves artifacts too, so that those who log to it need not see the store. The database's address may hold a
    password, so it travels in the environment, where other users of the machine do not see it."""
    artifacts = (store_root.absolute() / "mlartifacts").as_uri()
    command = [sys.executable, "-m", "mlflow", "server", "--artifacts-destination", artifacts]
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment["MLFLOW_BACKEND_STORE_URI"] = tracking_uri(store_root)
    if host != LOOPBACK and "MLFLOW_SERVER_ALLOWED_HOSTS" not in os.environ:
        environment["MLFLOW_SERVER_ALLOWED_HOSTS"] = ",".join(_allowed_hosts(host))
    return command, environment


def _allowed_hosts(host: str) -> list[str]:
    """By what names the server may be called: MLflow's own list has addresses of private networks, and no names."""
    names = ["localhost", "127.0.0.1", socket.gethostname(), socket.getfqdn(), host]
    private = ["10.*", "192.168.*", *(f"172.{number}.*" for number in range(16, 32))]
    return [*dict.fromkeys(pattern for name in names for pattern in (name, f"{name}:*")), *private]


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
        self._lock: ExitStack | None = None
        self._sync: Sync | None = None
        self._bystander: Sync | None = None
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
        if kind is not None and issubclass(kind, EndNow):
            self._end.set()  # nobody waits: the next run says what is missing
            return
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._flush = min(self._flush, HURRY_S)
        self.close()

    def close(self) -> None:
        """Send what is left, set the end states, stop. Waits for the server, or for the driver that has the lock, for at
        most `flush` seconds."""
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
                why = "" if self._lock is not None else f" ({OTHER_WRITES})"
                log.warning(
                    "MLflow at %s is not up to date%s; running the sweep again completes it", self.masked_uri, why
                )
                break
            time.sleep(min(2.0, self._flush / 4))
        if self._lock is not None:
            self._lock.close()

    def _tick(self, final: bool) -> bool:
        """One look and what follows from it; whether everything arrived."""
        if final:
            self._store.look_anew()
        try:
            if not self._alone():
                return not final or self._others_tell()
            sync = self._sync = self._sync or self._begin()
            now = sync.snapshot()
            if not sync.up_to_date(now):
                self._server = self._server or self._connect()
                sync.push(self._server, now, final)
                self._keep_ledger()
        except Exception as error:  # whatever it is, training goes on, and the next look tries again
            return self._failed(f"{type(error).__name__}: {error}")
        if sync.problems:
            return self._failed("; ".join(sync.problems))
        if self._complaint:
            log.info("MLflow at %s is up to date again", self.masked_uri)
            self._complaint = ""
        return True

    def _keep_ledger(self) -> None:
        """Where the next driver finds it, on whatever machine; a database beside this store's copy is of this one alone."""
        path = self._folder / LEDGER_FILE
        if path.exists() and self.uri != default_uri(self._store.root):
            self._store.keep(path)

    def _connect(self) -> MlflowServer:
        from pipeline.tracking.server import MlflowServer  # imports mlflow: only when there is something to say

        return MlflowServer(self.uri, self._store.root)

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
        self._lock = self._store.alone(self._folder)
        return self._lock is not None

    def _others_tell(self) -> bool:
        """Whether the driver that has the lock has told of every cell that is at its end."""
        own = self.uri == default_uri(self._store.root)  # whose ledger is not kept
        folder = self._folder if own else self._store.kept(self._folder, LEDGER_FILE)
        sync = self._bystander = self._bystander or self._make_sync()
        sync.ledger = Ledger.read(folder, self.masked_uri)
        return sync.ends_told(sync.snapshot())

    def _begin(self) -> Sync:
        """As the only writer: the ledger comes to this node."""
        self._store.bring(self._folder, LEDGER_FILE)
        return self._make_sync()

    def _make_sync(self) -> Sync:
        from pipeline.config_io import dump_yaml  # yaml is not needed before

        experiment, cells = self._sweep
        folder, server = self._folder, self.masked_uri
        text = dump_yaml(experiment.model_dump(mode="json"))
        sweep = Sweep(experiment.name, experiment.description, text, cells, self._store, source_commit())
        return Sync(sweep, Ledger.read(folder, server), lambda ledger, cell: ledger.write(folder, server, cell))
