"""Unlucky moments on an object store: what was finished stays, who lives is not robbed, who has lost destroys nothing."""

from __future__ import annotations

import errno
import json
import pickle
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from store_toys import chain, toy

from pipeline.lease import LeaseLost
from pipeline.objects.bucket import Bucket
from pipeline.objects.build import ObjectBuild
from pipeline.objects.mirror import CACHE_VARIABLE
from pipeline.objects.site import Courier
from pipeline.objects.store import ObjectStore
from pipeline.resume import Facts
from pipeline.runner import RunContext, StageFailed, run_graph
from pipeline.stage import StageRun

STAGE = toy()


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return f"file://{tmp_path}/bucket"


@pytest.fixture
def store(url: str) -> ObjectStore:
    return ObjectStore(url)


def begin(store: ObjectStore, stage: Any = STAGE, facts: Facts | None = None) -> ObjectBuild:
    build = ObjectBuild.start(store, stage, facts or store.facts(stage), None)
    assert isinstance(build, ObjectBuild)
    return build


def visit(build: ObjectBuild) -> StageRun:
    return StageRun(build.stage, {}, build.staging, build.progress, build.lease.folder, site=build.site)


def deliver(build: ObjectBuild, content: str) -> None:
    with visit(build).on_this_node() as here:
        (here.staging / "weights").write_text(content)


def away(*_: Any) -> None:
    raise OSError(errno.ETIMEDOUT, "timed out", "s3://bucket/key")


def fails(monkeypatch: pytest.MonkeyPatch, method: str, when: Callable[[Any], bool], error: Callable[..., Any] = away):
    """Let a call of Bucket fail whose first argument, a key or several, is one of those."""
    real = getattr(Bucket, method)

    def call(self: Bucket, about: Any, *rest: Any) -> Any:
        about = about if isinstance(about, str) or not isinstance(about, Iterable) else list(about)
        if when(about):
            error()
        return real(self, about, *rest)

    monkeypatch.setattr(Bucket, method, call)


def test_an_outcome_that_cannot_be_written_does_not_undo_what_was_published(store: ObjectStore, monkeypatch):
    with monkeypatch.context() as patched:
        fails(patched, "write", lambda key: key.endswith("outcome.json"))
        run_graph([STAGE], store)
    assert ObjectStore(store.location).verify(STAGE) is not None


def test_nor_does_a_clean_up_that_fails(store: ObjectStore, monkeypatch):
    with monkeypatch.context() as patched:
        fails(patched, "remove", lambda keys: any("delivered" in key for key in keys))
        run_graph([STAGE], store)
    assert ObjectStore(store.location).verify(STAGE) is not None


@pytest.mark.parametrize("end", [KeyboardInterrupt, OSError])
def test_nor_does_an_end_right_behind_the_record(store: ObjectStore, monkeypatch, end: type[BaseException]):
    """Ctrl-C, or an answer that was lost although the record is there."""
    real = Bucket.create

    def create(self: Bucket, key: str, data: bytes) -> bool:
        found = real(self, key, data)
        if key.endswith("record.json"):
            raise end
        return found

    with monkeypatch.context() as patched:
        patched.setattr(Bucket, "create", create)
        with pytest.raises((KeyboardInterrupt, StageFailed)):
            run_graph([STAGE], store)
    assert ObjectStore(store.location).verify(STAGE) is not None


def test_why_a_stage_failed_is_told_though_its_outcome_cannot_be_written(store: ObjectStore, monkeypatch):
    fails(monkeypatch, "write", lambda key: key.endswith("outcome.json"))
    with pytest.raises(StageFailed, match="the loss is NaN"):
        run_graph([toy(does="fail")], store)


def test_a_loser_that_stalls_between_its_look_and_its_record_publishes_a_whole_artifact(
    store: ObjectStore, monkeypatch
):
    loser = begin(store)
    deliver(loser, "old")
    real, made = Bucket.create, []

    def create(self: Bucket, key: str, data: bytes) -> bool:
        if key.endswith("record.json") and not made:
            made.append(begin(store, STAGE, Facts(lease="dead", attempt=1, error="silent")))
        return real(self, key, data)

    with monkeypatch.context() as patched:
        patched.setattr(Bucket, "create", create)
        loser.publish({})
    (successor,) = made
    deliver(successor, "new")
    with pytest.raises(LeaseLost):
        successor.publish({})
    successor.interrupt("published meanwhile")
    for build in (loser, successor):
        build.release()
    fresh = ObjectStore(store.location)
    assert fresh.verify(STAGE) is not None
    assert (fresh.payload(STAGE) / "weights").read_text() == "old"


