"""What `overfill gc` takes for garbage in a bucket and on this node, and that nothing else ever goes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from store_toys import toy
from synthetic_store import toy_cells

from overfill.errors import UserError
from pipeline import drivers, lease
from pipeline.cli import main
from pipeline.config import SweepConfig
from pipeline.experiment import Experiment, keep_experiment
from pipeline.objects import gc
from pipeline.objects.bucket import Bucket
from pipeline.objects.build import ObjectBuild
from pipeline.objects.leases import acquire
from pipeline.objects.mirror import CACHE_VARIABLE
from pipeline.objects.steps import ObjectSteps
from pipeline.objects.store import ObjectStore
from pipeline.resume import Facts
from pipeline.stage import Stage, StageRun
from pipeline.sweep import Cell
from pipeline.training.checkpoints import MARKER, new_name, write_manifest

UNKNOWN = toy(layers=3)
"""No experiment refers to it."""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Cell]:
    """A bucket in which a sweep of one cell is done, with its experiment file."""
    place = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(place / "cache"))
        patch.setattr("pipeline.objects.mirror.LISTING_S", 0.0)
        store = ObjectStore(f"file://{place}/bucket")
        (cell,) = toy_cells(methods=("overfill",))
        for stage in cell.stages:
            publish(store, stage)
        sweep = SweepConfig(axes={"prune": ({"hidden": 0.5, "intermediate": 0.5},)})
        keep_experiment(Experiment(cell.config.model_copy(update={"sweep": sweep}), [cell]), store)
    return place / "bucket", cell


@pytest.fixture
def store(done: tuple[Path, Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """A copy of it, seen from a node that knows nothing yet."""
    shutil.copytree(done[0], tmp_path / "bucket")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr("pipeline.objects.mirror.LISTING_S", 0.0)
    return ObjectStore(f"file://{tmp_path}/bucket")


@pytest.fixture
def cell(done: tuple[Path, Cell]) -> Cell:
    """Its cell."""
    return done[1]


def begin(store: ObjectStore, stage: Stage, facts: Facts | None = None) -> ObjectBuild:
    build = ObjectBuild.start(store, stage, facts or store.facts(stage, explain=False), None)
    assert isinstance(build, ObjectBuild)
    return build


def deliver(build: ObjectBuild, content: str = "weights") -> None:
    run = StageRun(build.stage, {}, build.staging, build.progress, build.lease.folder, site=build.site)
    with run.on_this_node() as here:
        (here.staging / "weights").write_text(content)


def publish(store: ObjectStore, stage: Stage) -> None:
    if store.record(stage) is None:
        build = begin(store, stage)
        deliver(build)
        build.publish({})
        build.release()


def killed(build: ObjectBuild) -> str:
    """Its process ends without a word, and what it delivered stays; returns the key of its artifact's folder."""
    build._abandon = lambda *_: None  # type: ignore[method-assign]
    build.release()
    return build.key


def collected(store: ObjectStore, keep: int = 1) -> list[gc.ObjectGarbage]:
    return gc.collect(store, gc.experiment_versions(store), keep)[0]


def places(store: ObjectStore, keep: int = 1) -> dict[str, str]:
    """Place -> reason."""
    return {one.place: one.reason for one in collected(store, keep)}


def delete(store: ObjectStore, keep: int = 1) -> list[str]:
    before = gc.experiment_versions(store)
    found, copies = gc.collect(store, before, keep)
    assert not copies
    return [one.place for one in gc.remove(store, found, before, keep)]


def identities(store: ObjectStore) -> set[str]:
    """Of all artifacts of which anything is in the bucket."""
    return {
        key.split("/")[1].rpartition("_")[2] for key in store.bucket.list() if key[0] != "." and "sweeps" not in key
    }


def attempts(store: ObjectStore, key: str) -> list[str]:
    return store.bucket.names(f"{key}/attempts/")


def test_what_a_known_experiment_comes_to_stays_on_any_machine_and_what_is_made_for_no_other(
    store: ObjectStore, cell: Cell
):
    assert collected(store) == []
    here = cell.stage("benchmark")
    assert here is not None
    there = Stage(here.name, here.version, here.config | {"device": "a GPU"}, here.inputs, here.function, here.label)
    slower = Stage(here.name, here.version, here.config | {"repeats": 99}, here.inputs, here.function, here.label)
    for stage in (there, slower):
        publish(store, stage)
    assert places(store) == {f"{store.key(store.folder(slower))}/": "no experiment refers to it"}


