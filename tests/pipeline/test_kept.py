"""What is left to go on from, as status and plans tell it: by names and sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_toys import toy

from pipeline import kept
from pipeline.harness.shards import Answers, Shard, keep
from pipeline.kept import Kept, look
from pipeline.lease import acquire
from pipeline.resume import plan
from pipeline.runner import RunContext, StageStopped, run_graph
from pipeline.stage import Stage
from pipeline.store import Store
from pipeline.training import checkpoints
from pipeline.watch import _reason


def checkpoint(root: Path, step: int) -> Path:
    """A whole step checkpoint with one file."""
    folder = root / checkpoints.new_name(step)
    folder.mkdir(parents=True)
    file = folder / "rank-00000.safetensors"
    file.write_bytes(b"x" * 100)
    checkpoints.write_manifest(folder, 0, 1, [file])
    checkpoints.mark_complete(folder, 1)
    return folder


@pytest.fixture
def stopped(tmp_path: Path) -> tuple[Store, Stage]:
    """A stage that was stopped at its second step, with a step checkpoint of each."""
    store, stage = Store(tmp_path / "runs"), toy(does="steps")
    with pytest.raises(StageStopped):
        run_graph([stage], store, RunContext(resources={"teacher": {"stop_at": 2}}))
    return store, stage


def test_nothing_is_left_where_nothing_was(tmp_path: Path):
    assert look(tmp_path / "absent") == look(tmp_path) == Kept()


def test_the_newest_whole_step_checkpoint_counts_and_newer_torn_ones_are_named(tmp_path: Path):
    checkpoint(tmp_path / "a", 200)
    cut, unmarked = checkpoint(tmp_path / "a", 1000), checkpoint(tmp_path / "a", 99_999_999_999)
    (cut / "rank-00000.safetensors").write_bytes(b"x" * 7)
    (unmarked / "complete.json").unlink()
    (tmp_path / "a" / "other").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    found = look(tmp_path)
    assert found.checkpoint == 200
    assert found.torn == (
        f"{unmarked.name} (complete.json is missing), {cut.name} (rank-00000.safetensors has 7 bytes, 100 were written)"
    )


@pytest.mark.parametrize("marker", ['{"ranks": [1]}', "[]", "5", '{"ranks": 1}', "[" * 100_000])
def test_what_a_hand_has_written_is_named_too_and_nothing_raises(tmp_path: Path, marker: str):
    folder = checkpoint(tmp_path / "a", 4)
    (folder / "complete.json").write_text(marker)
    (folder / "rank-00000.json").unlink()
    (folder / "rank-00000.json").mkdir()
    assert look(tmp_path).checkpoint is None
    assert look(tmp_path).torn.startswith(f"{folder.name} (")


def test_shards_of_tasks_are_counted_by_their_names(tmp_path: Path):
    for shard in (Shard("one", 0, 4), Shard("one", 4, 8), Shard("two", 0, 3)):
        keep(tmp_path, shard, Answers())
    assert look(tmp_path) == Kept(shards="3 finished shards with 11 documents")
    keep(tmp_path, Shard("one", 2, 5), Answers())  # another size of shards
    (tmp_path / "shards" / "0123456789ab").mkdir()
    (tmp_path / "shards" / "0123456789ab" / "note.json").touch()
    line = '{"step": 11, "steps": 40, "tokens": 0, "time": 1.0, "metrics": {}}'
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    assert look(tmp_path).shards == "4 finished shards with 11 of 40 documents"


def test_plan_and_status_name_a_torn_checkpoint_and_from_where_it_goes_on(stopped: tuple[Store, Stage]):
    store, stage = stopped
    (root,) = (path for path in store.progress(stage).iterdir() if path.is_dir())
    (action,) = plan([stage], store.gather([stage]), continue_stopped=True)
    assert str(action) == f"resume {stage}: from step checkpoint 2 of attempt 1: stopped at step 2"
    assert _reason(store.status(stage)) == "stopped at step 2"
    newest = max(root.iterdir())
    (newest / "complete.json").unlink()
    (action,) = plan([stage], store.gather([stage]), continue_stopped=True)
    torn = f"{newest.name} (complete.json is missing)"
    assert str(action) == f"resume {stage}: from step checkpoint 1 of attempt 1: stopped at step 2; not whole: {torn}"
    assert _reason(store.status(stage)) == f"stopped at step 2; it goes on from step 1, for this is not whole: {torn}"
    for folder in root.iterdir():
        (folder / "complete.json").unlink(missing_ok=True)
    (action,) = plan([stage], store.gather([stage]), continue_stopped=True)
    assert action.kind == "run" and action.reason.startswith("no artifact; attempt 1: stopped at step 2; not whole: ")
    assert "it begins anew" in _reason(store.status(stage))


def test_a_stage_of_tasks_with_finished_shards_is_resumed(stopped: tuple[Store, Stage]):
    store, _ = stopped
    stage = toy(label="tasks", does="write")
    lease = acquire(store.create(stage) / "attempts", 0)
    assert lease is not None
    lease.release()
    keep(store.progress(stage), Shard("one", 0, 4), Answers())
    (action,) = plan([stage], store.gather([stage]))
    assert action.kind == "resume"
    assert action.reason.startswith("behind 1 finished shard with 4 documents of attempt 1 which was interrupted")


def test_nobody_looks_into_what_another_process_is_writing(stopped: tuple[Store, Stage], monkeypatch):
    store, stage = stopped
    monkeypatch.setattr(kept, "look", lambda progress: pytest.fail("it is not whole yet"))
    lease = acquire(store.folder(stage) / "attempts", 1)
    assert lease is not None
    assert store.status(stage).state == "running"
    lease.release()
