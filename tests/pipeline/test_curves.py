"""Reading a growing metrics.jsonl through everything that can happen to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.curves import Curve


def line(step: int, loss: float = 1.0, time: float | None = None, **more: float) -> str:
    metrics = {"train/loss": loss, **more}
    at = float(step) if time is None else time
    return json.dumps({"step": step, "steps": 100, "tokens": step * 10, "time": at, "metrics": metrics}) + "\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def append(path: Path, text: str) -> None:
    with path.open("a") as stream:
        stream.write(text)


def test_a_stage_that_has_not_logged_yet_has_an_empty_curve(path: Path) -> None:
    curve = Curve(path)
    assert curve.update() == []
    assert curve.last is None
    assert curve.seconds_per_step is None
    assert curve.tokens_per_second is None


def test_each_update_returns_only_what_is_new(path: Path) -> None:
    curve = Curve(path)
    append(path, line(1) + line(2))
    assert [point.step for point in curve.update()] == [1, 2]
    append(path, line(3))
    assert [point.step for point in curve.update()] == [3]
    assert curve.update() == []


def test_a_half_written_last_line_waits_until_it_is_whole(path: Path) -> None:
    curve, text = Curve(path), line(2, loss=0.5)
    append(path, line(1) + text[:25])
    assert [point.step for point in curve.update()] == [1]
    append(path, text[25:])
    assert [point.metrics["train/loss"] for point in curve.update()] == [0.5]
    assert curve.unreadable == 0


def test_a_line_behind_the_stump_of_a_killed_writer_is_recovered(path: Path) -> None:
    curve = Curve(path)
    append(path, line(1) + line(2, loss=9.0)[:60] + line(2, loss=0.5) + line(3))
    assert [point.step for point in curve.update()] == [1, 2, 3]
    assert curve.points[2].metrics["train/loss"] == 0.5


def test_a_stump_alone_on_its_line_is_counted_and_dropped(path: Path) -> None:
    curve = Curve(path)
    append(path, line(1) + line(2)[:30] + "\n" + line(2))
    assert [point.step for point in curve.update()] == [1, 2]
    assert curve.unreadable == 1


def test_after_a_resume_the_later_line_of_a_step_wins_and_the_position_goes_back(path: Path) -> None:
    curve = Curve(path)
    append(path, "".join(line(step, loss=1.0) for step in range(1, 6)))
    append(path, line(3, loss=0.3, time=1000.0) + line(4, loss=0.4, time=1002.0))
    curve.update()
    assert [curve.points[step].metrics["train/loss"] for step in range(1, 6)] == [1.0, 1.0, 0.3, 0.4, 1.0]
    assert curve.last is not None
    assert curve.last.step == 4
    assert curve.seconds_per_step == 2.0


def test_a_validation_line_adds_to_the_training_line_of_its_step(path: Path) -> None:
    curve = Curve(path)
    append(path, line(1, time=1.0) + line(2, loss=0.5, time=2.0))
    validation = {"step": 2, "steps": 100, "tokens": 20, "time": 7.0, "metrics": {"validation/nll": 3.0}}
    append(path, json.dumps(validation) + "\n" + line(3, time=8.0))
    curve.update()
    assert curve.points[2].metrics == {"train/loss": 0.5, "validation/nll": 3.0}
    # The five seconds of the evaluation are nobody's training step.
    assert curve.seconds_per_step == 1.0


@pytest.mark.parametrize("replace", [False, True])
def test_a_cut_or_replaced_file_is_read_from_its_beginning(path: Path, replace: bool) -> None:
    curve = Curve(path)
    append(path, line(1) + line(2) + line(3))
    curve.update()
    if replace:
        other = path.with_name("new")
        other.write_text("".join(line(step, loss=0.1) for step in range(1, 9)))
        other.replace(path)
    else:
        path.write_text(line(1, loss=0.1))
    assert curve.update()[0].metrics["train/loss"] == 0.1
    assert len(curve.points) == (8 if replace else 1)


def test_the_speed_is_not_disturbed_by_a_pause(path: Path) -> None:
    curve = Curve(path)
    append(path, "".join(line(step, time=step * 0.5) for step in range(1, 11)))
    append(path, "".join(line(step, time=300 + step * 0.5) for step in range(11, 16)))
    curve.update()
    assert curve.seconds_per_step == 0.5


def test_a_rare_metric_stays_among_the_latest(path: Path) -> None:
    curve = Curve(path)
    append(path, line(1, **{"validation/nll": 2.0}) + "".join(line(step) for step in range(2, 90)))
    curve.update()
    assert curve.latest_metrics == {"train/loss": 1.0, "validation/nll": 2.0}
    assert curve.tokens_per_second == 10.0
