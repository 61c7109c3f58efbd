"""Publishing: at whatever instant a process dies, there is nothing or a whole artifact."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from store_toys import toy

import pipeline.build
from pipeline.build import Build
from pipeline.lease import LeaseLost
from pipeline.record import libraries, plain_metrics, read_json, source_commit, write_json
from pipeline.resume import Facts
from pipeline.runner import StageFailed, run_graph
from pipeline.stage import StageRun
from pipeline.store import Store

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)])}
STAGE = toy(layers=2)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def build(store: Store) -> Iterator[Build]:
    begun = begin(store)
    yield begun
    begun.release()


def begin(store: Store) -> Build:
    begun = Build.begin(store, STAGE, store.facts(STAGE))
    assert begun is not None
    return begun


def disk_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def outcome(build: Build) -> dict[str, object]:
    return read_json(build.lease.folder / "outcome.json") or {}


def run_of(build: Build) -> StageRun:
    return StageRun(build.stage, {}, build.staging, build.progress, build.lease.folder)


def test_who_has_lost_the_lease_ends_its_own_workers_and_not_those_of_its_successor(store: Store, build: Build):
    (build.progress / "stop").touch()  # of a version that had one flag for all attempts
    successor = Build.begin(store, STAGE, Facts(lease="dead", attempt=1))
    assert successor is not None
    lost, held = run_of(build).stop_flag(), run_of(successor).stop_flag()
    lost.ask("lost the lease")
    assert (lost(), held()) == (True, False)
    asked = store.stop_flag(STAGE)
    assert asked == held, "a scheduler asks who builds now"
    successor.release()


def test_a_process_killed_at_any_line_leaves_nothing_or_a_whole_artifact_and_the_next_one_finishes():
    """Every fifth line of the store's code, from taking the lease to releasing it, in a child each."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # what is tested is order, not the disk
    with tempfile.TemporaryDirectory(dir=memory) as root:
        command = [sys.executable, str(HERE / "store_toys.py"), "die_at_every_line", root, "5"]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert found["nothing"] > 30
    assert found["whole"] > 10


def test_a_payload_is_published_whole_with_its_record(store: Store, build: Build):
    (build.staging / "weights").write_bytes(b"123")
    assert store.record(STAGE) is None
    record = build.publish({"n": 1})
    assert store.verify(STAGE, full=True) == record
    assert not build.staging.exists()
    assert outcome(build)["status"] == "done"


def test_who_has_lost_the_lease_publishes_nothing(store: Store, build: Build):
    successor = Build.begin(store, STAGE, Facts(lease="dead", attempt=1, error="silent"))
    assert successor is not None
    build.staging.mkdir(exist_ok=True)
    (build.staging / "weights").write_bytes(b"old")
    with pytest.raises(LeaseLost):
        build.publish({})
    assert store.record(STAGE) is None
    (successor.staging / "weights").write_bytes(b"new")
    successor.publish({})
    successor.release()
    assert (store.payload(STAGE) / "weights").read_bytes() == b"new"


def test_a_loser_that_wakes_up_just_before_the_rename_cannot_replace_what_was_published(store: Store, build: Build):
    successor = Build.begin(store, STAGE, Facts(lease="dead", attempt=1))
    assert successor is not None
    build.staging.mkdir()
    (build.staging / "weights").write_bytes(b"old")
    build.lease.require = lambda: None  # type: ignore[method-assign]  # it had looked in time
    (successor.staging / "weights").write_bytes(b"new")
    successor.publish({})
    successor.release()
    with pytest.raises(LeaseLost, match="published or its staging removed meanwhile"):
        build.publish({})
    assert (store.payload(STAGE) / "weights").read_bytes() == b"new"
    assert store.verify(STAGE) is not None


