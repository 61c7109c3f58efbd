from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.train import ControllerError, WorkerGroupError
from training_toys import distill_run

from overfill.errors import UserError
from pipeline.stage import StageRun
from pipeline.training.launch import one_line
from pipeline.training.worker import guarded, log_file


@pytest.fixture
def run(tmp_path: Path) -> StageRun:
    return distill_run(tmp_path, {})


def test_a_users_mistake_in_a_worker_is_a_result_and_stands_in_its_log(run: StageRun) -> None:
    def work(run: StageRun) -> dict[str, Any]:
        raise UserError("teacher.model = x: no such folder")

    assert guarded(work, run, rank=1) == {"user_error": "teacher.model = x: no such folder"}
    assert "no such folder" in log_file(run, 1).read_text()


def test_any_other_error_is_raised_and_its_traceback_is_logged(run: StageRun) -> None:
    def work(run: StageRun) -> dict[str, Any]:
        raise ZeroDivisionError("of tokens")

    with pytest.raises(ZeroDivisionError):
        guarded(work, run, rank=0)
    assert "in work\n" in log_file(run, 0).read_text()


def test_the_worker_that_failed_by_itself_is_named_not_its_peers() -> None:
    lost = RuntimeError("[gloo] Connection closed by peer [10.0.0.1]:1234")
    own = ValueError("no token in batch 7\nand more")
    assert one_line(WorkerGroupError("...", {0: lost, 1: own})) == "worker 1: ValueError: no token in batch 7"
    assert one_line(WorkerGroupError("...", {0: lost})).startswith("worker 0: RuntimeError: [gloo]")


def test_a_dead_worker_and_a_failed_controller_are_told_in_their_first_line() -> None:
    dead = WorkerGroupError("...", {0: RayActorError(error_msg="The actor died unexpectedly.\n\tclass_name")})
    assert one_line(dead) == "worker 0: The actor died unexpectedly."
    assert one_line(ControllerError(TimeoutError("no CPUs"))) == "TimeoutError: no CPUs"