def test_a_waiter_sees_the_heartbeat_and_never_takes_a_live_holder_for_dead(store: ObjectStore, url: str):
    stages = chain()
    holder = begin(store, stages[0])
    waiter = ObjectStore(url, ttl=1.5)
    for count in range(12):
        beat = json.dumps({"count": count, "state": "held"}).encode()
        store.bucket.write(f"{holder.key}/attempts/0001/beat.json", beat)
        assert waiter.gather(stages[-1:], explain=False)[stages[0].identity].lease == "held"
        time.sleep(0.2)
    holder.interrupt("the test is over")
    holder.release()


def test_an_older_look_of_another_process_does_not_undo_this_nodes_copy(store: ObjectStore, url: str):
    build, other = begin(store), ObjectStore(url)
    other.mirror.listing(build.key)
    deliver(build, "new")
    build.publish({})
    build.release()
    assert store.record(STAGE) is not None
    other.mirror.refresh(build.key)  # with its listing of before
    assert store.record(STAGE) is not None
    assert (store.root / build.key / "record.json").exists()


def test_a_long_look_in_one_thread_freezes_no_other(store: ObjectStore):
    build = begin(store)
    entered, done = threading.Event(), threading.Event()

    def look() -> None:
        with store.look_once([]):
            store.mirror.listing(build.key)
            entered.set()
            done.wait(20)

    thread = threading.Thread(target=look)
    thread.start()
    entered.wait(20)
    deliver(build, "new")
    build.publish({})
    time.sleep(1.1)  # a listing is believed for a second
    assert store.record(STAGE) is not None
    done.set()
    thread.join()
    build.release()


def test_what_others_have_just_finished_is_seen_by_who_looks_anew(store: ObjectStore, url: str):
    driver, build = ObjectStore(url), begin(store)
    assert driver.record(STAGE) is None
    deliver(build, "new")
    build.publish({})
    build.release()
    driver.look_anew()
    with driver.look_once([STAGE]):
        assert driver.record(STAGE) is not None


def test_a_service_that_is_away_for_a_moment_ends_no_cell_that_waits(store: ObjectStore, url: str, monkeypatch):
    build, asked = begin(store), []

    def now_and_then(prefix: str) -> bool:
        asked.append(prefix)
        return len(asked) in (3, 4, 5)

    waiter = threading.Thread(target=run_graph, args=([STAGE], ObjectStore(url), RunContext(poll=0.1)), daemon=True)
    with monkeypatch.context() as patched:
        fails(patched, "list", now_and_then)
        waiter.start()
        deadline = time.monotonic() + 30
        while len(asked) < 7 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert waiter.is_alive(), "it waits on"
    deliver(build, "new")
    build.publish({})
    build.release()
    waiter.join(20)
    assert not waiter.is_alive()


def test_logs_that_do_not_arrive_end_no_training_and_metrics_do(store: ObjectStore, monkeypatch):
    build = begin(store)
    with monkeypatch.context() as patched, visit(build).on_this_node() as here:
        (here.attempt / "worker-0.log").write_text("hello")
        here.log_metrics(1, 4, {"train/loss": 1.0})
        fails(patched, "write", lambda key: key.endswith(".log"))
        Courier.flush_of(here.progress)
        fails(patched, "write", lambda key: key.endswith(".jsonl"))
        here.log_metrics(2, 4, {"train/loss": 0.5})
        with pytest.raises(OSError, match="timed out"):
            Courier.flush_of(here.progress)
        patched.undo()
    lines = [store.bucket.read(key) or b"" for key in store.bucket.list(f"{build.key}/progress/metrics/")]
    assert b"".join(lines).count(b"\n") == 2
    assert store.bucket.read(f"{build.key}/attempts/0001/worker-0.log") == b"hello"
    build.interrupt("the test is over")
    build.release()


def test_a_store_travels_to_other_processes_as_what_names_it(store: ObjectStore):
    again = pickle.loads(pickle.dumps(store))
    assert (again.location, again.root) == (store.location, store.root)


def test_keys_that_lead_out_of_a_copy_are_not_looked_at(store: ObjectStore, tmp_path: Path, monkeypatch):
    build = begin(store)
    deliver(build, "x")
    outside = tmp_path / "precious"
    outside.write_text("precious")
    there = store.bucket.list(f"{build.key}/")
    key = f"{build.key}/progress/a/step-1/{'../' * 40}{str(outside).lstrip('/')}"

    class Odd:
        failures: tuple[type[Exception], ...] = ()

        def walk(self, prefix: str) -> Any:
            return {**there, key: next(iter(there.values()))}

    monkeypatch.setattr(Bucket, "_objects", Odd())
    assert key not in store.bucket.list(f"{build.key}/")
    monkeypatch.setattr(Bucket, "read", lambda self, key: b"{}")
    store.mirror.forget(build.key)
    store.mirror.refresh(build.key)
    assert outside.read_text() == "precious"
    monkeypatch.undo()
    build.interrupt("the test is over")
    build.release()
