"""What MLflow is told, with a server in memory; real MLflow is in tests/integration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_mlflow import FakeServer, new_sync, push, taken
from synthetic_store import TPOT, SyntheticStore, outcomes, toy_cells

from overfill.errors import UserError
from pipeline.commands import serve_ui
from pipeline.masking import mask_text, mask_uri
from pipeline.stage import Stage
from pipeline.store import Store
from pipeline.sweep import Cell
from pipeline.tracking.content import shared_prefix
from pipeline.tracking.server import without_login
from pipeline.tracking.tracker import Tracker, tracking_uri, ui_command
from pipeline.watch import CellView, Snapshot, StageView


@pytest.fixture
def synthetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SyntheticStore:
    monkeypatch.setattr("pipeline.reporting.plots.write_plots", lambda groups, folder: [])
    return SyntheticStore(tmp_path / "runs")


def distill(cell: Cell) -> Stage:
    stage = cell.stage("distill")
    assert stage is not None
    return stage


def test_a_cell_has_a_run_only_once_something_of_its_own_begins(synthetic: SyntheticStore) -> None:
    cells, server = toy_cells(), FakeServer()
    teacher = cells[0].stage("teacher")
    assert teacher is not None
    attempt = synthetic.begin(teacher)
    sync = new_sync(synthetic, cells)
    push(sync, server)
    attempt.release()
    assert len(server.runs) == 1
    attempt = synthetic.begin(distill(cells[0]))
    push(sync, server)
    attempt.release()
    assert server.run(cells[0]).status == "RUNNING"
    assert server.run(cells[0]).parent == next(iter(server.runs))
    assert len(server.runs) == 2


def test_between_two_stages_a_run_stays_running_and_at_the_end_of_the_driver_it_is_killed(
    synthetic: SyntheticStore,
) -> None:
    cells, server = toy_cells(methods=("overfill",)), FakeServer()
    sync = new_sync(synthetic, cells)
    attempt = synthetic.begin(distill(cells[0]))
    push(sync, server)
    attempt.release()
    for stage in cells[0].stages[:-2]:
        synthetic.publish(stage, cells[0])
    push(sync, server)
    assert server.run(cells[0]).status == "RUNNING"
    push(sync, server, final=True)
    assert (server.run(cells[0]).status, server.parent.status) == ("KILLED", "KILLED")


def test_what_a_server_missed_while_it_was_away_arrives_later_once(synthetic: SyntheticStore) -> None:
    cells, server = toy_cells(methods=("overfill",)), FakeServer()
    sync = new_sync(synthetic, cells)
    attempt = synthetic.begin(distill(cells[0]))
    synthetic.log(distill(cells[0]), range(1, 4))
    push(sync, server)
    server.away = True
    synthetic.log(distill(cells[0]), range(4, 8))
    with pytest.raises(ConnectionError):
        push(sync, server)
    server.away = False
    synthetic.log(distill(cells[0]), range(8, 11))
    push(sync, server)
    attempt.release()
    assert [step for key, step, _ in server.run(cells[0]).history if key == "train/loss"] == list(range(1, 11))


@pytest.mark.parametrize("same_driver", [True, False])
@pytest.mark.parametrize("lost", ["message", "answer"])
def test_a_connection_lost_at_any_call_leaves_runs_that_the_next_look_completes(
    synthetic: SyntheticStore, lost: str, same_driver: bool
) -> None:
    cells = toy_cells(methods=("overfill",))
    synthetic.finish(cells[0])
    path = synthetic.store.root / "sweeps" / "toy" / "mlflow.jsonl"
    for call in range(1, 40):
        path.unlink(missing_ok=True)
        server = LosingServer(call, lost)
        sync = new_sync(synthetic, cells)
        try:
            push(sync, server, final=True)
        except ConnectionError:
            assert server.done == call
        if server.done < call:
            return
        sync = sync if same_driver else new_sync(synthetic, cells)
        push(sync, server, final=True)
        if sync.problems:
            push(sync, server, final=True)
        assert len(server.runs) == 2, f"call {call}"
        run = server.run(cells[0])
        assert (run.status, server.parent.status) == ("FINISHED", "FINISHED")
        assert [step for key, step, _ in run.history if key == "train/loss"] == list(range(1, 11))
        assert {"config.yaml", "result.json"} <= run.files.keys()
        assert new_sync(synthetic, cells).up_to_date(sync.snapshot())
    pytest.fail("a push makes more calls than were tried")


class LosingServer(FakeServer):
    """Loses one call: the message, so that nothing happens, or the answer, so that it happens and nobody knows."""

    def __init__(self, call: int, lost: str) -> None:
        super().__init__()
        self.call, self.lost, self.done = call, lost, 0

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return self._losing(found) if name in ("find", "start", "known", "send", "set_status", "upload") else found

    def _losing(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.done += 1
            if self.done == self.call and self.lost == "message":
                raise ConnectionError("cut off")
            answer = method(*arguments)
            if self.done == self.call:
                raise ConnectionError("cut off")
            return answer

        return call


def test_a_finished_sweep_is_recognised_without_the_server(synthetic: SyntheticStore) -> None:
    cells, server = toy_cells(), FakeServer()
    for cell in cells:
        synthetic.finish(cell)
    push(new_sync(synthetic, cells), server, final=True)
    again = new_sync(synthetic, cells)
    assert again.up_to_date(again.snapshot())
    changed = new_sync(synthetic, toy_cells(methods=("overfill", "pruned", "scratch")))
    assert not changed.up_to_date(changed.snapshot())


def test_a_run_says_which_results_were_built_anew_with_other_values_and_no_longer_once_they_agree_again(
    synthetic: SyntheticStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cell,), server = toy_cells(methods=("overfill",)), FakeServer()
    benchmark = cell.stage("benchmark")
    assert benchmark is not None
    synthetic.finish(cell)
    push(new_sync(synthetic, [cell]), server, final=True)
    run = server.run(cell)
    assert "superseded" not in run.tags
    for tpot, changed in ((0.002, True), (0.002, True), (TPOT["overfill"], False)):
        monkeypatch.setitem(TPOT, "overfill", tpot)
        path = synthetic.store.payload(benchmark) / "latency.json"
        path.write_bytes(path.read_bytes() + b" ")  # altered, so that it is built anew
        synthetic.publish(benchmark, cell, anew=True)
        push(new_sync(synthetic, [cell]), server, final=True)
        assert [step for key, step, _ in run.history if key == "latency/tpot_s"] == [0]
        assert json.loads(str(run.files["result.json"]))[0]["tpot_s"] == tpot
        assert ("latency/tpot_s" in run.tags["superseded"].split(", ")) is changed
        assert "eval/exact_match" not in run.tags["superseded"]
        assert ("Built anew" in run.tags["mlflow.note.content"]) is changed
        assert run.status == "FINISHED"
    assert run.tags["superseded"] == ""


@pytest.mark.parametrize("deleted", [False, True])
def test_a_run_that_a_killed_driver_left_ends_although_its_cell_is_no_longer_in_the_file(
    synthetic: SyntheticStore, deleted: bool
) -> None:
    (stays, goes), server = toy_cells(methods=("overfill", "pruned")), FakeServer()
    attempt = synthetic.begin(distill(goes))
    push(new_sync(synthetic, [stays, goes]), server)
    left = server.run(goes)
    attempt.release()
    if deleted:
        server.runs = {name: run for name, run in server.runs.items() if run is not left}
    synthetic.finish(stays)
    again = new_sync(synthetic, [stays])
    push(again, server)
    assert not again.up_to_date(again.snapshot())
    push(again, server, final=True)
    assert (left.status, left.tags["state"]) == (("RUNNING", "running") if deleted else ("KILLED", "interrupted"))
    other = new_sync(synthetic, [stays])
    assert other.up_to_date(other.snapshot())
    attempt = synthetic.begin(distill(goes))  # it comes back
    push(new_sync(synthetic, [stays, goes]), server)
    attempt.release()
    assert server.run(goes).status == "RUNNING"


def test_runs_have_the_times_of_the_work_and_not_of_its_tracking(synthetic: SyntheticStore) -> None:
    cells, server = toy_cells(methods=("full", "overfill")), FakeServer()
    for cell in cells:
        synthetic.finish(cell)
    push(new_sync(synthetic, cells), server, final=True)
    records = [record for stage in cells[1].stages if (record := synthetic.store.record(stage)) is not None]
    own = [record for record in records if record.stage in ("calibrate", "prune", "distill", "evaluate", "benchmark")]
    run = server.run(cells[1])
    assert run.started == min(record.started for record in own)
    assert run.ended == max(record.finished for record in own)
    assert server.parent.started is not None
    assert server.parent.ended is not None
    assert server.parent.started <= run.started <= run.ended <= server.parent.ended


def test_metrics_arrive_although_the_artifact_store_refuses_and_artifacts_are_tried_again(
    synthetic: SyntheticStore,
) -> None:
    cells, server = toy_cells(methods=("overfill",)), FakeServer()
    synthetic.finish(cells[0], outcomes(100))
    server.takes_artifacts = False
    sync = new_sync(synthetic, cells)
    push(sync, server, final=True)
    assert any("no bucket" in problem for problem in sync.problems)
    run = server.run(cells[0])
    assert run.status == "FINISHED"
    assert ("eval/exact_match", 0, 0.5) in run.history
    assert not sync.up_to_date(sync.snapshot())
    server.takes_artifacts = True
    push(sync, server, final=True)
    assert sync.problems == []
    assert sync.up_to_date(sync.snapshot())
    assert set(run.files) == {"config.yaml", "result.json", "artifacts.json", "samples.json"}
    places = json.loads(str(run.files["artifacts.json"]))[0]
    assert len(places["evaluate"]["sha256"]["samples.parquet"]) == 64


def test_final_metrics_have_the_same_names_in_every_cell_and_parameters_are_numbers(synthetic: SyntheticStore) -> None:
    cells, server = toy_cells(methods=("full", "overfill", "pruned", "scratch")), FakeServer()
    for cell in cells:
        synthetic.finish(cell)
    push(new_sync(synthetic, cells), server, final=True)
    promised = {"eval/exact_match", "eval/exact_match_low", "eval/perplexity", "latency/ttft_s", "latency/tpot_s"}
    for cell in cells:
        run = server.run(cell)
        assert promised <= {key for key, _, _ in run.history}
        assert run.parameters.pop("method") == cell.method
        assert all(isinstance(value, int | float) for value in run.parameters.values())
        assert {"ratio", "hidden", "intermediate"} <= set(run.parameters)
        assert run.tags["commit"] == "abc123+"
    assert server.run(cells[1]).parameters["seed"] == 0


def test_the_curve_of_a_shared_stage_is_logged_once_on_the_parent(synthetic: SyntheticStore) -> None:
    cells, server = toy_cells(), FakeServer()
    teacher = cells[0].stage("teacher")
    assert teacher is not None
    synthetic.log(teacher, range(1, 4))
    for cell in cells:
        synthetic.finish(cell)
    sync = new_sync(synthetic, cells)
    push(sync, server)
    push(sync, server, final=True)
    curves = [(key, step) for key, step, _ in server.parent.history]
    assert curves == [(f"teacher/small/train/{name}", step) for step in (1, 2, 3) for name in ("loss", "tokens")]


@pytest.mark.parametrize("label", ["llama+math", ".", "..", "a%b:c", "\N{SNOWMAN}", "x" * 240])
def test_curves_of_a_teacher_of_any_name_have_names_that_mlflow_takes(synthetic: SyntheticStore, label: str) -> None:
    one, other = (labelled(synthetic, label + more) for more in ("", "?"))
    for stages in ([one], [one, other]):
        now = Snapshot(0.0, (CellView(toy_cells()[0], tuple(stages), ()),))
        names = {shared_prefix(stage, now) + "train/loss" for stage in stages}
        assert len(names) == len(stages)
        assert all(taken(name) for name in names), names


def labelled(synthetic: SyntheticStore, label: str) -> StageView:
    return StageView(f"{len(label):012}", "teacher", label, synthetic.store.root, "done")


def test_a_name_that_mlflow_refuses_is_told_and_keeps_neither_report_nor_end_states_from_it(
    synthetic: SyntheticStore,
) -> None:
    cells, server = toy_cells(methods=("overfill",)), FakeServer()
    teacher = cells[0].stage("teacher")
    assert teacher is not None
    synthetic.log(teacher, range(1, 4), **{"train/a+b": 1.0})
    synthetic.finish(cells[0])
    sync = new_sync(synthetic, cells)
    push(sync, server, final=True)
    assert ["train/a+b" in problem for problem in sync.problems] == [True]
    assert {run.status for run in server.runs.values()} == {"FINISHED"}
    assert "report/report.md" in server.parent.files
    assert not sync.up_to_date(sync.snapshot())
    push(sync, server, final=True)
    assert len(server.runs) == 2


@pytest.mark.parametrize(
    ("uri", "masked"),
    [
        ("sqlite:////runs/mlflow.db", "sqlite:////runs/mlflow.db"),
        ("https://mlflow.example.org/x", "https://mlflow.example.org/x"),
        ("https://ann:s3cret@mlflow.example.org:5000/x", "https://***@mlflow.example.org:5000/x"),
        ("https://token@host", "https://***@host"),
        ("postgresql+psycopg2://u:p@ss/w@db:5432/mlflow", "postgresql+psycopg2://***@db:5432/mlflow"),
        ("mysql://db/mlflow?user=u&password=s3cret&ssl=1", "mysql://db/mlflow?user=u&password=***&ssl=1"),
        ("databricks", "databricks"),
    ],
)
def test_secrets_are_masked_in_uris(uri: str, masked: str) -> None:
    assert mask_uri(uri) == masked


def test_a_login_goes_to_mlflow_by_environment_and_not_in_the_address() -> None:
    uri, login = without_login("https://ann:s%40cret@host:5000/x?y=1")
    assert uri == "https://host:5000/x?y=1"
    assert login == {"MLFLOW_TRACKING_USERNAME": "ann", "MLFLOW_TRACKING_PASSWORD": "s@cret"}
    for other in ("https://host/x", "postgresql://u:p@db/mlflow", "sqlite:////runs/mlflow.db"):
        assert without_login(other) == (other, {})


def test_secrets_are_masked_in_error_messages() -> None:
    uri = "https://ann:s3cret@host:5000"
    text = "HTTPSConnectionPool: https://ann:s3cret@host:5000/api refused s3cret"
    assert "s3cret" not in mask_text(text, uri)
    assert mask_text("nothing to hide", uri) == "nothing to hide"


def test_the_default_server_is_an_absolute_sqlite_file_in_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(Path("runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    command, environment = ui_command(Path("runs"), port=1234)
    assert environment["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert command[command.index("--port") + 1] == "1234"
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    assert tracking_uri(Path("runs")) == "http://elsewhere"


def test_a_server_for_others_is_told_by_what_names_and_hides_its_databases_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://ann:s3cret@db/mlflow")
    monkeypatch.delenv("MLFLOW_SERVER_ALLOWED_HOSTS", raising=False)
    command, environment = ui_command(tmp_path, host="mlflow.internal")
    assert "s3cret" not in " ".join(command)  # which every user of the machine can read
    allowed = environment["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert {"mlflow.internal", "mlflow.internal:*", "10.*", "localhost:*"} <= set(allowed)
    assert "*" not in allowed
    assert "MLFLOW_SERVER_ALLOWED_HOSTS" not in ui_command(tmp_path)[1]
    monkeypatch.setenv("MLFLOW_SERVER_ALLOWED_HOSTS", "mine")
    assert "MLFLOW_SERVER_ALLOWED_HOSTS" not in ui_command(tmp_path, host="mlflow.internal")[1]
    with pytest.raises(UserError, match="--host"):
        serve_ui(Store(tmp_path), None, 5000, serve=True)


def test_the_same_database_under_another_address_gets_no_second_set_of_runs(synthetic: SyntheticStore) -> None:
    (cell,), server = toy_cells(methods=("overfill",)), FakeServer()
    synthetic.finish(cell)
    place = synthetic.store.root
    for name in ("runs", "moved"):
        place = place.rename(place.with_name(name))
        tracker = Tracker(Store(place), cell.config, [cell], f"sqlite:///{place}/mlflow.db", interval=0.02)
        tracker._connect = lambda: server  # type: ignore[method-assign, assignment, return-value]
        with tracker:
            pass
    assert len(server.runs) == 2
    assert {run.status for run in server.runs.values()} == {"FINISHED"}


NOTHING_TO_DO = """
import sys
from pathlib import Path
from synthetic_store import toy_cells
from pipeline.store import Store
from pipeline.tracking.tracker import Tracker
cells = toy_cells(methods=("overfill",))
with Tracker(Store(Path(sys.argv[1])), cells[0].config, cells):
    pass
print("mlflow" in sys.modules)
"""


def test_a_run_with_nothing_to_do_does_not_import_mlflow(
    synthetic: SyntheticStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    cells = toy_cells(methods=("overfill",))
    synthetic.finish(cells[0])
    push(Tracker(synthetic.store, cells[0].config, cells)._make_sync(), FakeServer(), final=True)
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[3])])
    done = subprocess.run(
        [sys.executable, "-c", NOTHING_TO_DO, str(synthetic.store.root)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.stdout.strip() == "False"
