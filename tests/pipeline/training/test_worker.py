from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training_toys import distill_run

from overfill.errors import UserError
from pipeline.stage import StageRun
from pipeline.training.worker import guarded, log_file


@pytest.fixture
def run(tmp_path: Path) -> StageRun:
    return distill_run(tmp_path, {})


def test_a_users_mistake_in_a_worker_stands_in_its_log_in_words(run: StageRun) -> None:
    def work(run: StageRun) -> dict[str, Any]:
        raise UserError("teacher.model = x: no such folder")

    with pytest.raises(UserError, match="no such folder"):
        guarded(work, run, rank=1)
    assert "no such folder" in log_file(run, 1).read_text()
    assert "Traceback" not in log_file(run, 1).read_text()


def test_any_other_error_is_raised_and_its_traceback_is_logged(run: StageRun) -> None:
    def work(run: StageRun) -> dict[str, Any]:
        raise ZeroDivisionError("of tokens")

    with pytest.raises(ZeroDivisionError):
        guarded(work, run, rank=0)
    assert "in work\n" in log_file(run, 0).read_text()
