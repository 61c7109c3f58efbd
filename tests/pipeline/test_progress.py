"""What people read while a sweep runs."""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from synthetic_store import SyntheticStore, toy_cells

from overfill.errors import UserError
from pipeline.build import Build
from pipeline.progress import Progress, count, duration, events, live_view, print_status, quiet_lines
from pipeline.stage import Stage
from pipeline.sweep import Cell
from pipeline.watch import Snapshot, Watch, snapshot


@pytest.fixture
def synthetic(tmp_path: Path) -> SyntheticStore:
    return SyntheticStore(tmp_path / "runs")


def distill(cell: Cell) -> Stage:
    stage = cell.stage("distill")
    assert stage is not None
    return stage


def text_of(*renderables: object, width: int = 120, terminal: bool = False) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=terminal, color_system=None)
    for renderable in renderables:
        console.print(renderable, soft_wrap=True)
    return console.file.getvalue()  # type: ignore[attr-defined]


def between(synthetic: SyntheticStore, cells: list[Cell], happens: Callable[[], object]) -> list[str]:
    before = snapshot(synthetic.store, cells)
    happens()
    return [line.plain[9:] for line in events(before, snapshot(synthetic.store, cells))]


def test_starting_failing_and_finishing_make_one_line_each(synthetic: SyntheticStore) -> None:
    cells = toy_cells()
    attempts: list[Build] = []
    started = between(synthetic, cells, lambda: attempts.append(synthetic.begin(distill(cells[0]))))
    assert started == ["started     distill small · 0.5 · overfill · seed 0"]

    log_path = attempts[0].log_path
    failed = between(synthetic, cells, lambda: (attempts[0].fail("boom"), attempts[0].release()))
    assert failed == [f"failed      distill small · 0.5 · overfill · seed 0 - boom (log: {log_path})"]

    synthetic.log(distill(cells[0]), range(1, 11))
    (done,) = between(synthetic, cells, lambda: synthetic.publish(distill(cells[0]), cells[0]))
    assert done.startswith("done        distill small · 0.5 · overfill · seed 0 in ")
    assert done.endswith(" loss 1.0000")
    assert between(synthetic, cells, lambda: None) == []


def test_a_shared_stage_goes_by_its_own_label(synthetic: SyntheticStore) -> None:
    cells = toy_cells()
    teacher = cells[0].stage("teacher")
    assert teacher is not None
    assert between(synthetic, cells, lambda: synthetic.publish(teacher, cells[0]))[0].startswith(
        "done        teacher small in "
    )


def test_the_first_look_counts_what_is_reused_and_lists_nothing(synthetic: SyntheticStore) -> None:
    cells = toy_cells()
    assert events(None, snapshot(synthetic.store, cells)) == []
    synthetic.finish(cells[0])
    (line,) = events(None, snapshot(synthetic.store, cells))
    assert line.plain.endswith("reused      8 of 10 stages are in the store already")


def test_the_live_lines_show_position_loss_speed_and_time_left(synthetic: SyntheticStore) -> None:
    cells = toy_cells()
    synthetic.publish(cells[0].stages[0], cells[0])
    attempt = synthetic.begin(distill(cells[0]))
    synthetic.log(distill(cells[0]), range(1, 5), of=100)
    shown = text_of(live_view(snapshot(synthetic.store, cells)), terminal=True)
    attempt.release()
    for part in ("small · 0.5 · overfill · seed 0", "4/100", "loss 2.500", "100 tok/s", "1:36 min left", "0/2 done"):
        assert part in shown


def test_a_bracket_in_an_error_is_text_and_not_markup(synthetic: SyntheticStore) -> None:
    cells = toy_cells()
    attempt = synthetic.begin(distill(cells[0]))
    attempt.fail("KeyError: [/bold] [red]")
    attempt.release()
    console = Console(width=100, file=io.StringIO(), force_terminal=False)
    print_status("toy", snapshot(synthetic.store, cells), console)
    assert "KeyError: [/bold] [red]" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_status_table_has_a_row_per_cell_and_the_log_of_each_failure(synthetic: SyntheticStore) -> None:
    cells = toy_cells(methods=("overfill", "pruned", "scratch"))
    synthetic.finish(cells[0])
    attempt = synthetic.begin(distill(cells[1]))
    attempt.fail("boom")
    attempt.release()
    console = Console(width=100, file=io.StringIO(), force_terminal=False)
    print_status("toy", snapshot(synthetic.store, cells), console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0].startswith("toy: 1/3 done · 1 failed")
    states = {line.split("  ")[0]: line.split()[8] for line in lines[2:5]}
    assert states == {cell.label: state for cell, state in zip(cells, ("done", "failed", "waiting"), strict=True)}
    assert str(attempt.log_path) in lines[-1]


