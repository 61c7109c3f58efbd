"""A log that cannot be written hides nothing."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from store_toys import toy

from overfill.errors import UserError
from pipeline.attempt_log import AttemptLog
from pipeline.runner import StageFailed, run_graph
from pipeline.stage import StageRun
from pipeline.store import Store
from pipeline.training import worker

FULL = Path("/dev/full")

pytestmark = pytest.mark.skipif(not FULL.exists(), reason="Linux has a device that is always full")


@pytest.fixture
def logger() -> logging.Logger:
    return logging.Logger("apart", logging.INFO)


def test_a_log_on_a_full_disk_says_nothing_and_closes(logger: logging.Logger, capsys: pytest.CaptureFixture[str]):
    handler = AttemptLog(FULL)
    logger.addHandler(handler)
    logger.info("lost")
    handler.close()
    handler.close()
    assert capsys.readouterr().err == ""


def test_a_mistake_in_a_call_is_still_shown(logger: logging.Logger, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    handler = AttemptLog(tmp_path / "log.txt")
    logger.addHandler(handler)
    logger.info("%d", "no number")
    handler.close()
    assert "Logging error" in capsys.readouterr().err


@pytest.mark.parametrize("does", ["write", "fail"])
def test_a_stage_whose_log_does_not_fit_ends_as_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], does: str
):
    stage, store = toy(does=does), Store(tmp_path)
    monkeypatch.setattr("pipeline.build.Build.log_path", FULL)
    if does == "write":
        assert run_graph([stage], store)
    else:
        with pytest.raises(StageFailed, match="the loss is NaN"):
            run_graph([stage], store)
    assert "Logging error" not in capsys.readouterr().err


def test_a_worker_whose_log_does_not_fit_says_why_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def work(_: StageRun) -> dict[str, object]:
        raise UserError("data.path = x.jsonl: no such file; give a corpus")

    monkeypatch.setattr(worker, "import_training_libraries", lambda: None)
    monkeypatch.setattr(worker, "log_file", lambda *_: FULL)
    with pytest.raises(UserError, match="no such file"):
        worker.guarded(work, StageRun(toy(), {}, tmp_path, tmp_path, tmp_path), 0)
    assert "Logging error" not in capsys.readouterr().err
