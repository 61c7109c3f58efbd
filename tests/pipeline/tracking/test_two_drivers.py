"""Who tells MLflow when a sweep has two drivers, and how long the other one waits at its end."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fake_mlflow import FakeServer, push
from synthetic_store import SyntheticStore, toy_cells

from pipeline.masking import mask_uri
from pipeline.objects.store import ObjectStore
from pipeline.store import Store
from pipeline.sweep import Cell
from pipeline.tracking.tracker import Tracker

URI = "https://mlflow.example.org"


@pytest.fixture
def synthetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SyntheticStore:
    monkeypatch.setattr("pipeline.reporting.plots.write_plots", lambda groups, folder: [])
    return SyntheticStore(tmp_path / "runs")


@pytest.fixture
def cell() -> Cell:
    return toy_cells(methods=("overfill",))[0]


def tracker(store: Store, cell: Cell, server: FakeServer, **settings: Any) -> Tracker:
    found = Tracker(store, cell.config, [cell], URI, interval=0.02, **settings)
    found._connect = lambda: server  # type: ignore[method-assign, assignment, return-value]
    return found


def folder(store: Store) -> Path:
    return store.root / "sweeps" / "toy"


def seconds_to_leave(leaving: Tracker) -> float:
    began = time.monotonic()
    with leaving:
        pass
    return time.monotonic() - began


def test_what_was_finished_behind_the_last_look_of_the_other_driver_is_told_by_this_one(
    synthetic: SyntheticStore, cell: Cell
) -> None:
    server, lock = FakeServer(), synthetic.store.alone(folder(synthetic.store))
    assert lock is not None
    first = tracker(synthetic.store, cell, server)._make_sync()
    push(first, server, final=True)  # the last look
    synthetic.finish(cell)
    threading.Timer(0.2, lock.close).start()
    with tracker(synthetic.store, cell, server, flush=4.0):
        pass
    assert {run.status for run in server.runs.values()} == {"FINISHED"}


def test_a_driver_leaves_at_once_when_the_other_has_told_of_all_that_is_at_its_end(
    synthetic: SyntheticStore, caplog: pytest.LogCaptureFixture
) -> None:
    (done, going), server = toy_cells(methods=("overfill", "pruned")), FakeServer()
    lock = synthetic.store.alone(folder(synthetic.store))
    assert lock is not None
    synthetic.finish(done)
    training = going.stage("distill")
    assert training is not None
    attempt = synthetic.begin(training)
    first, second = (Tracker(synthetic.store, done.config, [done, going], URI, interval=0.02) for _ in range(2))
    push(first._make_sync(), server)
    assert seconds_to_leave(second) < 10.0
    attempt.release()
    lock.close()
    assert not caplog.records


def test_a_driver_that_the_other_does_not_let_through_says_so_when_its_time_is_up(
    synthetic: SyntheticStore, cell: Cell, caplog: pytest.LogCaptureFixture
) -> None:
    lock = synthetic.store.alone(folder(synthetic.store))
    assert lock is not None
    synthetic.finish(cell)
    with caplog.at_level(logging.WARNING):
        assert seconds_to_leave(tracker(synthetic.store, cell, FakeServer(), flush=0.2)) < 10.0
    lock.close()
    (record,) = caplog.records
    assert "not up to date (another driver of this sweep" in record.message


def test_on_an_object_store_the_ledger_of_another_machine_is_read_and_this_ones_own_left_alone(
    tmp_path: Path, cell: Cell, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OVERFILL_CACHE", str(tmp_path / "cache"))
    store = ObjectStore(f"file://{tmp_path}/bucket")
    lost = "sweeps/toy/tracker/attempts/0001"
    owner = {"host": "lost/1/1", "pid": 7, "started": 1, "token": "t"}
    store.bucket.create(f"{lost}/lease.json", json.dumps({"owner": owner}).encode())
    store.bucket.write(f"{lost}/beat.json", json.dumps({"count": 3, "seconds": 9.0, "state": "held"}).encode())
    own = folder(store) / "mlflow.jsonl"
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_bytes(b"what a process of this machine writes\n")
    entry = {"run": "r", "status": "KILLED", "content": ""}
    line = {"server": mask_uri(URI), "cell": cell.identity, "entry": entry}
    store.bucket.write("sweeps/toy/mlflow.jsonl", json.dumps(line).encode() + b"\n")
    leaving = tracker(store, cell, FakeServer(), flush=0.2)
    leaving._tick(final=True)
    assert leaving._bystander is not None
    assert {name: found.run for name, found in leaving._bystander.ledger.cells.items()} == {cell.identity: "r"}
    assert own.read_bytes() == b"what a process of this machine writes\n"
