from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.training import checkpoints
from pipeline.training.checkpoints import Position, StepFolders


def write(root: Path, step: int, ranks: int = 2, marked: bool = True) -> Path:
    """A complete checkpoint with one small file per rank; complete but for its marker if not `marked`."""
    folder = root / checkpoints.new_name(step)
    folder.mkdir(parents=True)
    for rank in range(ranks):
        file = folder / f"rank-{rank:05d}.safetensors"
        file.write_bytes(bytes([rank]) * 100)
        position = [checkpoints.write_position(folder, Position(step=step, tokens=10 * step))] if rank == 0 else []
        checkpoints.write_manifest(folder, rank, ranks, [file, *position])
    if marked:
        checkpoints.mark_complete(folder, ranks)
    return folder


def find(root: Path) -> tuple[Path | None, dict[str, str]]:
    torn: dict[str, str] = {}
    found = checkpoints.newest_complete(root, lambda folder, reason: torn.update({folder.name: reason}))
    return found, torn


def test_the_complete_checkpoint_with_the_most_steps_is_found(tmp_path: Path) -> None:
    for step in (20, 5, 100):
        newest = write(tmp_path, step)
    found, torn = find(tmp_path)
    assert found == newest
    assert torn == {}
    assert checkpoints.read_position(newest) == Position(step=100, tokens=1000)


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert find(tmp_path / "nothing") == (None, {})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "complete.json").unlink(), "complete.json is missing"),
        (lambda folder: (folder / "rank-00001.json").unlink(), "rank-00001.json is missing"),
        (lambda folder: (folder / "rank-00001.safetensors").unlink(), "rank-00001.safetensors is missing"),
        (lambda folder: (folder / "position.json").write_text("{}"), "position.json has 2 bytes"),
        (lambda folder: (folder / "rank-00000.json").write_text('{"files": '), "a manifest is torn"),
        (lambda folder: (folder / "complete.json").write_text("{}"), "a manifest is torn"),
        (lambda folder: (folder / "complete.json").write_text('{"ranks": 0}'), "complete.json says 0 ranks"),
        (lambda folder: (folder / "rank-00001.json").write_text('{"files": {}}'), "says 2 ranks, rank-00001.json none"),
        (lambda folder: (folder / "rank-00000.safetensors").write_bytes(b"x" * 100), "sha256 differs"),
        (lambda folder: (folder / "rank-00000.safetensors").write_bytes(b""), "has 0 bytes, 100 were written"),
    ],
)
def test_a_torn_checkpoint_is_named_with_its_damage_and_the_one_before_is_used(
    tmp_path: Path, damage: object, reason: str
) -> None:
    before, torn = write(tmp_path, 10), write(tmp_path, 20)
    damage(torn)  # type: ignore[operator]
    found, named = find(tmp_path)
    assert found == before
    assert list(named) == [torn.name]
    assert reason in named[torn.name]


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_flipped_bit_of_the_marker_changes_what_is_read(tmp_path: Path, ranks: int) -> None:
    folder = write(tmp_path, 20, ranks)
    files, marker = checkpoints.rank_files(folder), folder / "complete.json"
    content = marker.read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        marker.write_bytes(flipped)
        assert checkpoints.why_incomplete(folder, digests=False) or checkpoints.rank_files(folder) == files


def go_on(root: Path, step: int, keep: int, steps: StepFolders | None = None) -> tuple[Path, StepFolders]:
    """A run that resumes from the newest complete one, unless it has, and writes its next."""
    if steps is None:
        steps = StepFolders(root)
        steps.newest(lambda name, why: None)
    folder = write(root, step, marked=False)
    steps.complete(folder, 2, keep)
    return folder, steps


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_old_and_torn_checkpoints_are_removed_and_foreign_folders_and_newer_ones_stay(tmp_path: Path) -> None:
    torn, _oldest, older = (write(tmp_path, step) for step in (1, 2, 3))
    (torn / "complete.json").unlink()
    steps = StepFolders(tmp_path)
    assert steps.newest(lambda name, why: None) == older.name
    being_written = tmp_path / checkpoints.new_name(5)
    being_written.mkdir()
    (tmp_path / "notes").mkdir()
    newest, _ = go_on(tmp_path, 4, 2, steps)
    assert names(tmp_path) == {older.name, newest.name, being_written.name, "notes"}


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_ones_that_were_skipped_make_room_for_the_run_that_goes_on(tmp_path: Path, keep: int) -> None:
    whole = write(tmp_path, 100)
    for step in (400, 600):
        (write(tmp_path, step) / "rank-00000.safetensors").write_bytes(b"x" * 100)
    first, steps = go_on(tmp_path, 200, keep)
    assert names(tmp_path) == {first.name, *([whole.name] if keep == 2 else [])}
    second, _ = go_on(tmp_path, 300, keep, steps)
    assert names(tmp_path) == {second.name, *([first.name] if keep == 2 else [])}


def test_a_late_writer_that_was_given_up_removes_nothing_of_its_successor(tmp_path: Path) -> None:
    write(tmp_path, 10)
    _, late = go_on(tmp_path, 20, 2)
    successors = {go_on(tmp_path, step, 2)[0].name for step in (40, 50)}
    own, _ = go_on(tmp_path, 30, 2, late)
    assert names(tmp_path) == {*successors, own.name}


def content(path: Path) -> bytes | set[str]:
    return names(path) if path.is_dir() else path.read_bytes()


def test_before_an_older_checkpoint_goes_all_of_the_new_one_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, lines = tmp_path / "run", tmp_path / "metrics.jsonl"
    write(root, 10)
    lines.write_text("one line\n")
    steps = StepFolders(root)
    assert steps.newest(lambda name, why: None)
    new = write(root, 20, marked=False)
    on_disk: dict[Path, bytes | set[str]] = {}
    there: dict[Path, bytes | set[str]] = {}
    monkeypatch.setattr(checkpoints, "sync", lambda path: on_disk.update({path: content(path)}))

    def look(folder: Path, ignore_errors: bool) -> None:
        there.update({path: content(path) for path in (lines, root, new, *new.iterdir())})
        assert there.items() <= on_disk.items()

    monkeypatch.setattr(checkpoints.shutil, "rmtree", look)
    for rank, also in enumerate([["position"], []]):
        steps.sent(new, [file for file in new.iterdir() if file.stem in (f"rank-{rank:05d}", *also)])
    steps.complete(new, 2, 1)
    assert {path.name for path in there} > {"complete.json", "position.json", "rank-00001.safetensors"}


def test_who_has_lost_the_lease_removes_nothing_of_what_its_successor_writes(tmp_path: Path) -> None:
    before = write(tmp_path, 100)
    lost, successor = StepFolders(tmp_path), StepFolders(tmp_path)
    for steps in (lost, successor):
        assert steps.newest(lambda name, why: None) == before.name
    being_written = write(tmp_path, 110, marked=False)
    ahead, _ = go_on(tmp_path, 300, 1, lost)
    assert names(tmp_path) == {being_written.name, ahead.name}
    successor.complete(being_written, 2, 1)
    own, _ = go_on(tmp_path, 120, 1, successor)
    assert names(tmp_path) == {own.name, ahead.name}


def test_two_checkpoints_of_one_step_have_different_names() -> None:
    assert checkpoints.new_name(7) != checkpoints.new_name(7)
    assert checkpoints.step_of(Path(checkpoints.new_name(123456789))) == 123456789
    assert checkpoints.step_of(Path("step-7")) is None
