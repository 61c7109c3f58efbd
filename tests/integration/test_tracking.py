"""Real MLflow on SQLite: runs, resumes, end states."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from synthetic_store import SyntheticStore, outcomes, toy_cells

from pipeline.build import Build
from pipeline.masking import mask_uri
from pipeline.stage import Stage
from pipeline.sweep import Cell
from pipeline.tracking.ledger import Ledger
from pipeline.tracking.server import MlflowServer
from pipeline.tracking.tracker import Tracker, tracking_uri, ui_command

pytestmark = pytest.mark.integration


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: making one runs all of MLflow's migrations, which takes seconds."""
    root = tmp_path_factory.mktemp("mlflow")
    MlflowServer(f"sqlite:///{root}/empty.db", root)
    with sqlite3.connect(root / "empty.db") as connection:
        connection.execute("DELETE FROM experiments")
    return root / "empty.db"


@pytest.fixture
def with_figures(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> SyntheticStore:
    """A store with a migrated database in it."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "runs").mkdir()
    shutil.copy(database, tmp_path / "runs" / "mlflow.db")
    return SyntheticStore(tmp_path / "runs")


@pytest.fixture
def synthetic(with_figures: SyntheticStore, monkeypatch: pytest.MonkeyPatch) -> SyntheticStore:
    """The same for tests that look at runs only: figures take most of a flush."""
    monkeypatch.setattr("pipeline.reporting.plots.write_plots", lambda groups, folder: [])
    return with_figures


def tracker(synthetic: SyntheticStore, cells: list[Cell], **settings: Any) -> Tracker:
    return Tracker(synthetic.store, cells[0].config, cells, interval=0.05, **settings)


def runs(synthetic: SyntheticStore) -> dict[str, Any]:
    """Every run by its name."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri(synthetic.store.root))
    found = client.search_runs([client.get_experiment_by_name("overfill").experiment_id])  # type: ignore[union-attr]
    assert len({run.info.run_name for run in found}) == len(found), "two runs have the same name"
    return {run.info.run_name: run for run in found}


def steps(synthetic: SyntheticStore, run: Any, metric: str) -> list[int]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri(synthetic.store.root))
    return sorted(point.step for point in client.get_metric_history(run.info.run_id, metric))


def test_a_finished_sweep_has_a_parent_and_a_complete_child_per_cell(with_figures: SyntheticStore) -> None:
    synthetic = with_figures
    cells = toy_cells(methods=("full", "overfill", "pruned"))
    teacher = cells[0].stage("teacher")
    assert teacher is not None
    synthetic.log(teacher, range(1, 6), of=5)
    with tracker(synthetic, cells):
        for cell in cells:
            synthetic.finish(cell, outcomes(150))

    found = runs(synthetic)
    assert set(found) == {"toy", *(cell.label for cell in cells)}
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    parent = found.pop("toy")
    assert {run.data.tags["mlflow.parentRunId"] for run in found.values()} == {parent.info.run_id}
    assert "| 0.5 | OverFill |" in parent.data.tags["mlflow.note.content"]
    assert steps(synthetic, parent, "teacher/small/train/loss") == [1, 2, 3, 4, 5]

    finals = [{key for key in run.data.metrics if key.startswith(("eval/", "latency/"))} for run in found.values()]
    assert finals[0] == finals[1] == finals[2]
    overfill = found["small · 0.5 · overfill · seed 0"]
    assert overfill.data.metrics["eval/exact_match"] == 0.75
    assert overfill.data.metrics["latency/tpot_s"] == 0.001
    assert overfill.data.params["ratio"] == "0.5"
    assert all(float(value) >= 0 for name, value in overfill.data.params.items() if name != "method")
    assert overfill.data.tags["teacher"] == "small"
    assert steps(synthetic, overfill, "train/loss") == list(range(1, 11))
    assert artifacts(synthetic, overfill) == {"config.yaml", "result.json", "artifacts.json", "samples.json"}
    figures = {"report/pareto.png", "report/pareto.svg", "report/quality.png", "report/quality.svg"}
    assert artifacts(synthetic, parent) == {
        "experiment.yaml",
        "report/report.md",
        "report/report.json",
        "report/summary.json",
        *figures,
    }