def test_an_artifact_that_no_experiment_refers_to_is_listed_and_on_demand_removed(store: ObjectStore, cell: Cell):
    publish(store, UNKNOWN)
    key, known = store.key(store.folder(UNKNOWN)), {stage.identity for stage in cell.stages}
    (one,) = collected(store)
    assert one.size == sum(entry.size for entry in store.bucket.list(f"{key}/").values()) > 0
    assert identities(store) == known | {UNKNOWN.identity}, "listing removes nothing"
    copy = store.payload(UNKNOWN).parent
    assert delete(store) == [f"{key}/"]
    assert identities(store) == known
    assert set(store.bucket.names(".claims/")) == known
    assert not copy.exists(), "nor is it on this node"
    assert all(store.verify(stage) is not None for stage in cell.stages)
    publish(store, UNKNOWN)  # and it can be built again
    assert store.verify(UNKNOWN) is not None


def test_what_is_being_built_stays_with_its_inputs(store: ObjectStore):
    (other,) = toy_cells(ratios=(0.75,), methods=("overfill",))
    for stage in other.stages[:5]:
        publish(store, stage)
    building = begin(store, other.stages[5])
    assert collected(store) == []
    building.interrupt("enough")
    building.release()
    assert {one.place.split("/")[0] for one in collected(store)} == {"prune", "distill"}


def elsewhere(store: ObjectStore) -> str:
    """Somebody on another host builds it; returns the key of its folder."""
    key = store.key(store.create(UNKNOWN))
    owner = {"host": "elsewhere/1/2", "pid": 7, "started": 1, "token": "a"}
    store.bucket.write(f"{key}/attempts/0001/lease.json", json.dumps({"owner": owner}).encode())
    return key


def test_who_builds_on_another_host_is_given_time_for_a_sign_of_life(
    store: ObjectStore, capsys: Any, monkeypatch: pytest.MonkeyPatch
):
    key, beats = elsewhere(store), count()
    beat = lambda _: store.bucket.write(f"{key}/attempts/0001/beat.json", b'{"count": %d}' % next(beats))  # noqa: E731
    monkeypatch.setattr(gc.time, "sleep", beat)
    assert "at work on other hosts: 1; waiting for a sign of life" in (listed := run(store, capsys))
    assert "--delete removes 0 items" in listed
    assert next(beats) == 1


