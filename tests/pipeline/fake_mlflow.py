"""A server of MLflow in memory, and what a driver does with it."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from synthetic_store import SyntheticStore

from pipeline.sweep import Cell
from pipeline.tracking.calls import KEY_TAG, Known, Refused
from pipeline.tracking.content import Value
from pipeline.tracking.ledger import Ledger
from pipeline.tracking.models import DatasetUse, LoggedStudent
from pipeline.tracking.sync import Sweep, Sync


@dataclass
class Run:
    tags: dict[str, str]
    parent: str | None
    status: str = "RUNNING"
    started: float | None = None
    ended: float | None = None
    history: list[tuple[str, int, float]] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    datasets: list[DatasetUse] = field(default_factory=list)
    student: LoggedStudent | None = None


class FakeServer:
    """Keeps what it is told, refuses what MLflow refuses, and can be away."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.away = False
        self.takes_artifacts = True
        self.experiment_tags: dict[str, str] = {}
        self.calls = 0

    def find(self, run: str | None, key: str) -> str | None:
        self._answer()
        if run is not None:
            return run if run in self.runs else None
        return next((name for name, found in self.runs.items() if found.tags[KEY_TAG] == key), None)

    def start(self, name: str, tags: dict[str, str], parent: str | None, started: float | None) -> str:
        self._answer()
        identity = f"{name}#{len(self.runs)}"
        self.runs[identity] = Run(dict(tags), parent, started=started)
        return identity

    def known(self, run: str) -> Known:
        self._answer()
        found = self.runs[run]
        points = sorted(found.history)
        values = {key: value for key, _, value in points}
        return Known({key: step for key, step, _ in points}, set(found.parameters), values, set(found.tags))

    def send(self, run: str, values: Sequence[Value], parameters: dict[str, Any], tags: dict[str, str]) -> None:
        self._answer()
        found = self.runs[run]
        assert not found.parameters.keys() & parameters.keys(), "MLflow refuses to change a parameter"
        if bad := [value.key for value in values if not taken(value.key)]:
            raise Refused(f"Invalid value {bad[0]!r}")
        for value in values:
            assert (value.key, value.step) not in {(key, step) for key, step, _ in found.history}, "logged twice"
            found.history.append((value.key, value.step, value.value))
        found.parameters |= parameters
        found.tags |= tags

    def set_status(self, run: str, status: str, ended: float | None) -> None:
        self._answer()
        self.runs[run].status = status
        self.runs[run].ended = ended

    def upload(self, run: str, files: dict[str, str | Path]) -> None:
        self._answer()
        if not self.takes_artifacts:
            raise PermissionError("no bucket")
        self.runs[run].files |= files

    def describe(self, tags: dict[str, str]) -> str:
        self._answer()
        self.experiment_tags |= tags
        return "7"

    def link(self, run: str, datasets: Sequence[DatasetUse], student: LoggedStudent | None) -> None:
        self._answer()
        self.runs[run].datasets = list(datasets)
        self.runs[run].student = student

    def _answer(self) -> None:
        self.calls += 1
        if self.away:
            raise ConnectionError("the server is away")

    def run(self, cell: Cell) -> Run:
        return next(run for run in self.runs.values() if run.tags.get("identity") == cell.identity)

    @property
    def parent(self) -> Run:
        return next(run for run in self.runs.values() if run.parent is None)


def taken(name: str) -> bool:
    """Whether MLflow takes it for a metric."""
    path = posixpath.normpath(name)
    return bool(re.fullmatch(r"[/\w.\- :]{1,250}", name)) and path == name and not path.startswith((".", "/"))


def new_sync(synthetic: SyntheticStore, cells: list[Cell]) -> Sync:
    """As a new driver has it: the ledger from the file."""
    folder = synthetic.store.root / "sweeps" / "toy"
    sweep = Sweep("toy", "a hypothesis", "name: toy\n", cells, synthetic.store, "abc123+")
    return Sync(sweep, Ledger.read(folder, "server"), lambda ledger, cell: ledger.write(folder, "server", cell))


def push(sync: Sync, server: FakeServer, final: bool = False) -> None:
    sync.push(server, sync.snapshot(), final)