def artifacts(synthetic: SyntheticStore, run: Any) -> set[str]:
    from urllib.parse import urlsplit

    root = Path(urlsplit(run.info.artifact_uri).path)
    assert root.is_relative_to(synthetic.store.root)
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_a_resume_goes_on_in_the_same_runs_and_logs_no_step_twice(synthetic: SyntheticStore) -> None:
    cells = toy_cells(methods=("overfill",))
    training = distill(cells[0])
    for stage in cells[0].stages[: cells[0].stages.index(training)]:
        synthetic.publish(stage, cells[0])
    attempt = synthetic.begin(training)
    synthetic.log(training, range(1, 7))
    with tracker(synthetic, cells):
        pass
    first = runs(synthetic)
    assert {name: run.info.status for name, run in first.items()} == {"toy": "KILLED", cells[0].label: "KILLED"}
    assert steps(synthetic, first[cells[0].label], "train/loss") == [1, 2, 3, 4, 5, 6]

    attempt.interrupt("the machine went away")
    attempt.release()
    # A resume from the checkpoint of step 4 emits steps 5 and 6 again.
    synthetic.log(training, range(5, 11), start=2_000.0)
    with tracker(synthetic, cells):
        synthetic.finish(cells[0])
    second = runs(synthetic)
    assert {name: run.info.run_id for name, run in second.items()} == {name: r.info.run_id for name, r in first.items()}
    assert {run.info.status for run in second.values()} == {"FINISHED"}
    assert steps(synthetic, second[cells[0].label], "train/loss") == list(range(1, 11))
    assert steps(synthetic, second[cells[0].label], "eval/exact_match") == [0]


def test_a_kill_between_the_server_and_the_ledger_leaves_no_duplicate(synthetic: SyntheticStore) -> None:
    cells = toy_cells(methods=("overfill",))
    synthetic.finish(cells[0])
    ledger = synthetic.store.root / "sweeps" / "toy" / "mlflow.jsonl"
    with tracker(synthetic, cells):
        pass
    first = runs(synthetic)
    # What the file looked like before the runs' ids were written down.
    ledger.write_text(ledger.read_text().splitlines(keepends=True)[0])
    with tracker(synthetic, cells):
        pass
    second = runs(synthetic)
    assert {run.info.run_id for run in second.values()} == {run.info.run_id for run in first.values()}
    assert steps(synthetic, second[cells[0].label], "train/loss") == list(range(1, 11))
    assert steps(synthetic, second[cells[0].label], "latency/tpot_s") == [0]


def test_end_states_tell_failed_and_stopped_cells_apart_and_a_retry_mends_them(synthetic: SyntheticStore) -> None:
    cells = toy_cells(methods=("overfill", "pruned", "scratch"))
    done, failed, stopped = cells
    synthetic.finish(done)
    end(synthetic, failed, lambda attempt: attempt.fail("OutOfMemory: 3 GB"))
    end(synthetic, stopped, lambda attempt: attempt.stop("successive halving"))
    with tracker(synthetic, cells):
        pass
    found = runs(synthetic)
    states = {name: run.info.status for name, run in found.items()}
    assert states == {"toy": "FAILED", done.label: "FINISHED", failed.label: "FAILED", stopped.label: "KILLED"}
    assert found[failed.label].data.tags["failure"] == "OutOfMemory: 3 GB"
    assert found[stopped.label].data.tags["state"] == "stopped"

    with tracker(synthetic, cells):
        synthetic.finish(failed)
        synthetic.finish(stopped)
    found = runs(synthetic)
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert found[failed.label].data.tags["failure"] == ""


def end(synthetic: SyntheticStore, cell: Cell, how: Callable[[Build], None]) -> None:
    """An attempt at the student's training that ends without a result."""
    attempt = synthetic.begin(distill(cell))
    how(attempt)
    attempt.release()


DRIVER = """
import sys, time
from pathlib import Path
from synthetic_store import SyntheticStore, toy_cells
from pipeline.tracking.tracker import Tracker
synthetic, cells = SyntheticStore(Path(sys.argv[1])), toy_cells(methods=("overfill",))
for stage in cells[0].stages[:-3]:
    synthetic.publish(stage, cells[0])
attempt = synthetic.begin(cells[0].stage("distill"))
synthetic.log(attempt.stage, range(1, 6))
with Tracker(synthetic.store, cells[0].config, cells, interval=0.05):
    time.sleep(600)
"""


def test_a_driver_killed_with_sigkill_leaves_runs_that_are_marked_killed_and_then_completed(
    synthetic: SyntheticStore,
) -> None:
    cells = toy_cells(methods=("overfill",))
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(synthetic.store.root)], env=os.environ | {"PYTHONPATH": path}
    )
    try:
        wait_until(lambda: entries(synthetic) == ["RUNNING"])
    finally:
        driver.kill()
        driver.wait()
    assert {run.info.status for run in runs(synthetic).values()} == {"RUNNING"}

    with tracker(synthetic, cells):
        wait_until(lambda: entries(synthetic) == ["KILLED"])
        assert runs(synthetic)[cells[0].label].info.status == "KILLED"
        synthetic.log(distill(cells[0]), range(4, 11), start=2_000.0)  # from the checkpoint of step 3
        synthetic.finish(cells[0])
    found = runs(synthetic)
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert steps(synthetic, found[cells[0].label], "train/loss") == list(range(1, 11))


