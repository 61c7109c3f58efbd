"""What `overfill gc` takes for garbage, and that nothing else ever goes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from store_toys import toy
from synthetic_store import SyntheticStore, toy_cells

from overfill.errors import UserError
from pipeline import build, commands, drivers, gc, lease
from pipeline.cli import main
from pipeline.drivers import at_work
from pipeline.experiment import Experiment, keep_experiment
from pipeline.lease import acquire
from pipeline.stage import Stage
from pipeline.store import Store
from pipeline.sweep import Cell
from pipeline.training import checkpoints
from pipeline.training.checkpoints import Position


@pytest.fixture
def written(tmp_path: Path) -> SyntheticStore:
    return SyntheticStore(tmp_path / "runs")


def finished(written: SyntheticStore, ratios: tuple[float, ...] = (0.5,)) -> list[Cell]:
    """A store in which a sweep is done, with its experiment file."""
    cells = toy_cells(ratios=ratios, methods=("overfill",))
    for cell in cells:
        written.finish(cell)
    keep_experiment(Experiment(cells[0].config.model_copy(update={"sweep": sweep_of(ratios)}), cells), written.store)
    assert identities(written.store) == {stage.identity for cell in cells for stage in cell.stages}
    return cells


def sweep_of(ratios: tuple[float, ...]):
    from pipeline.config import SweepConfig

    return SweepConfig(axes={"prune": tuple({"hidden": ratio, "intermediate": ratio} for ratio in ratios)})


def identities(store: Store) -> set[str]:
    """Of all artifacts that are there."""
    return {json.loads(path.read_text())["identity"] for path in store.root.glob("*/*/identity.json")}


def paths(found: list[gc.Garbage], store: Store) -> dict[str, str]:
    """Path in the store -> reason."""
    return {one.path.relative_to(store.root).as_posix(): one.reason for one in found}


def delete(store: Store, keep: int = 1) -> list[gc.Garbage]:
    before = gc.experiment_files(store)
    return list(gc.remove(store, gc.collect(store, keep), before))


def save_checkpoint(store: Store, stage: Stage, step: int) -> Path:
    folder = store.create(stage) / "progress" / stage.identity / checkpoints.new_name(step)
    folder.mkdir(parents=True)
    (folder / "rank-00000.safetensors").write_bytes(bytes(1000))
    files = [folder / "rank-00000.safetensors", checkpoints.write_position(folder, Position(step, 10 * step))]
    checkpoints.write_manifest(folder, 0, 1, files)
    checkpoints.mark_complete(folder, 1)
    return folder


def test_what_a_known_experiment_comes_to_stays_with_all_that_it_was_made_from(written):
    finished(written, (0.5, 0.75))
    assert gc.collect(written.store) == []


def test_an_artifact_that_no_experiment_refers_to_is_listed_and_on_demand_removed(written):
    store = written.store
    cells = finished(written)
    (other,) = toy_cells(ratios=(0.75,), methods=("overfill",))
    written.finish(other)
    known = {stage.identity for stage in cells[0].stages}
    unknown = [stage for stage in other.stages if stage.identity not in known]
    assert [stage.name for stage in unknown] == ["prune", "distill", "evaluate", "benchmark"]
    found = gc.collect(store)
    assert paths(found, store) == {str(stage): "no experiment refers to it" for stage in unknown}
    assert all(one.size > 0 for one in found)
    assert len(identities(store)) == 12, "listing removes nothing"
    assert len(delete(store)) == 4
    assert identities(store) == known
    assert {path.name for path in (store.root / ".claims").iterdir()} == known
    assert not (store.root / gc.TRASH).exists()
    for stage in cells[0].stages:
        assert store.verify(stage) is not None
    written.finish(other)  # and it can be built again
    assert len(identities(store)) == 12


def test_a_latency_of_another_machine_is_not_garbage(written):
    store = written.store
    (cell,) = finished(written)
    here = cell.stage("benchmark")
    assert here is not None
    there = Stage(here.name, here.version, here.config | {"device": "a GPU"}, here.inputs, here.function, here.label)
    slower = Stage(here.name, here.version, here.config | {"repeats": 99}, here.inputs, here.function, here.label)
    for stage in (there, slower):
        written.publish(stage, cell)
    assert list(paths(gc.collect(store), store)) == [str(slower)]


def test_what_is_being_built_stays_with_its_inputs(written):
    store = written.store
    finished(written)
    (other,) = toy_cells(ratios=(0.75,), methods=("overfill",))
    for stage in other.stages[:5]:
        written.publish(stage, other)
    building = written.begin(other.stages[5])
    assert other.stages[5].name == "distill"
    assert gc.collect(store) == []
    building.release()
    assert {one.path.parent.name for one in gc.collect(store)} == {"prune", "distill"}


def with_other_values(cells: list[Cell]) -> Experiment:
    """The same file as that of `finished`, with another ratio."""
    return Experiment(
        cells[0].config.model_copy(update={"sweep": sweep_of((0.75,))}),
        toy_cells(ratios=(0.75,), methods=("overfill",)),
    )


def test_what_a_living_driver_has_made_stays_though_its_file_was_run_with_other_values_since(written):
    store, other = written.store, with_other_values(finished(written))
    old = store.root / "tune" / "run-1"
    old.mkdir(parents=True)
    os.utime(old, (1.0, 1.0))
    with at_work(other, store):
        for stage in other.cells[0].stages[:5]:
            written.publish(stage, other.cells[0])
        seen = gc.experiment_files(store)
        assert gc.collect(store) == []
    found = gc.collect(store)
    assert {one.path.parent.name for one in found} == {"prune", "tune"}
    assert store.drivers() == []
    assert len(list(gc.remove(store, found, seen))) == 2, "a driver that has ended since needs nothing more"


def test_what_a_killed_driver_left_protects_nothing_and_goes(written):
    store, other = written.store, with_other_values(finished(written))

    def killed() -> Path:
        if (child := os.fork()) == 0:
            with at_work(other, store):
                os._exit(0)
        os.waitpid(child, 0)
        (folder,) = store.drivers()
        return folder

    written.publish(other.cells[0].stages[4], other.cells[0])
    left = killed()
    reasons = paths(gc.collect(store), store)
    assert reasons.pop(left.relative_to(store.root).as_posix()) == "left by a driver that has ended"
    assert [path.partition("/")[0] for path in reasons] == ["prune"]
    assert len(delete(store)) == 2 and store.drivers() == []
    killed()
    with at_work(other, store):
        assert len(store.drivers()) == 1, "the next driver has cleared it away"
    assert gc.collect(store) == []


def test_a_driver_on_another_host_has_time_for_a_sign_of_life(written, monkeypatch):
    store, other = written.store, with_other_values(finished(written))
    waits = ([], [])
    monkeypatch.setattr(drivers, "WATCH_S", 0.02)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(lease, "host_key", lambda: "elsewhere")
        driver = at_work(other, store)
        driver.__enter__()
    written.publish(other.cells[0].stages[4], other.cells[0])
    (folder,) = store.drivers()
    assert len(gc.collect(Store(store.root, ttl=0.1), say=waits[0].append)) == 2
    beats = iter(range(9))
    file = folder / "attempts" / "0001" / "lease.json"
    moved = lambda _: file.write_text(file.read_text().replace('"beat": "', f'"beat": "{next(beats)}'))  # noqa: E731
    monkeypatch.setattr(drivers.time, "sleep", moved)
    assert gc.collect(store, say=waits[1].append) == []
    driver.__exit__(None, None, None)
    assert waits[0] == waits[1] == ["at work on other hosts: 1; waiting for a sign of life, 90 s at most"]
    assert next(beats) == 1


def test_a_run_says_that_it_is_at_work_before_it_looks(written, monkeypatch):
    store, other = written.store, with_other_values(finished(written))

    class Seen(Exception): ...

    def look(*_: object) -> bool:
        assert [folder.name.rpartition("-")[0] for folder in store.drivers()] == [other.name]
        raise Seen

    monkeypatch.setattr(commands, "is_done", look)
    with pytest.raises(Seen):
        commands.run_experiment(other, store, None, False)
    assert store.drivers() == []


def test_an_artifact_that_is_taken_up_between_listing_and_removing_stays(written):
    store = written.store
    finished(written)
    stage = toy(layers=3)
    folder = store.create(stage)
    before, found = gc.experiment_files(store), gc.collect(store)
    assert [one.path for one in found] == [folder]
    lease = acquire(folder / "attempts", 0)
    assert lease is not None
    assert list(gc.remove(store, found, before)) == []
    assert lease.held()
    lease.release()
    assert [one.path for one in gc.remove(store, found, before)] == [folder]


def test_a_folder_that_goes_between_its_making_and_the_lease_of_its_builder_is_made_again(written, monkeypatch):
    store, stage = written.store, toy(layers=3)
    finished(written)

    def later(attempts: Path, after: int, beat: float) -> lease.Lease | None:
        assert [one.path for one in delete(store)] == [attempts.parent]
        return acquire(attempts, after, beat)

    monkeypatch.setattr(build, "acquire", later)
    building = written.begin(stage)
    assert (building.folder / "identity.json").exists() and building.progress.is_dir()
    assert gc.collect(store) == []
    building.release()


def test_a_driver_that_starts_while_an_artifact_is_removed_never_sees_a_half_of_it(written, monkeypatch):
    store, stage = written.store, toy(layers=3)
    finished(written)
    folder = store.create(stage)
    seen: list[bool] = []

    def look(path: Path, **options) -> None:
        seen.append(folder.exists())
        shutil_rmtree(path, **options)

    shutil_rmtree = shutil.rmtree
    monkeypatch.setattr(gc.shutil, "rmtree", look)
    assert len(delete(store)) == 1
    assert seen == [False], "it had left its place before the first of its files went"


def test_an_experiment_that_begins_meanwhile_ends_the_removal(written):
    store = written.store
    finished(written)
    store.create(toy(layers=3))
    before, found = gc.experiment_files(store), gc.collect(store)
    folder = store.root / "sweeps" / "another"
    folder.mkdir()
    (folder / "experiment.yaml").write_text("name: another\n")
    with pytest.raises(UserError, match="started meanwhile"):
        list(gc.remove(store, found, before))
    assert store.find(toy(layers=3).identity) is not None


def test_an_experiment_file_that_cannot_be_read_ends_it_in_one_line(written, capsys):
    store = written.store
    finished(written)
    store.create(toy(layers=3))
    broken = store.root / "sweeps" / "broken" / "experiment.yaml"
    broken.parent.mkdir()
    broken.write_text("name: broken\nteacher: {model: /nowhere}\n")
    with pytest.raises(SystemExit) as end:
        main(["gc", "--delete", "--store", str(store.root)])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(broken) in error and "/nowhere" in error
    assert store.find(toy(layers=3).identity) is not None


def test_only_older_step_checkpoints_of_an_unfinished_stage_can_go(written):
    store = written.store
    (cell,) = finished(written)
    stage = cell.stage("distill")
    assert stage is not None
    shutil.rmtree(store.payload(stage))
    old, middle, new = (save_checkpoint(store, stage, step) for step in (5, 10, 15))
    assert {one.path for one in gc.collect(store, 1)} == {old, middle}
    assert {one.path for one in gc.collect(store, 2)} == {old}
    (new / "rank-00000.safetensors").write_bytes(b"torn")
    assert {one.path for one in gc.collect(store, 1)} == {old}, "a damaged one is not the one that is kept"
    delete(store)
    assert checkpoints.newest_complete(new.parent, lambda folder, why: None) == middle


def test_all_step_checkpoints_of_a_finished_stage_can_go(written):
    store = written.store
    (cell,) = finished(written)
    stage = cell.stage("distill")
    assert stage is not None
    folder = save_checkpoint(store, stage, 5)
    assert paths(gc.collect(store), store) == {
        folder.parent.relative_to(store.root).as_posix(): "step checkpoints of a finished stage"
    }


def test_leftovers_of_killed_processes_can_go_and_what_is_young_or_in_use_stays(written):
    store = written.store
    (cell,) = finished(written)
    stage, random = cell.stages[0], uuid.uuid4().hex
    folder, sweep = store.folder(stage), store.root / "sweeps" / cell.config.name
    garbage = [
        folder / "staging-0001" / "half",
        folder / "attempts" / f".new-{random}" / "lease.json",
        folder / f".identity.json.{random}",
        folder / "attempts" / "0001" / f".outcome.json.{random}",
        folder / "progress" / f".stopped.json.{random}",
        sweep / f".mlflow.json.{random}",
        store.root / "tune" / "run-1" / "state.json",
        store.root / gc.TRASH / f"{random}-x" / "file",
    ]
    garbage.append(store.root / "tune" / "interrupt-1")
    sound = [sweep / f".table.md.{uuid.uuid4().hex}", store.root / "tune" / "run-2" / "state.json", folder / ".nfs0001"]
    for path in (*garbage, *sound):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1234")
    (folder / f".lease.json-{random}").symlink_to("attempts/0001/lease.json")
    for path in (sweep / f".mlflow.json.{random}", garbage[6], garbage[6].parent, garbage[8]):
        os.utime(path, (time.time() - 2 * gc.STALE_S,) * 2)
    found = {one.path for one in gc.collect(store)}
    roots = {garbage[0].parent, garbage[1].parent, garbage[6].parent, garbage[7].parent}
    assert found == roots | {*garbage[2:6], garbage[8]} | {folder / f".lease.json-{random}"}
    delete(store)
    assert not any(path.exists() for path in garbage)
    assert all(path.exists() for path in sound)
    assert store.verify(stage) is not None
    assert (folder / "lease.json").exists()


def test_nothing_of_a_stage_in_the_making_is_a_leftover(written):
    store = written.store
    (cell,) = finished(written)
    stage = cell.stage("distill")
    assert stage is not None
    shutil.rmtree(store.payload(stage))
    for step in (5, 10):
        save_checkpoint(store, stage, step)
    old = store.root / "tune" / "run-1"
    old.mkdir(parents=True)
    os.utime(old, (1.0, 1.0))
    building = written.begin(stage)
    assert gc.collect(store) == []
    building.release()
    assert len(gc.collect(store)) == 2


def test_two_removals_at_once_do_not_stumble_over_each_other(written, monkeypatch):
    store = written.store
    finished(written)
    folder = store.create(toy(layers=3))
    rmtree, others = shutil.rmtree, []

    def interrupted(path: Path, **options) -> None:
        monkeypatch.setattr(gc.shutil, "rmtree", rmtree)
        others.extend(delete(store))  # takes what is in the trash, and the trash
        rmtree(path, **options)

    before, found = gc.experiment_files(store), gc.collect(store)
    monkeypatch.setattr(gc.shutil, "rmtree", interrupted)
    assert [one.path for one in gc.remove(store, found, before)] == [folder]
    assert [one.reason for one in others] == ["left by a gc that was interrupted"]
    assert list(gc.remove(store, found, before)) == []
    assert not folder.exists() and not (store.root / gc.TRASH).exists()


def test_a_file_that_vanishes_while_ray_tune_is_looked_at_says_that_it_lives(written, monkeypatch):
    store = written.store
    finished(written)
    state = store.root / "tune" / "run-1" / "state"
    state.parent.mkdir(parents=True)
    state.write_text("")
    for path in (state, state.parent):
        os.utime(path, (1.0, 1.0))
    assert [one.path for one in gc.collect(store)] == [state.parent]
    age = gc._age

    def vanishes(path: Path) -> float:
        if path == state:
            state.unlink()
            return age(path)
        return 2 * gc.STALE_S

    monkeypatch.setattr(gc, "_age", vanishes)
    assert gc.collect(store) == []


def test_what_lies_on_another_disk_than_the_store_goes_too(written, monkeypatch):
    store = written.store
    finished(written)
    folder = store.create(toy(layers=3))
    rename = Path.rename

    def of_two_disks(path: Path, target: Path) -> Path:
        if path == folder and target.parent.parent != folder.parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", of_two_disks)
    (folder.parent / gc.TRASH).mkdir()
    (folder.parent / gc.TRASH / "left").write_text("")
    assert {one.path for one in delete(store)} == {folder, folder.parent / gc.TRASH / "left"}
    assert not folder.exists() and not (folder.parent / gc.TRASH).exists()


def test_a_store_that_cannot_be_written_is_one_line(written, monkeypatch, capsys):
    store = written.store
    finished(written)
    folder = store.create(toy(layers=3))

    def refuses(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(gc, "acquire", refuses)
    with pytest.raises(SystemExit) as end:
        main(["gc", "--delete", "--store", str(store.root)])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"overfill: {folder}: Permission denied;") and error.count("\n") == 1


def test_the_command_lists_then_removes_and_needs_no_heavy_library(written):
    store = written.store
    finished(written)
    store.create(toy(layers=3))
    program = (
        "import sys\nfrom pipeline.cli import main\n"
        "try: main(['gc', *sys.argv[1:]])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "loaded = [m for m in ('torch', 'ray', 'mlflow', 'transformers') if m in sys.modules]\n"
        "assert not loaded, loaded"
    )

    def run(*arguments: str) -> str:
        command = [sys.executable, "-c", program, "--store", str(store.root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
        return " ".join(done.stdout.split())

    assert "no experiment refers to it" in (listed := run())
    assert "nothing was removed; --delete removes 1 item," in listed
    assert "removed: 1 item," in run("--delete")
    assert "--delete removes 0 items" in run()