def test_a_stage_whose_builder_seems_to_be_dead_is_silent_and_not_running(synthetic: SyntheticStore) -> None:
    cells = toy_cells(methods=("overfill",))
    attempt = synthetic.begin(distill(cells[0]))
    lease = attempt.lease.folder / "lease.json"
    lease.write_text(lease.read_text().replace(attempt.lease.owner.host, "elsewhere/1/2"))
    os.utime(lease, (1.0, 1.0))
    console = Console(width=160, file=io.StringIO(), force_terminal=False)
    print_status("toy", snapshot(synthetic.store, cells), console)
    attempt.release()
    rows = [line for line in console.file.getvalue().splitlines() if "small · 0.5" in line]  # type: ignore[attr-defined]
    assert [" silent " in row for row in rows] == [True, True]
    assert not any(" running " in row for row in rows)


def test_status_says_of_every_open_stage_where_it_runs_since_when_and_why_it_does_not(
    synthetic: SyntheticStore,
) -> None:
    cells = toy_cells(methods=("overfill", "pruned", "scratch"))
    running, stopped, interrupted = (synthetic.begin(distill(cell)) for cell in cells)
    synthetic.log(distill(cells[0]), range(1, 5), of=100)
    stopped.stop("successive halving at step 4")
    interrupted.interrupt("asked to end: stopped after step 7")
    for attempt in (stopped, interrupted):
        attempt.release()
    console = Console(width=140, file=io.StringIO(), force_terminal=False)
    print_status("toy", snapshot(synthetic.store, cells), console)
    running.release()
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    at = shown.index("stage")
    (row,) = (line for line in shown[at:].splitlines() if "process" in line)
    assert row.startswith("distill  small · 0.5 · overfill · seed 0")
    assert " running " in row
    assert " 4/100 " in row
    assert row.rstrip().endswith(f"process {os.getpid()} on {socket.gethostname()}")
    ends = [line for line in shown.splitlines() if " - " in line]
    assert ends == [
        "stopped     distill small · 0.5 · pruned · seed 0 - successive halving at step 4",
        "interrupted distill small · 0.5 · scratch · seed 0 - asked to end: stopped after step 7",
    ]


def test_quiet_lines_are_said_only_while_something_runs(synthetic: SyntheticStore) -> None:
    cells = toy_cells()
    assert quiet_lines(snapshot(synthetic.store, cells)) == []
    attempt = synthetic.begin(distill(cells[0]))
    synthetic.log(distill(cells[0]), range(1, 5), of=100)
    lines = [line.plain for line in quiet_lines(snapshot(synthetic.store, cells))]
    attempt.release()
    assert "distill  small · 0.5 · overfill · seed 0  step 4/100  loss 2.500  100 tok/s  1:36 min left" in lines[0]
    assert "0/2 done · 1 running" in lines[1]


@pytest.mark.parametrize("terminal", [True, False])
def test_the_thread_reports_what_happens_between_entering_and_leaving(
    synthetic: SyntheticStore, terminal: bool
) -> None:
    cells = toy_cells(methods=("overfill",))
    console = Console(width=150, file=io.StringIO(), force_terminal=terminal, color_system=None)
    with Progress(synthetic.store, cells, console):
        synthetic.finish(cells[0])
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("done        evaluate small · 0.5 · overfill · seed 0") == 1
    assert shown.count("done        prune") == 1


@pytest.mark.parametrize("error", [OSError("the file server is away"), UserError("record.json: cannot be read")])
def test_a_look_that_fails_is_made_again(
    synthetic: SyntheticStore, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    console = Console(file=io.StringIO(), width=200)
    cells, snapshots = toy_cells(), Watch.snapshot
    failures = [error]

    def look(watch: Watch) -> Snapshot:
        if failures:
            raise failures.pop()
        return snapshots(watch)

    monkeypatch.setattr(Watch, "snapshot", look)
    monkeypatch.setattr("pipeline.progress.INTERVAL_S", 0.01)
    with Progress(synthetic.store, cells, console) as progress:
        pass
    assert progress.waiting() == len(cells)


def test_a_display_that_breaks_does_not_take_the_run_with_it(
    synthetic: SyntheticStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cells = toy_cells()

    def broken(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("pipeline.watch.Watch.snapshot", broken)
    with Progress(synthetic.store, cells, Console(file=io.StringIO())):
        pass
    assert "progress display ended early" in caplog.text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (0, "0 s"),
        (0.4, "0.4 s"),
        (59.4, "59 s"),
        (59.6, "1:00 min"),
        (185, "3:05 min"),
        (3599.7, "1:00 h"),
        (7800, "2:10 h"),
        (86400 * 4.1, "4.1 d"),
    ],
)
def test_durations_read_naturally(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(7, "7"), (950, "950"), (12_345, "12.3k"), (4.5e6, "4.5M"), (3e9, "3.0G")])
def test_counts_read_naturally(value: float, text: str) -> None:
    assert count(value) == text