def entries(synthetic: SyntheticStore) -> list[str]:
    """Status of every child run, as the ledger has it."""
    root = synthetic.store.root
    return [entry.status for entry in Ledger.read(root / "sweeps" / "toy", tracking_uri(root)).cells.values()]


def wait_until(true: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def distill(cell: Cell) -> Stage:
    stage = cell.stage("distill")
    assert stage is not None
    return stage


def test_two_trackers_of_one_sweep_write_every_step_once(synthetic: SyntheticStore) -> None:
    cells = toy_cells(methods=("overfill", "pruned"))
    with tracker(synthetic, cells), tracker(synthetic, cells):
        for cell in cells:
            synthetic.finish(cell)
    found = runs(synthetic)
    assert len(found) == 3
    for cell in cells:
        assert steps(synthetic, found[cell.label], "train/loss") == list(range(1, 11))


def test_a_deleted_run_is_replaced_by_a_new_one_with_all_its_steps(synthetic: SyntheticStore) -> None:
    from mlflow import MlflowClient

    cells = toy_cells(methods=("overfill",))
    synthetic.finish(cells[0])
    with tracker(synthetic, cells):
        pass
    client, first = MlflowClient(tracking_uri(synthetic.store.root)), runs(synthetic)
    for run in first.values():
        client.delete_run(run.info.run_id)
    other = toy_cells(methods=("overfill", "pruned"))  # a changed sweep: the server is asked again
    with tracker(synthetic, other):
        pass
    second = runs(synthetic)
    assert second["toy"].info.run_id != first["toy"].info.run_id
    assert steps(synthetic, second[cells[0].label], "train/loss") == list(range(1, 11))


def test_a_server_that_is_killed_and_comes_back_gets_what_it_missed_once(
    synthetic: SyntheticStore, caplog: pytest.LogCaptureFixture
) -> None:
    cells = toy_cells(methods=("overfill",))
    training, uri = distill(cells[0]), f"http://127.0.0.1:{free_port()}"
    for stage in cells[0].stages[: cells[0].stages.index(training)]:
        synthetic.publish(stage, cells[0])
    attempt = synthetic.begin(training)
    synthetic.log(training, range(1, 5))
    server = serve(synthetic, uri)
    try:
        with tracker(synthetic, cells, uri=uri):
            wait_until(lambda: logged(synthetic, cells[0].label) == [1, 2, 3, 4])
            first = {name: run.info.run_id for name, run in runs(synthetic).items()}
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            synthetic.log(training, range(5, 8))
            wait_until(lambda: "it is tried again" in caplog.text)
            server = serve(synthetic, uri)
            wait_until(lambda: logged(synthetic, cells[0].label) == list(range(1, 8)))
            synthetic.log(training, range(8, 11))
            attempt.interrupt("the machine went away")
            attempt.release()
            synthetic.finish(cells[0])
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    found = runs(synthetic)
    assert {name: run.info.run_id for name, run in found.items()} == first
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert steps(synthetic, found[cells[0].label], "train/loss") == list(range(1, 11))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(synthetic: SyntheticStore, uri: str) -> subprocess.Popen[bytes]:
    """MLflow's server over the store's database, once it answers."""
    command, environment = ui_command(synthetic.store.root, int(uri.rpartition(":")[2]))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, env=os.environ | environment, start_new_session=True, **quiet)

    def answers() -> bool:
        assert server.poll() is None, "the server did not start"
        try:
            return urllib.request.urlopen(f"{uri}/health", timeout=2).status == 200
        except OSError:
            return False

    wait_until(answers)
    return server


def logged(synthetic: SyntheticStore, name: str) -> list[int]:
    """Steps that a cell's run has, by the database; none before it has begun."""
    with contextlib.suppress(AttributeError, KeyError):  # no experiment yet, or no run
        return steps(synthetic, runs(synthetic)[name], "train/loss")
    return []


def test_a_server_that_is_away_is_a_warning_without_its_password_and_nothing_is_lost(
    synthetic: SyntheticStore,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")  # so that it is restored
    cells = toy_cells(methods=("overfill",))
    synthetic.finish(cells[0])
    uri = "http://user:hunter2@127.0.0.1:9"
    with caplog.at_level(logging.WARNING), tracker(synthetic, cells, uri=uri, flush=0.5):
        pass
    assert "http://***@127.0.0.1:9" in caplog.text
    assert "hunter2" not in caplog.text + "".join(capfd.readouterr())
    assert not any("hunter2" in path.read_text() for path in (synthetic.store.root / "sweeps").rglob("*.json"))
    with tracker(synthetic, cells):
        pass
    assert steps(synthetic, runs(synthetic)[cells[0].label], "train/loss") == list(range(1, 11))
    assert mask_uri(tracking_uri(synthetic.store.root)) == tracking_uri(synthetic.store.root)