def test_what_a_living_driver_has_made_with_other_values_stays_and_what_a_killed_one_left_goes(
    store: ObjectStore, cell: Cell, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(drivers, "WATCH_S", 0.02)
    sweep = SweepConfig(axes={"prune": ({"hidden": 0.75, "intermediate": 0.75},)})
    (other,) = toy_cells(ratios=(0.75,), methods=("overfill",))
    experiment = Experiment(cell.config.model_copy(update={"sweep": sweep}), [other])
    made = other.stage("prune")
    assert made is not None
    elsewhere = ObjectStore(store.location, ttl=0.1)
    with drivers.at_work(experiment, store):
        publish(store, made)
        assert delete(elsewhere) == []
        assert gc.collect(elsewhere, gc.experiment_versions(elsewhere))[1] == []
    assert store.bucket.list(f"{drivers.DRIVERS}/") == {}
    monkeypatch.setattr(store, "discard", lambda folder: None)
    with drivers.at_work(experiment, store):
        pass
    (left,) = elsewhere.drivers()
    assert sorted(delete(elsewhere)) == sorted([f"{elsewhere.key(left)}/", f"{store.key(store.folder(made))}/"])
    assert elsewhere.drivers() == [] and places(elsewhere) == {}


def test_a_silent_holder_on_another_host_is_found_dead(store: ObjectStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(drivers, "WATCH_S", 0.02)
    waiter = ObjectStore(store.location, ttl=0.1)
    key = elsewhere(store)
    assert delete(waiter) == [f"{key}/"]
    assert store.bucket.list(f"{key}/") == {}


def test_on_a_real_protocol(on_s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr("pipeline.objects.mirror.LISTING_S", 0.0)
    store = ObjectStore(on_s3)
    publish(store, UNKNOWN)
    store.interrupt_flag().ask("Ctrl-C")
    monkeypatch.setattr(gc, "STALE_S", -60.0)
    assert len(delete(store)) == 2
    assert store.bucket.list() == {}


def test_an_artifact_that_is_taken_up_between_listing_and_removing_stays(store: ObjectStore):
    begun = begin(store, UNKNOWN)
    begun.interrupt("preempted")
    begun.release()
    before, found = gc.experiment_versions(store), collected(store)
    again = begin(store, UNKNOWN)
    assert list(gc.remove(store, found, before)) == []
    deliver(again)
    again.publish({})
    again.release()
    assert store.verify(UNKNOWN) is not None
    assert attempts(store, again.key) == ["0001", "0002"]


def test_a_builder_that_begins_with_old_news_after_the_removal_builds_a_whole_artifact(store: ObjectStore):
    publish(store, UNKNOWN)
    key = store.key(store.folder(UNKNOWN))
    facts = Facts(artifact="missing", attempt=1)
    names, listing = store.mirror.names("teacher"), store.mirror.listing(key)
    assert delete(store) == [f"{key}/"]
    late = ObjectStore(store.location)
    late.mirror._names["teacher"] = (float("inf"), names)  # it had looked before
    late.mirror._listings[key] = (float("inf"), listing)
    build = begin(late, UNKNOWN, facts)
    deliver(build)
    build.publish({})
    build.release()
    assert f"{key}/identity.json" in store.bucket.list(f"{key}/")
    assert store.verify(UNKNOWN) is not None


def test_whoever_wakes_up_when_all_is_removed_has_lost_its_lease_and_leaves_nothing(store: ObjectStore):
    sleeper = begin(store, UNKNOWN)
    successor = begin(store, UNKNOWN, Facts(lease="dead", attempt=1))
    successor.interrupt("preempted")
    successor.release()
    assert len(delete(store)) == 1
    sleeper.lease._write()
    with pytest.raises(lease.LeaseLost):
        sleeper.publish({})
    killed(sleeper)
    assert store.bucket.list(f"{sleeper.key}/") == {}


def test_whoever_wakes_up_when_another_has_its_number_has_lost_its_lease(store: ObjectStore):
    sleeper = begin(store, UNKNOWN)
    successor = begin(store, UNKNOWN, Facts(lease="dead", attempt=1))
    successor.interrupt("preempted")
    successor.release()
    assert len(delete(store)) == 1
    other = begin(store, UNKNOWN)
    assert other.lease.number == sleeper.lease.number
    with pytest.raises(lease.LeaseLost):
        sleeper.lease.require()
    killed(sleeper)
    deliver(other)
    other.publish({})
    other.release()
    assert store.verify(UNKNOWN) is not None


def test_an_experiment_that_begins_meanwhile_ends_the_removal(store: ObjectStore):
    publish(store, UNKNOWN)
    before, found = gc.experiment_versions(store), collected(store)
    store.bucket.write("sweeps/another/experiment.yaml", b"name: another\n")
    with pytest.raises(UserError, match="started meanwhile"):
        list(gc.remove(store, found, before))
    assert store.verify(UNKNOWN) is not None
    assert attempts(store, store.key(store.folder(UNKNOWN))) == ["0001"], "its lease is taken back"


def test_an_experiment_file_that_cannot_be_read_ends_it_in_one_line(store: ObjectStore, capsys: Any):
    publish(store, UNKNOWN)
    store.bucket.write("sweeps/broken/experiment.yaml", b"name: broken\nteacher: {model: /nowhere}\n")
    with pytest.raises(SystemExit) as end:
        main(["gc", "--delete", "--store", store.location])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{store.location}/sweeps/broken/experiment.yaml: cannot be read" in error and "/nowhere" in error
    assert store.verify(UNKNOWN) is not None
    store.bucket.remove(["sweeps/broken/experiment.yaml"])
    assert len(delete(store)) == 1, "its copy on this node, which stays, is not asked"


class Killed(BaseException):
    """In place of the signal."""


@pytest.mark.parametrize("then", ["gc", "build"])
def test_a_kill_at_any_moment_leaves_nothing_that_is_taken_for_whole(
    store: ObjectStore, cell: Cell, then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    key = f"teacher/{UNKNOWN.folder_name}"
    place, remove = tmp_path / "bucket", Bucket.remove
    shutil.copytree(place, tmp_path / "before")
    publish(store, UNKNOWN)
    store.bucket.write(f"{key}/progress/metrics/0001-0000-aa-000000.jsonl", b"{}\n")
    step = f"{key}/progress/{UNKNOWN.identity}/{new_name(5)}"
    store.bucket.write(f"{step}/{MARKER}", b'{"ranks": 1}')
    store.bucket.write(f"{step}/rank-00000.json", b'{"ranks": 1, "files": {}}')
    shutil.copytree(place, tmp_path / "with it")
    kept = 0
    for kept in range(100):
        shutil.rmtree(place)
        shutil.copytree(tmp_path / "with it", place)
        with monkeypatch.context() as dying:
            dying.setattr(Bucket, "remove", dies_after(kept, remove))
            try:
                delete(store)
                break
            except Killed:
                pass
        seen = ObjectStore(store.location, ttl=0.0)  # its process is alive: it was not killed
        whole = f"{key}/record.json" in store.bucket.list()
        assert (seen.record(UNKNOWN) is not None) == whole == (kept < 2), "the claim, then the record"
        if then == "gc":
            assert delete(seen) == [f"{key}/"]
            assert set(store.bucket.list()) == objects(tmp_path / "before")
        elif not whole:
            marked, files = f"{step}/{MARKER}" in store.bucket.list(), len(store.bucket.list(f"{step}/"))
            assert (seen.facts(UNKNOWN).checkpoint == 5) == marked == (files == 2), "the marker, then the rest"
            publish(seen, UNKNOWN)
            assert seen.verify(UNKNOWN) is not None
            assert {f"{key}/identity.json", f"{key}/record.json"} <= set(store.bucket.list(f"{key}/"))
    assert kept > 8
    assert store.bucket.list(f"{key}/") == {}
    assert all(store.verify(stage) is not None for stage in cell.stages)


def dies_after(count: int, remove: Any) -> Any:
    left = [count]

    def dying(bucket: Bucket, keys: Iterable[str]) -> None:
        for key in keys:
            if not left[0]:
                raise Killed
            left[0] -= 1
            remove(bucket, [key])

    return dying


def objects(place: Path) -> set[str]:
    return set(Bucket(f"file://{place}").list())


def test_payloads_that_no_record_names_can_go_and_those_of_an_altered_one_with_it(store: ObjectStore, cell: Cell):
    distill, prune = cell.stage("distill"), cell.stage("prune")
    assert distill is not None and prune is not None
    key = store.key(store.folder(distill))
    store.bucket.remove([f"{key}/payload-0001/weights"])
    again = begin(store, distill)  # sets aside
    store.bucket.write(f"{key}/payload-0001/half", b"of what it names")
    deliver(again)
    assert collected(store) == [], "somebody is at work"
    again.publish({})
    killed(again)
    other = store.key(store.folder(prune))
    store.bucket.write(f"{other}/payload-0007/weights", b"of a kill")
    store.bucket.write(f"{other}/attempts/0001/delivered/aa.json", b"{}")
    assert places(store) == {
        f"{key}/payload-0001/": "set aside as altered",
        f"{key}/altered-0002/": "set aside as altered",
        f"{other}/payload-0007/": "left by an attempt that has ended",
        f"{other}/attempts/0001/delivered/": "left by an attempt that has ended",
    }
    before = (attempts(store, key), attempts(store, other))
    assert len(delete(store)) == 4
    assert collected(store) == []
    assert (attempts(store, key), attempts(store, other)) == before, "an attempt that built nothing is not left behind"
    assert store.verify(distill) is not None and store.verify(prune) is not None
    assert store.facts(prune).outcome == "done"


def test_of_a_damaged_record_no_payload_goes(store: ObjectStore, cell: Cell):
    stage = cell.stages[0]
    key = store.key(store.folder(stage))
    store.bucket.write(f"{key}/record.json", b"{")
    assert collected(store) == []


def test_what_has_come_to_be_of_use_since_the_listing_stays(store: ObjectStore, cell: Cell):
    stage = cell.stages[0]
    key = store.key(store.folder(stage))
    record = store.bucket.read(f"{key}/record.json") or b""
    store.bucket.remove([f"{key}/record.json"])
    before, found = gc.experiment_versions(store), collected(store)
    assert [one.place for one in found] == [f"{key}/payload-0001/"]
    store.bucket.write(f"{key}/record.json", record)  # a sleeper published
    assert list(gc.remove(store, found, before)) == []
    assert store.verify(stage) is not None


def save_checkpoint(build: ObjectBuild, step: int) -> str:
    steps = ObjectSteps.of(build.site, build.progress / build.stage.identity)
    folder = steps.root / new_name(step)
    folder.mkdir(parents=True)
    (folder / "rank-00000.safetensors").write_bytes(bytes(1000))
    steps.sent(folder, [folder / "rank-00000.safetensors", write_manifest(folder, 0, 1, [*folder.iterdir()])])
    steps.complete(folder, ranks=1, keep=9)
    return f"{build.key}/progress/{build.stage.identity}/{folder.name}/"


def test_only_older_step_checkpoints_of_an_unfinished_stage_and_all_of_a_finished_one_can_go(
    store: ObjectStore, cell: Cell
):
    stage = cell.stage("distill")
    assert stage is not None
    key = store.key(store.folder(stage))
    store.bucket.remove([f"{key}/record.json", f"{key}/payload-0001/weights"])
    build = begin(store, stage)
    build.folder.joinpath("progress").mkdir(exist_ok=True)
    old, middle, new = (save_checkpoint(build, step) for step in (5, 10, 15))
    store.bucket.write(f"{key}/progress/metrics/0001-0000-aa-000000.jsonl", b"{}\n")
    assert collected(store) == []
    build.interrupt("preempted")
    build.release()
    assert places(store, 1) == dict.fromkeys((old, middle), "an older step checkpoint")
    assert set(places(store, 2)) == {old}
    assert all(one.size > 1000 for one in collected(store))
    store.bucket.write(f"{new}rank-00000.safetensors", b"torn")
    assert delete(store) == [old], "a damaged one is not the one that is kept"
    assert store.facts(stage).checkpoint == 10
    assert store.facts(stage).attempt == build.lease.number
    again = begin(store, stage)
    deliver(again)
    marks = store.bucket.list(middle)
    again.publish({})
    again.release()
    for name in marks:
        store.bucket.write(name, b"left by a kill")
    assert places(store) == {f"{key}/progress/{stage.identity}/": "step checkpoints of a finished stage"}
    assert len(delete(store)) == 1
    assert f"{key}/progress/metrics/0001-0000-aa-000000.jsonl" in store.bucket.list(f"{key}/")


def test_requests_to_end_go_when_they_are_old_and_nobody_builds(store: ObjectStore, tmp_path: Path):
    old, young = store.interrupt_flag(), store.interrupt_flag()
    for flag in (old, young):
        flag.ask("Ctrl-C")
    (key, _) = sorted(store.bucket.list("tune/"))
    then = time.time() - 2 * gc.STALE_S
    os.utime(tmp_path / "bucket" / key, (then, then))
    build = begin(store, UNKNOWN)
    assert collected(store) == []
    killed(build)
    assert places(store)[key] == "of a run that has ended"
    assert sorted(delete(store)) == sorted([f"{build.key}/", key])
    assert len(store.bucket.list("tune/")) == 1


def test_copies_of_what_is_gone_and_folders_of_dead_processes_go_from_this_node(
    store: ObjectStore, cell: Cell, capsys: Any
):
    publish(store, UNKNOWN)
    copy, sound = store.payload(UNKNOWN).parent, store.payload(cell.stages[0])
    store.bucket.remove_below(f"{store.key(copy)}/")
    store.progress(toy(layers=4))  # a look leaves an empty folder
    checkpoint = store.root / ".steps" / UNKNOWN.identity / new_name(5)
    dead = store.root / ".work" / "dead"
    for folder in (checkpoint, dead):
        folder.mkdir(parents=True)
        (folder / "large").write_text("1234")
    gone = subprocess.run([sys.executable, "-c", OWNER], capture_output=True, text=True, check=True)
    (dead / "owner.json").write_text(gone.stdout)
    experiments = gc.experiment_versions(store)
    _, copies = gc.collect(store, experiments)
    assert {one.path: one.reason for one in copies} == {
        copy: "copy of what is not in the bucket any more",
        checkpoint: "copy of what is not in the bucket any more",
        dead: "left by a process that has ended",
    }
    store.bucket.write(f"{store.key(copy)}/identity.json", b"{}")
    assert not gc._drop(store, copy), "it is there again"
    store.bucket.remove_below(f"{store.key(copy)}/")
    assert "removed: 3 items" in run(store, capsys, "--delete")
    assert not any(path.exists() for path in (copy, checkpoint, dead))
    assert sound.exists()
    assert gc.collect(store, experiments) == ([], [])


OWNER = """
import json
from dataclasses import asdict
from pipeline.lease import Owner
print(json.dumps(asdict(Owner.here())))
"""


def run(store: ObjectStore, capsys: Any, *arguments: str) -> str:
    """What the command says, in one line."""
    with pytest.raises(SystemExit) as end:
        main(["gc", "--store", store.location, *arguments])
    assert not end.value.code
    return " ".join(capsys.readouterr().out.split())


def test_the_command_lists_then_removes(store: ObjectStore, capsys: Any):
    publish(store, UNKNOWN)
    assert "no experiment refers to it" in (listed := run(store, capsys))
    assert "nothing was removed; --delete removes 1 item," in listed
    held = acquire(store.bucket, f"{store.key(store.folder(UNKNOWN))}/attempts/", 1, store.root)
    assert held is not None
    assert "removed: 0 items" in run(store, capsys, "--delete")
    held.vanish()
    assert "removed: 1 item," in run(store, capsys, "--delete")
    assert "--delete removes 0 items" in run(store, capsys)