def test_a_rename_that_fails_for_another_reason_is_a_failure_and_no_takeover(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    """Or the stage would be built again and again, for nobody else ever publishes it."""
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if target.name == "payload":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(StageFailed, match="Device or resource busy"):
        run_graph([STAGE], store)
    facts = store.facts(STAGE)
    assert (facts.artifact, facts.outcome, facts.attempt, facts.lease) == ("missing", "failed", 1, "free")


@pytest.mark.parametrize("call", ["write_json", "sync", "remember_digest"])
def test_what_cannot_be_written_beside_a_published_payload_does_not_undo_it(
    store: Store, monkeypatch: pytest.MonkeyPatch, call: str
):
    build = begin(store)
    (build.staging / "weights").write_bytes(b"123")
    with monkeypatch.context() as full:
        write_text = pipeline.build.write_text  # the last before the rename

        def then_full(path: Path, text: str) -> None:
            write_text(path, text)
            full.setattr(pipeline.build, call, disk_full)

        full.setattr(pipeline.build, "write_text", then_full)
        record = build.publish({})
        build.release()
    assert store.verify(STAGE) == record
    assert store.status(STAGE).state == "done"
    assert store.facts(STAGE).lease == "free"


def test_why_a_stage_failed_is_told_though_its_outcome_cannot_be_written(store: Store, monkeypatch: pytest.MonkeyPatch):
    real = pipeline.build.write_json
    monkeypatch.setattr(
        pipeline.build,
        "write_json",
        lambda path, content: (disk_full if path.name == "outcome.json" else real)(path, content),
    )
    with pytest.raises(StageFailed, match="the loss is NaN"):
        run_graph([toy(does="fail")], store)


def test_a_lease_is_given_back_whatever_comes_before(store: Store, monkeypatch: pytest.MonkeyPatch):
    build = begin(store)
    monkeypatch.setattr(build, "interrupt", disk_full)
    with pytest.raises(OSError, match="No space left"):
        build.release()
    assert store.facts(STAGE).lease == "free"


def test_the_end_of_a_lease_that_cannot_be_written_undoes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as full:
        full.setattr(pipeline.build.Build, "_end", lambda *_: full.setattr("os.pwrite", disk_full))
        run_graph([STAGE], store)
    assert store.verify(STAGE) is not None


def test_a_loser_that_publishes_first_is_found_in_its_successors_way(store: Store, build: Build):
    (build.staging / "weights").write_bytes(b"old")
    build.publish({})
    assert Build.begin(store, STAGE, Facts(lease="dead", attempt=1)) is None
    assert store.verify(STAGE) is not None
    assert list(run_graph([STAGE], store)) == [STAGE.identity]


def test_a_link_in_a_payload_is_refused(store: Store, build: Build, tmp_path: Path):
    (build.staging / "weights").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="weights is a link; an artifact holds its files itself"):
        build.publish({})
    assert store.record(STAGE) is None


def test_what_nfs_keeps_of_a_removed_file_is_no_part_of_the_artifact(store: Store, build: Build):
    (build.staging / "shards").mkdir()
    for name in ("weights", ".nfs00012", "shards/.nfs00013"):
        (build.staging / name).write_bytes(b"123")
    assert set(build.publish({}).files) == {"weights"}
    assert store.verify(STAGE) is not None
    (store.payload(STAGE) / ".nfs00012").unlink()
    assert store.verify(STAGE) is not None


def test_a_failed_attempt_leaves_its_outcome_and_its_progress_and_no_payload(store: Store):
    build = begin(store)
    (build.staging / "half").touch()
    (build.progress / "kept").touch()
    build.fail("ValueError: no")
    build.release()
    facts = store.facts(STAGE)
    assert (facts.artifact, facts.outcome, facts.error) == ("missing", "failed", "ValueError: no")
    assert (store.progress(STAGE) / "kept").exists()
    assert not list(store.folder(STAGE).glob("staging-*"))


def test_an_attempt_that_ends_without_an_outcome_was_interrupted(store: Store):
    build = begin(store)
    build.release()
    assert outcome(build)["status"] == "interrupted"


def test_a_stop_is_remembered_until_the_next_attempt_begins(store: Store):
    build = begin(store)
    build.stop("stopped at step 100")
    build.release()
    assert store.facts(STAGE).stopped == "stopped at step 100"
    assert json.loads((store.progress(STAGE) / "stopped.json").read_text())["attempt"] == 1
    again = begin(store)
    assert not (store.progress(STAGE) / "stopped.json").exists()
    again.release()


def test_attempts_are_numbered_and_their_durations_add_up(store: Store):
    for _ in range(2):
        build = begin(store)
        build.fail("no")
        build.release()
        write_json(build.lease.folder / "outcome.json", outcome(build) | {"seconds": 10.0})
    build = begin(store)
    assert build.lease.folder.name == "0003"
    record = build.publish({})
    build.release()
    assert record.attempt == 3
    assert record.seconds < 10.0
    assert record.seconds_all_attempts == pytest.approx(20.0 + record.seconds)


