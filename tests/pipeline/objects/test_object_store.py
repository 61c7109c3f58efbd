"""Artifacts on an object store: found, built once, published by the record, read through the node's copy."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from store_toys import chain, toy

from overfill.errors import UserError
from pipeline.curves import Curve
from pipeline.lease import LeaseLost
from pipeline.objects.bucket import Bucket
from pipeline.objects.build import ObjectBuild
from pipeline.objects.mirror import CACHE_VARIABLE
from pipeline.objects.places import local_place
from pipeline.objects.site import Courier
from pipeline.objects.store import ObjectStore, open_at
from pipeline.resume import Facts
from pipeline.runner import RunContext, StageFailed, run_graph
from pipeline.stage import StageRun
from pipeline.store import AlteredArtifact, Store

HERE = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)])}


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/bucket"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def store(url: str) -> ObjectStore:
    return ObjectStore(url)


def another_node(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "another node"))
    return ObjectStore(url)


def context(journal: Path, **options: Any) -> RunContext:
    resources: Mapping[str, Any] = dict.fromkeys(("teacher", "distill", "evaluate"), {"journal": str(journal)})
    return RunContext(resources=resources, poll=0.01, **options)


def built(journal: Path) -> list[str]:
    return [line.split()[0] for line in journal.read_text().splitlines()] if journal.exists() else []


def waited(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def begin(store: ObjectStore, stage: Any, facts: Facts | None = None) -> ObjectBuild:
    build = ObjectBuild.start(store, stage, facts or store.facts(stage), None)
    assert isinstance(build, ObjectBuild)
    return build


def deliver(build: ObjectBuild, content: str) -> None:
    run = StageRun(build.stage, {}, build.staging, build.progress, build.lease.folder, site=build.site)
    with run.on_this_node() as here:
        (here.staging / "weights").write_text(content)


def test_a_graph_runs_once_and_another_node_reads_it(
    store: ObjectStore, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stages, journal = chain(), tmp_path / "journal"
    first = run_graph(stages, store, context(journal))
    assert built(journal) == ["teacher", "distill", "evaluate"]
    elsewhere = another_node(url, tmp_path, monkeypatch)
    assert run_graph(stages, elsewhere, context(journal)) == first
    assert built(journal) == ["teacher", "distill", "evaluate"]
    read = json.loads((elsewhere.payload(stages[2]) / "read" / "inputs.json").read_text())
    assert json.loads(read["student"]) == {"loss": {"kv": 3.0}}
    assert [elsewhere.status(stage).state for stage in stages] == ["done"] * 3


def test_who_has_lost_the_lease_publishes_nothing(store: ObjectStore):
    stage = toy()
    loser = begin(store, stage)
    deliver(loser, "old")
    successor = begin(store, stage, Facts(lease="dead", attempt=1, error="silent"))
    deliver(successor, "new")
    with pytest.raises(LeaseLost, match="another process has taken over"):
        loser.publish({})
    loser.interrupt("lost")
    assert store.record(stage) is None
    successor.publish({})
    for build in (loser, successor):
        build.release()
    assert (store.payload(stage) / "weights").read_text() == "new"


def test_a_loser_that_wakes_up_after_its_look_finds_the_record_and_leaves_it(store: ObjectStore):
    stage = toy()
    loser = begin(store, stage)
    deliver(loser, "old")
    successor = begin(store, stage, Facts(lease="dead", attempt=1))
    deliver(successor, "new")
    deliver(loser, "old")  # its successor had removed that
    loser.lease.require = lambda: None  # type: ignore[method-assign]  # it had looked in time
    successor.publish({})
    with pytest.raises(LeaseLost, match="published meanwhile"):
        loser.publish({})
    for build in (loser, successor):
        build.release()
    assert (store.payload(stage) / "weights").read_text() == "new"


def test_a_loser_that_publishes_first_is_found_in_its_successors_way(store: ObjectStore):
    stage = toy()
    loser = begin(store, stage)
    deliver(loser, "old")
    loser.publish({})
    assert ObjectBuild.start(store, stage, Facts(lease="dead", attempt=1), None) is None
    loser.release()
    assert store.verify(stage) is not None
    assert store.facts(stage).outcome == "interrupted"
    assert store.facts(stage).artifact == "ok"


def test_of_many_that_want_to_build_one_does(url: str, tmp_path: Path):
    journal = tmp_path / "journal"
    threads = [
        threading.Thread(target=run_graph, args=([chain()[2]], ObjectStore(url), context(journal))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert built(journal) == ["teacher", "distill", "evaluate"]


def test_who_waits_sees_what_another_has_finished(store: ObjectStore, url: str, tmp_path: Path):
    build = begin(store, toy())
    found: dict[str, Any] = {}
    waits: list[str] = []
    told = context(tmp_path / "journal", on_wait=lambda stage, action: waits.append(action.reason))
    waiter = threading.Thread(target=lambda: found.update(run_graph([toy()], ObjectStore(url), told)))
    waiter.start()
    waited(lambda: bool(waits))
    deliver(build, "by the first")
    record = build.publish({})
    build.release()
    waiter.join(20)
    assert found == {toy().identity: record}


def test_a_second_driver_on_another_node_leaves_mlflow_to_the_first(
    store: ObjectStore, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    elsewhere = another_node(url, tmp_path, monkeypatch)
    first = store.alone(store.root / "sweeps" / "toy")
    assert first is not None
    assert elsewhere.alone(elsewhere.root / "sweeps" / "toy") is None
    first.close()
    second = elsewhere.alone(elsewhere.root / "sweeps" / "toy")
    assert second is not None
    second.close()


def test_a_delivery_that_fails_half_way_leaves_no_artifact_and_the_next_attempt_none_of_its_files(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    upload = Bucket.upload

    def fails(self: Bucket, path: Path, key: str) -> None:
        if key.endswith("inputs.json"):
            raise OSError(errno.EIO, "connection reset", key)
        upload(self, path, key)

    with monkeypatch.context() as broken:
        broken.setattr(Bucket, "upload", fails)
        with pytest.raises(StageFailed, match="connection reset"):
            run_graph([toy()], store, context(tmp_path / "journal"))
    assert store.record(toy()) is None
    assert store.status(toy()).state == "failed"
    assert not [key for key in store.bucket.list() if "/payload-" in key]
    (record,) = run_graph([toy()], store, context(tmp_path / "journal")).values()
    assert record.attempt == 2
    assert {key.split("/")[2] for key in store.bucket.list() if "/payload-" in key} == {"payload-0002"}


def test_files_that_no_record_names_are_removed_by_the_next_attempt(store: ObjectStore):
    stage = toy()
    killed = begin(store, stage)
    deliver(killed, "whole, but its process is killed before the record")
    killed._abandon = lambda *_: None  # type: ignore[method-assign]
    killed.release()
    assert any("/payload-0001/" in key for key in store.bucket.list())
    successor = begin(store, stage)
    deliver(successor, "new")
    successor.publish({})
    successor.release()
    assert not any("/payload-0001/" in key for key in store.bucket.list())


@pytest.mark.parametrize("damage", ["flip", "shorten", "remove", "add", "tear record"])
def test_what_was_altered_in_the_bucket_is_named_never_used_and_built_anew(
    store: ObjectStore, url: str, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    teacher, distill, _ = chain()
    run_graph([teacher], store, context(tmp_path / "journal"))
    folder = store.key(store.folder(teacher))
    key = f"{folder}/payload-0001/config.json"
    content = store.bucket.read(key) or b""
    changes: dict[str, Callable[[], None]] = {
        "flip": lambda: store.bucket.write(key, bytes([content[0] ^ 1]) + content[1:]),
        "shorten": lambda: store.bucket.write(key, content[:-1]),
        "remove": lambda: store.bucket.remove([key]),
        "add": lambda: store.bucket.write(f"{folder}/payload-0001/extra", b""),
        "tear record": lambda: store.bucket.write(f"{folder}/record.json", b'{"format": 2'),
    }
    changes[damage]()
    elsewhere = another_node(url, tmp_path, monkeypatch)
    if damage == "flip":  # names and sizes are as they were: whoever reads it finds out
        with pytest.raises(StageFailed, match="config.json has another SHA-256 than its record"):
            run_graph([distill], elsewhere, context(tmp_path / "journal"))
    waited(lambda: elsewhere.is_altered(teacher))
    with pytest.raises(AlteredArtifact, match="this artifact was altered"):
        elsewhere.record(teacher)
    run_graph([distill], elsewhere, context(tmp_path / "journal"))
    assert built(tmp_path / "journal") == ["teacher", "teacher", "distill"]
    assert elsewhere.verify(teacher) is not None
    assert any("/altered-0002/record.json" in key for key in elsewhere.bucket.list())
    assert store.verify(teacher) is not None, "a copy of what was altered is not taken for the new one"


def test_a_damaged_copy_of_a_node_is_fetched_again(store: ObjectStore, tmp_path: Path):
    run_graph([toy()], store, context(tmp_path / "journal"))
    copy = store.payload(toy()) / "config.json"
    copy.write_text("edited")
    assert (store.payload(toy()) / "config.json").read_text() == "{}"


def test_another_label_finds_the_same_artifact(store: ObjectStore, tmp_path: Path):
    run_graph([toy(label="one")], store, context(tmp_path / "journal"))
    assert store.record(toy(label="two")) is not None
    raced = ObjectStore(store.location)
    raced.mirror.names = lambda kind: []  # type: ignore[method-assign]  # it had looked before
    assert raced.create(toy(label="three")).name.startswith("one_")


def test_status_elsewhere_has_the_curve_the_log_and_the_way_a_run_failed(
    store: ObjectStore, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stage = toy(does="fail")
    with pytest.raises(StageFailed, match="the loss is NaN"):
        run_graph([stage], store, context(tmp_path / "journal"))
    elsewhere = another_node(url, tmp_path, monkeypatch)
    status = elsewhere.status(stage)
    assert (status.state, status.error) == ("failed", "ValueError: the loss is NaN")
    assert status.log is not None
    assert "at step 7" in status.log.read_text()
    assert status.log.is_relative_to(elsewhere.root)


def test_lines_of_several_writers_are_one_curve_in_which_the_later_writer_wins(store: ObjectStore):
    build = begin(store, toy())
    run = StageRun(build.stage, {}, build.staging, build.progress, build.lease.folder, site=build.site)
    for loss in (3.0, 2.0):
        with run.on_this_node() as here:
            here.log_metrics(1, 4, {"train/loss": loss})
            here.log_metrics(2, 4, {"train/loss": loss / 2})
    store.mirror.forget(build.key)  # a listing is believed for a second
    curve = Curve(store.progress(build.stage) / "metrics.jsonl")
    curve.update()
    assert [point.metrics["train/loss"] for point in curve.points.values()] == [2.0, 1.0]
    with run.on_this_node() as here:
        here.log_metrics(3, 4, {"train/loss": 0.5})
    store.mirror.forget(build.key)
    store.progress(build.stage)
    assert [point.step for point in curve.update()] == [3], "what was read is not read again"
    build.interrupt("test")
    build.release()


def test_a_large_curve_goes_in_segments(store: ObjectStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.objects.site.SEGMENT_BYTES", 300)
    build = begin(store, toy())
    run = StageRun(build.stage, {}, build.staging, build.progress, build.lease.folder, site=build.site)
    with run.on_this_node() as here:
        courier = Courier(build.site, here)
        for step in range(1, 20):
            here.log_metrics(step, 20, {"train/loss": 1.0})
            courier.flush()
    store.mirror.forget(build.key)
    curve = Curve(store.progress(build.stage) / "metrics.jsonl")
    curve.update()
    assert sorted(curve.points) == list(range(1, 20))
    assert len(store.bucket.list(f"{build.key}/progress/metrics/")) > 3
    build.interrupt("test")
    build.release()


def test_a_request_to_stop_is_seen_by_whoever_holds_the_flag(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr("pipeline.objects.flags.LOOK_S", 0.0)
    flag = store.interrupt_flag()
    elsewhere = pickle.loads(pickle.dumps(flag))
    assert not elsewhere()
    flag.ask("Ctrl-C")
    assert elsewhere()
    unseen = pickle.loads(pickle.dumps(flag))
    with monkeypatch.context() as away:
        away.setattr(Bucket, "read", lambda self, key: (tmp_path / "nothing").stat())
        assert not unseen(), "who cannot look goes on"
    assert unseen()
    flag.clear()
    assert not pickle.loads(pickle.dumps(flag))()
    assert not store.bucket.list("tune/")


def test_who_has_lost_the_lease_ends_its_own_workers_and_not_those_of_its_successor(store: ObjectStore):
    stage = toy()
    assert store.stop_flag(stage) is None
    loser = begin(store, stage)
    successor = begin(store, stage, Facts(lease="dead", attempt=1, error="silent"))
    loser.site.stop_flag().ask("lost the lease")
    assert (loser.site.stop_flag()(), successor.site.stop_flag()()) == (True, False)
    asked = store.stop_flag(stage)
    assert asked == successor.site.stop_flag(), "a scheduler asks who builds now"
    asked.ask("halving")
    assert successor.site.stop_flag()()
    assert store.sighting(store.folder(stage)).attempt == 2, "a flag is no attempt"
    for build in (loser, successor):
        build.interrupt("test")
        build.release()


def test_a_builder_that_dies_is_found_dead_and_its_end_written_down(url: str, tmp_path: Path):
    script = [sys.executable, str(HERE / "store_toys.py"), "build", url, "60"]
    process = subprocess.Popen(script, env=ENVIRONMENT, cwd=tmp_path)
    store, stage = ObjectStore(f"{url}/store"), toy(does="slow")
    try:
        waited(lambda: store.facts(stage).lease == "held")
    finally:
        process.kill()
        process.wait()
    facts = store.facts(stage)
    assert facts.lease == "dead"
    assert facts.error.endswith("is gone")
    build = begin(store, stage)
    assert build.lease.number == 2
    build.interrupt("test")
    build.release()
    (first, _) = [json.loads(store.bucket.read(key) or b"") for key in store.bucket.list() if "outcome.json" in key]
    assert first["status"] == "interrupted"
    assert not list((store.root / ".work").iterdir()), "folders of the dead are removed"


def test_a_service_that_replaces_what_is_there_is_refused_before_anything_runs(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
):
    store.prepare()
    store.prepare()

    def replaces(self: Bucket, key: str, data: bytes) -> bool:
        self.write(key, data)
        return True

    monkeypatch.setattr(Bucket, "create", replaces)
    with pytest.raises(UserError, match="take a service with conditional writes"):
        store.prepare()


def test_a_url_that_is_none_and_a_place_that_names_no_artifact_are_users_mistakes(store: ObjectStore, tmp_path: Path):
    with pytest.raises(UserError, match="not a place for objects"):
        open_at("https://example.com/runs")
    assert type(open_at(tmp_path)) is Store
    with pytest.raises(UserError, match="names no artifact"):
        local_place(f"{store.location}/teacher")
    run_graph([toy()], store)
    key = store.key(store.folder(toy()))
    raw = store.bucket.read(f"{key}/record.json") or b""
    store.bucket.write(f"{key}/record.json", raw[:20])
    with pytest.raises(UserError, match="record.json is damaged"):
        local_place(f"{store.location}/{key}")
    store.bucket.write(f"{key}/record.json", raw)
    found = local_place(f"{store.place(toy())}/config.json")
    assert found.read_text() == "{}"
    assert local_place(store.location + "/" + store.key(store.folder(toy()))) == found.parent
