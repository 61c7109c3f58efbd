from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest

from overfill.errors import UserError
from pipeline.config import StageResources
from pipeline.stage import Stopped
from pipeline.stages.distill import metrics_of
from pipeline.stop import StopFile
from pipeline.submission.fitting import NodeShape, check_workers
from pipeline.training.launch import _forward_stop


def test_workers_that_the_cluster_could_hold_when_idle_are_accepted() -> None:
    check_workers("distill", StageResources(workers=2, cpus_per_worker=0.5), [NodeShape({"CPU": 2.0})])
    check_workers("distill", StageResources(workers=8, gpus_per_worker=1), [NodeShape({"CPU": 8.0, "GPU": 4.0}, 2)])


@pytest.mark.parametrize(
    ("resources", "cluster", "words"),
    [
        # Two workers on all of two CPUs would leave nothing to read data with: Ray Data would wait for ever.
        (StageResources(workers=2, cpus_per_worker=1.0), {"CPU": 2.0}, "need 2.05 CPU, the cluster has 2"),
        (StageResources(workers=4, gpus_per_worker=1), {"CPU": 16.0, "GPU": 2.0}, "need 4 GPU, the cluster has 2"),
        (StageResources(gpus_per_worker=1), {"CPU": 16.0}, "need 1 GPU, the cluster has 0"),
    ],
)
def test_workers_that_can_never_start_are_refused_with_the_field_to_change(
    resources: StageResources, cluster: dict[str, float], words: str
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        check_workers("distill", resources, [NodeShape(cluster)])
    assert "resources.distill" in str(caught.value)
    assert "lower `workers`" in str(caught.value)


def test_a_request_to_stop_reaches_the_workers_as_a_file(tmp_path: Path) -> None:
    stop = StopFile(tmp_path / "stop")
    assert not stop()
    with _forward_stop(lambda: True, stop):
        deadline = time.monotonic() + 10
        while not stop() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert stop()


def test_a_request_to_stop_survives_a_file_system_that_fails_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipeline.training.launch.STOP_POLL_S", 0.001)
    errors = [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle")]
    stop = StopFile(tmp_path / "stop")
    ask = stop.ask

    def requested() -> bool:
        if len(errors) > 1:
            raise errors.pop()
        return True

    def failing_ask(self: StopFile, why: str = "") -> None:
        if errors:
            raise errors.pop()
        ask(why)

    monkeypatch.setattr(StopFile, "ask", failing_ask)
    with _forward_stop(requested, stop):
        deadline = time.monotonic() + 10
        while not stop() and time.monotonic() < deadline:
            time.sleep(0.001)
    assert stop()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_who_cannot_look_for_a_request_to_stop_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopFile(tmp_path / "stop")
    stop.ask()

    def stale(self: Path, **_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", str(self))

    with monkeypatch.context() as away:
        away.setattr(Path, "stat", stale)
        assert not stop()
    assert stop()


def test_without_a_request_no_file_appears(tmp_path: Path) -> None:
    with _forward_stop(lambda: False, StopFile(tmp_path / "stop")):
        pass
    assert not (tmp_path / "stop").exists()


def test_what_workers_return_becomes_metrics_or_a_stop() -> None:
    assert metrics_of({"metrics": {"train/loss": 1.0}, "stopped": False, "step": 9}) == {"train/loss": 1.0}
    with pytest.raises(Stopped, match="after step 9"):
        metrics_of({"metrics": {}, "stopped": True, "step": 9})