def test_what_a_dead_attempt_left_is_cleared_and_written_down(store: Store):
    dead = begin(store)
    (dead.staging / "half").touch()
    dead.log_path.write_text("...")
    dead.lease.release()  # as if the process were gone: no outcome
    build = begin(store)
    assert read_json(dead.lease.folder / "outcome.json") == {
        "status": "interrupted",
        "error": "it ended without a word",
        "log": str(dead.log_path),
        "started": dead.started,
        "ended": pytest.approx(dead.log_path.stat().st_mtime, abs=0.001),
        "seconds": pytest.approx(0.0, abs=5.0),
    }
    assert [path.name for path in build.folder.glob("staging-*")] == ["staging-0002"]
    build.release()


@pytest.mark.parametrize(
    ("log_at", "seconds"), [(17.0, 17.0), (86_400.0, 20.0), (-86_400.0, 15.0)], ids=["steady", "forward", "back"]
)
def test_a_clock_that_jumps_does_not_lengthen_or_shorten_what_a_dead_attempt_took(
    store: Store, log_at: float, seconds: float
):
    dead = begin(store)
    dead.log_path.touch()
    os.utime(dead.log_path, (dead.started + log_at, dead.started + log_at))
    dead.lease.release()  # as if the process were gone: no outcome
    file = dead.lease.folder / "lease.json"
    write_json(file, (read_json(file) or {}) | {"beat": f"{3:012d}"})
    build = begin(store)
    assert build.publish({}).seconds_all_attempts == pytest.approx(seconds, abs=1.0)
    build.release()
    assert outcome(dead)["ended"] == pytest.approx(dead.started + seconds, abs=1.0)


def test_step_checkpoints_are_removed_after_publishing_and_curves_stay(store: Store, build: Build):
    (build.progress / "steps" / "step-00000001-abcdef").mkdir(parents=True)
    (build.progress / "metrics.jsonl").write_text("{}\n")
    build.publish({})
    assert [path.name for path in store.progress(STAGE).iterdir()] == ["metrics.jsonl"]


def test_a_folder_that_is_deleted_under_a_running_attempt_ends_it_without_a_trace(
    store: Store, caplog: pytest.LogCaptureFixture
):
    build = begin(store)
    shutil.rmtree(build.folder)
    with caplog.at_level(logging.WARNING):
        build.fail("ValueError: no")
    build.release()
    assert "was removed while it was running" in caplog.text
    assert store.status(STAGE).state == "missing"


def test_metrics_are_plain_numbers_and_strings_or_named():
    given = {"a": np.float32(0.5), "b": np.int64(3), "c": "x", "d": 1}
    assert plain_metrics(given) == {"a": 0.5, "b": 3, "c": "x", "d": 1}
    assert plain_metrics(None) == {}
    with pytest.raises(TypeError, match="metric 'bad' is a list"):
        plain_metrics({"bad": [1]})


def test_a_metric_that_is_not_finite_survives_the_record(store: Store, build: Build):
    build.publish({"loss": float("nan"), "worst": float("inf")})
    record = store.record(STAGE)
    assert record is not None
    assert repr(record.metrics) == "{'loss': nan, 'worst': inf}"


def test_a_json_file_is_written_whole_or_not_at_all(tmp_path: Path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert read_json(tmp_path / "a.json") == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert read_json(tmp_path / "absent.json") is None


def test_writers_of_the_same_file_do_not_trip_over_each_other(tmp_path: Path):
    """Threads stand for processes of one pid on several hosts: a temporary name must be nobody else's."""

    def write(letter: str) -> list[None]:
        return [write_json(tmp_path / "a.json", {"letter": letter * 1000}) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, "abcd"))
    assert read_json(tmp_path / "a.json")["letter"] in [letter * 1000 for letter in "abcd"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_provenance_names_versions_and_a_commit_without_importing_anything():
    script = (
        "import sys; from pipeline.record import libraries, source_commit\n"
        "print('torch' in libraries(), source_commit(), [m for m in ('torch', 'ray', 'mlflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == str("torch" in libraries())
    assert done.stdout.strip().endswith("[]")
    assert source_commit() is None or len((source_commit() or "").rstrip("+")) == 40
