"""The harness itself: that it sees what is wrong, and that it strikes what it should."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from synthetic_store import SyntheticStore, toy_cells

from pipeline.experiment import Experiment, keep_experiment
from pipeline.lease import acquire
from tests.faults import tally
from tests.faults.chain import Injection, Outcome, draw_chain, expected_after, kind_of
from tests.faults.place import STAGES, STEPS, Driver, Left, Place, name_of
from tests.faults.strikes import FAULTS, Target, flip_in_student
from tests.faults.surroundings import Surroundings, WithClock
from tests.faults.tally import Verdict
from tests.faults.verdict import Result, _files, _steps, differences, leftovers


@pytest.fixture
def written(tmp_path: Path) -> SyntheticStore:
    """The store of a sweep of one cell that is done."""
    written = SyntheticStore(tmp_path / "runs")
    (cell,) = toy_cells(methods=("overfill",))
    written.finish(cell)
    keep_experiment(Experiment(cell.config, [cell]), written.store)
    return written


def result_of(store: Path) -> Result:
    return Result(_files(store), _steps(store), {"child train/loss": [1, 2]})


def folder_of(store: Path, stage: str) -> Path:
    return next(path for path in store.glob(f"{stage}/*") if path.is_dir())


def test_a_sound_store_has_nothing_to_complain_of(written):
    root = written.store.root
    assert leftovers(root) == []
    assert {name.partition("/")[0] for name in _files(root)} == set(STAGES) - {"benchmark"}
    assert differences(result_of(root), result_of(root)) == []


def test_every_kind_of_leftover_is_seen(written):
    root = written.store.root
    (folder_of(root, "data") / "staging-0001").mkdir()
    damaged = next((folder_of(root, "prune") / "payload" / "model").iterdir())
    content = bytearray(damaged.read_bytes())
    content[0] ^= 1
    damaged.write_bytes(content)
    lease = acquire(folder_of(root, "teacher") / "attempts", 1)
    assert lease is not None
    told = "\n".join(leftovers(root))
    lease.release()
    assert "garbage: data/" in told and "staging-0001" in told
    assert "config.json has another SHA-256" in told
    assert f"{name_of(folder_of(root, 'teacher'))}: its lease is held" in told
    (folder_of(root, "evaluate") / "payload").rename(root / "gone")
    assert f"{name_of(folder_of(root, 'evaluate'))}: there is no artifact" in leftovers(root)
    assert "distill: 1 artifacts instead of 2" in leftovers(root, cells=2)


def test_another_file_another_loss_and_a_step_that_is_there_twice_are_seen(written):
    root = written.store.root
    sound = result_of(root)
    distill = name_of(folder_of(root, "distill"))
    assert sound.steps[distill]["3 train/loss"] == [json.dumps(10.0 / 3)]
    metrics = folder_of(root, "distill") / "progress" / "metrics.jsonl"
    again = {"step": 3, "steps": 10, "tokens": 300, "time": 0.0, "metrics": {"train/loss": 3.5}}
    with metrics.open("a") as stream:
        stream.write(json.dumps(again) + "\n")
    assert differences(sound, result_of(root)) == [
        f"{distill}: 3 train/loss is ['{10.0 / 3}', '3.5'], not ['{10.0 / 3}']"
    ]
    data = name_of(folder_of(root, "data"))
    other = replace(sound, files=sound.files | {data: sound.files[data] | {"note.txt": "0" * 64}})
    assert differences(sound, other) == [f"{data}: note.txt is another file than that of the unbroken run"]
    doubled = replace(sound, history={"child train/loss": [1, 2, 2]})
    assert differences(sound, doubled) == ["MLflow: child train/loss has the steps [1, 2, 2], not [1, 2]"]


def test_a_chain_is_drawn_from_its_seed_in_the_order_of_the_stages():
    for seed in range(40):
        chain = draw_chain(Random(seed), 5)
        assert chain == draw_chain(Random(seed), 5)
        assert [one.stage for one in chain] == sorted((one.stage for one in chain), key=STAGES.index)
        assert {one.fault.kind for one in chain} <= {kind_of(chain), "plain"}
        for one in chain:
            assert one.stage in one.fault.stages
            assert one.step < STEPS.get(one.stage, 1)
            assert not one.fault.at_step or one.step >= one.fault.at_step


def test_what_was_injected_seldom_is_drawn_rather():
    injected = {fault.name: 10 for fault in FAULTS} | {"disk full": 1, "SIGTERM": 1}
    drawn = Counter(one.fault.name for seed in range(50) for one in draw_chain(Random(seed), 5, FAULTS, injected))
    assert {name for name, _ in drawn.most_common(2)} == {"disk full", "SIGTERM"}


def test_a_torn_checkpoint_takes_back_what_was_expected_of_a_training_that_has_not_begun_since():
    saved, torn, again = (Left(Path("distill/a"), *numbers) for numbers in ((1, 12), (1, 8), (2, 8)))
    other = Left(Path("teacher/a"), 1, 16)
    assert expected_after([saved, other], [torn], torn=True) == [other, torn]
    assert expected_after([saved, other], [again], torn=True) == [saved, other, again]
    assert expected_after([saved], [torn], torn=False) == [saved, torn]


def test_both_cells_of_two_must_have_a_stage_and_the_open_one_is_damaged(tmp_path):
    place = Place(tmp_path / "place", cells=2)
    assert "distill.method: [overfill, pruned]" in (place.folder / "faults.yaml").read_text()
    for label in ("a_012345678901", "b_012345678902"):
        for stage in ("distill", "evaluate"):
            (place.store / stage / label / "attempts").mkdir(parents=True)
            (place.store / stage / label / "payload" / "model").mkdir(parents=True)
            (place.store / stage / label / "payload" / "model" / "model.safetensors").write_bytes(bytes(100))
        (place.store / "distill" / label / "payload" / "record.json").touch()
    assert place.finished("distill") and not place.finished("evaluate")
    (place.store / "evaluate" / "a_012345678901" / "payload" / "record.json").touch()
    assert not place.finished("evaluate")
    for seed in range(5):
        hit = flip_in_student(Target(place, Surroundings(place), "evaluate", Random(seed)))
        assert hit is not None and hit.endswith("of distill/b_012345678902 model.safetensors")


def test_the_whole_session_of_a_driver_dies_with_its_machine(tmp_path):
    script = "import subprocess, sys; subprocess.Popen(['sleep', '60'], process_group=0); print(flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    driver = Driver(process, tmp_path / "output")
    deadline = time.monotonic() + 10
    while not any("sleep 60" in line for line in driver.processes().values()):
        assert time.monotonic() < deadline, (
            "a program's command line is empty for a moment after its start, not for long"
        )
        time.sleep(0.01)
    assert len(driver.processes()) == 2
    began = time.monotonic()
    driver.kill_all()
    assert not driver.processes()
    assert time.monotonic() - began < 10


def test_what_is_around_a_run_is_prepared_and_a_clock_can_be_set(tmp_path):
    place = Place(tmp_path / "place")
    with WithClock(place) as around:
        program = (
            f"import time; print(round(time.time() - {time.time()}, -1), round(time.time_ns() / 1e9 - time.time()))"
        )

        def ahead() -> str:
            command = [sys.executable, "-c", program]
            return subprocess.run(
                command, env=place.variables(), capture_output=True, text=True, check=True
            ).stdout.strip()

        assert ahead().split() == ["0.0", "0"]
        around.set_clock(-86_400.0)
        assert ahead().split() == ["-86400.0", "0"]


def test_the_table_counts_over_calls_and_every_fault_of_a_lost_run_as_lost(tmp_path):
    first, second = FAULTS[0], FAULTS[1]
    well = Outcome("plain", [(Injection(first, "data"), "driver"), (Injection(second, "data"), "9 processes")])
    lost = Outcome("plain", [(Injection(first, "data"), "driver")], problems=["data: its lease is held"])
    for seed, outcome in (("0-1-0", well), ("0-2-0", lost)):
        tally.append(tmp_path, Verdict.of(outcome, seed, "abc"))
    tally.append(tmp_path, Verdict("0-1-1", "abc", "disk", unavailable="mount is not permitted"))
    verdicts = tally.read(tmp_path)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tally.table(verdicts, FAULTS[:2]).splitlines()]
    assert rows[2:] == [[first.name, "2", "1", "1"], [second.name, "1", "1", "0"], ["all", "3", "2", "1"]]
    summary = tally.summary(verdicts)
    assert (summary["injected"], summary["recovered"], summary["lost"], summary["runs"]) == (3, 2, 1, 2)
    assert summary["problems"] == ["0-2-0: data: its lease is held"]
    assert summary["skipped"] == {"disk": "mount is not permitted"}
