"""What a watcher sees of a store while stages start, log, fail and finish."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_store import SyntheticStore, toy_cells

from pipeline.stage import Stage
from pipeline.sweep import Cell
from pipeline.watch import CellView, Watch, snapshot


@pytest.fixture
def synthetic(tmp_path: Path) -> SyntheticStore:
    return SyntheticStore(tmp_path / "runs")


def stage_of(cell: Cell, name: str) -> Stage:
    stage = cell.stage(name)
    assert stage is not None
    return stage


def only(synthetic: SyntheticStore, cell: Cell) -> CellView:
    return snapshot(synthetic.store, [cell]).cells[0]


def test_a_cell_goes_from_missing_over_running_to_done(synthetic: SyntheticStore) -> None:
    cell = toy_cells(methods=("overfill",))[0]
    assert only(synthetic, cell).state == "missing"

    attempt = synthetic.begin(cell.stages[0])
    view = only(synthetic, cell)
    assert view.state == "running"
    assert view.current is not None
    assert view.current.name == cell.stages[0].name
    assert {stage.state for stage in view.stages[1:]} == {"waiting"}
    attempt.interrupt("test")
    attempt.release()

    synthetic.publish(cell.stages[0], cell)
    assert only(synthetic, cell).state == "waiting"
    synthetic.finish(cell)
    assert only(synthetic, cell).state == "done"


def test_a_running_stage_tells_its_position_speed_and_time_left(synthetic: SyntheticStore) -> None:
    cell = toy_cells(methods=("overfill",))[0]
    stage = stage_of(cell, "distill")
    attempt = synthetic.begin(stage)
    synthetic.log(stage, range(1, 5), of=10)
    view = next(view for view in only(synthetic, cell).stages if view.name == "distill")
    attempt.release()
    assert (view.state, view.step, view.steps) == ("running", 4, 10)
    assert view.metrics == {"train/loss": 2.5}
    assert view.tokens_per_second == 100.0
    assert view.seconds_left == 6.0
    assert view.since is not None


@pytest.mark.parametrize(("how", "state"), [("fail", "failed"), ("stop", "stopped"), ("interrupt", "interrupted")])
def test_an_attempt_that_ends_without_a_result_says_why_and_where_its_log_is(
    synthetic: SyntheticStore, how: str, state: str
) -> None:
    cell = toy_cells(methods=("overfill",))[0]
    attempt = synthetic.begin(stage_of(cell, "distill"))
    getattr(attempt, how)("out of memory")
    attempt.release()
    view = only(synthetic, cell)
    assert view.state == state
    assert view.failure == "out of memory"
    assert view.current is not None
    assert view.current.log == attempt.log_path
    assert view.current.since is not None


def test_a_failure_is_forgotten_while_the_next_attempt_runs(synthetic: SyntheticStore) -> None:
    cell = toy_cells(methods=("overfill",))[0]
    attempt = synthetic.begin(stage_of(cell, "distill"))
    attempt.fail("out of memory")
    attempt.release()
    second = synthetic.begin(stage_of(cell, "distill"))
    view = only(synthetic, cell)
    second.release()
    assert (view.state, view.failure) == ("running", None)


def test_a_damaged_artifact_counts_as_failed_and_names_the_way_out(synthetic: SyntheticStore) -> None:
    cell = toy_cells(methods=("overfill",))[0]
    synthetic.finish(cell)
    (synthetic.store.payload(stage_of(cell, "evaluate")) / "metrics.json").write_text("{}")
    view = only(synthetic, cell)
    assert view.state == "failed"
    assert view.failure is not None
    assert "metrics.json" in view.failure
    assert "run again to build it anew" in view.failure


def test_a_cell_is_done_with_its_results_even_when_what_they_came_from_is_gone(synthetic: SyntheticStore) -> None:
    import shutil

    cell = toy_cells(methods=("overfill",))[0]
    synthetic.finish(cell)
    shutil.rmtree(synthetic.store.folder(stage_of(cell, "distill")))
    assert only(synthetic, cell).state == "done"


def test_stages_that_cells_share_are_no_cells_own(synthetic: SyntheticStore) -> None:
    views = snapshot(synthetic.store, toy_cells(methods=("overfill", "pruned"))).cells
    assert [[stage.name for stage in view.own] for view in views] == [["distill", "evaluate"]] * 2
    alone = snapshot(synthetic.store, toy_cells(methods=("overfill",))).cells[0]
    assert alone.own == alone.stages


def test_a_watch_reads_only_what_is_new_and_keeps_the_curve_of_a_finished_stage(synthetic: SyntheticStore) -> None:
    cell = toy_cells(methods=("overfill",))[0]
    stage, watch = stage_of(cell, "distill"), Watch(synthetic.store, [cell])
    synthetic.log(stage, range(1, 4))
    watch.snapshot()
    curve = watch.curve(stage.identity)
    assert curve is not None
    assert sorted(curve.points) == [1, 2, 3]
    synthetic.log(stage, range(4, 6))
    synthetic.publish(stage, cell)
    watch.snapshot()
    assert watch.curve(stage.identity) is curve
    assert sorted(curve.points) == [1, 2, 3, 4, 5]


def test_time_left_needs_a_known_duration_of_every_open_kind_of_stage(synthetic: SyntheticStore) -> None:
    cells = toy_cells(methods=("overfill", "pruned"))
    assert snapshot(synthetic.store, cells).seconds_left is None
    synthetic.finish(cells[0])
    seen = snapshot(synthetic.store, cells)
    done = {stage.name: stage.seconds for stage in seen.cells[0].stages}
    expected = [done[name] for name in ("distill", "evaluate")]
    assert seen.seconds_left == pytest.approx(sum(value for value in expected if value is not None))
    synthetic.finish(cells[1])
    assert snapshot(synthetic.store, cells).seconds_left == 0


def test_looking_at_a_store_needs_neither_ray_nor_torch_nor_mlflow() -> None:
    heavy = "{'ray', 'torch', 'mlflow', 'matplotlib', 'pandas', 'pyarrow', 'transformers'}"
    modules = "pipeline.watch, pipeline.progress, pipeline.tracking.tracker, pipeline.reporting.tables"
    code = f"import sys, {modules}; print(*({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
