"""Plans executed: one builder, reuse, resume after kills, failures in one line with the traceback in the log."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import store_toys
from store_toys import chain, toy

from overfill.errors import UserError
from pipeline.build import Build
from pipeline.record import read_json
from pipeline.resume import Facts
from pipeline.runner import RunContext, StageFailed, StageInterrupted, StageStopped, run_graph
from pipeline.stage import External, StageRun, Stopped
from pipeline.store import Store

HERE = Path(__file__).parent
SCRIPT = [sys.executable, str(HERE / "store_toys.py")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)])}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def context(journal: Path | None = None, **options: Any) -> RunContext:
    resources: Mapping[str, Any] = dict.fromkeys(("teacher", "distill", "evaluate"), {"journal": str(journal)})
    return RunContext(resources=resources if journal else {}, poll=0.01, **options)


def built(journal: Path) -> list[str]:
    return [line.split()[0] for line in journal.read_text().splitlines()] if journal.exists() else []


def test_a_graph_runs_in_order_and_a_second_run_does_nothing(store: Store, journal: Path):
    teacher, distill, evaluate = chain()
    first = run_graph([teacher, distill, evaluate], store, context(journal))
    assert built(journal) == ["teacher", "distill", "evaluate"]
    assert run_graph([teacher, distill, evaluate], store, context(journal)) == first
    assert built(journal) == ["teacher", "distill", "evaluate"]


def test_only_what_a_change_touches_is_built_again(store: Store, journal: Path):
    teacher, distill, evaluate = chain()
    run_graph([evaluate], store, context(journal))
    other = toy("evaluate", {"student": distill}, samples=16)
    run_graph([other], store, context(journal))
    changed = toy("distill", {"teacher": teacher}, loss={"kv": 0.0})
    run_graph([toy("evaluate", {"student": changed}, samples=8)], store, context(journal))
    assert built(journal) == ["teacher", "distill", "evaluate", "evaluate", "distill", "evaluate"]


def test_a_stage_gets_the_payloads_of_its_inputs_and_the_locations_of_external_ones(store: Store, tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("external")
    here = External("model", "llama", "abc", str(tmp_path / "model"))
    teacher = toy("teacher", layers=2)
    stage = toy("distill", {"teacher": teacher, "model": here, "device": External("device", "cpu")})
    run_graph([stage], store)
    read = json.loads((store.payload(stage) / "read" / "inputs.json").read_text())
    assert read == {"teacher": '{"layers": 2}', "model": "external"}


def test_callbacks_tell_a_display_what_happens_and_why(store: Store):
    teacher, distill, _ = chain()
    run_graph([teacher], store)
    told: list[str] = []
    run_graph(
        [distill],
        store,
        context(
            on_start=lambda stage, action: told.append(f"start {stage.name}: {action.reason}"),
            on_done=lambda stage, record: told.append(f"done {stage.name} {record.metrics['inputs']}"),
            on_reuse=lambda stage, record: told.append(f"reuse {stage.name} {record.attempt}"),
        ),
    )
    assert told == ["reuse teacher 1", "start distill: no artifact", "done distill 1"]


def test_a_failure_is_one_line_and_its_traceback_is_in_the_log_alone(store: Store, caplog: pytest.LogCaptureFixture):
    stage = toy(does="fail")
    with pytest.raises(StageFailed) as raised:
        run_graph([stage], store)
    failure = raised.value
    log = store.folder(stage) / "attempts" / "0001" / "log.txt"
    assert str(failure) == f"{stage} failed: ValueError: the loss is NaN (log: {log})"
    assert (failure.stage, failure.cause, failure.log) == (stage, "ValueError: the loss is NaN", log)
    assert str(pickle.loads(pickle.dumps(failure))) == str(failure)
    text = log.read_text()
    assert "Traceback (most recent call last):" in text
    assert "in fail" in text and "at step 7" in text
    assert "Traceback" not in caplog.text
    written = read_json(log.with_name("outcome.json"))
    assert (written["status"], written["error"], written["log"]) == ("failed", "ValueError: the loss is NaN", str(log))
    status = store.status(stage)
    assert (status.state, status.error, status.log) == ("failed", "ValueError: the loss is NaN", log)


def test_a_failed_stage_is_tried_again_by_the_next_run_and_not_by_this_one(store: Store):
    stage = toy(does="fail")
    begun = store.ended_attempts([stage])
    for _ in range(2):
        with pytest.raises(StageFailed):
            run_graph([stage], store)
    assert store.status(stage).attempt == 2
    with pytest.raises(StageFailed, match="the loss is NaN"):
        run_graph([stage], store, RunContext(before=begun))
    assert store.status(stage).attempt == 2


@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0])
def test_a_clock_that_jumps_neither_repeats_a_failure_nor_forbids_a_second_try(
    store: Store, monkeypatch: pytest.MonkeyPatch, jump: float
):
    stage, now = toy(does="fail"), time.time
    begun = store.ended_attempts([stage])
    monkeypatch.setattr(time, "time", lambda: now() + jump)
    with pytest.raises(StageFailed):
        run_graph([stage], store, RunContext(before=begun))
    monkeypatch.setattr(time, "time", now)
    for attempts, before in ((1, begun), (2, store.ended_attempts([stage]))):
        with pytest.raises(StageFailed):
            run_graph([stage], store, RunContext(before=before))
        assert store.status(stage).attempt == attempts


def test_what_is_downstream_of_a_failure_is_not_touched(store: Store):
    student = toy("distill", {"teacher": toy("teacher", does="fail")})
    with pytest.raises(StageFailed):
        run_graph([student], store)
    assert not (store.root / "distill").exists()


def test_a_users_mistake_keeps_its_own_words(store: Store, monkeypatch: pytest.MonkeyPatch):
    def mistake(run: StageRun) -> None:
        raise UserError("data.path = x.jsonl: no such file; give a corpus")

    monkeypatch.setattr(store_toys, "write", mistake)
    with pytest.raises(StageFailed) as raised:
        run_graph([toy()], store)
    assert raised.value.cause == "data.path = x.jsonl: no such file; give a corpus"


def test_a_function_that_does_not_exist_fails_its_stage(store: Store):
    with pytest.raises(StageFailed, match="ImportError: store_toys:nothing"):
        run_graph([toy(does="nothing")], store)


def test_what_is_logged_goes_to_the_attempts_log_and_the_root_logger_is_as_before(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    def talk(run: StageRun) -> None:
        logging.getLogger("some.library").info("reading shards")
        logging.getLogger("some.library").debug("too much")

    monkeypatch.setattr(store_toys, "write", talk)
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    stage = toy()
    run_graph([stage], store)
    text = (store.folder(stage) / "attempts" / "0001" / "log.txt").read_text()
    assert "INFO some.library: reading shards" in text
    assert "too much" not in text
    assert (root.level, list(root.handlers)) == before


def test_ctrl_c_keeps_progress_and_gives_the_lease_back(store: Store, monkeypatch: pytest.MonkeyPatch):
    def interrupted(run: StageRun) -> None:
        (run.staging / "half").touch()
        run.log_metrics(1, 10, {"train/loss": 1.0})
        raise KeyboardInterrupt

    monkeypatch.setattr(store_toys, "write", interrupted)
    stage = toy()
    with pytest.raises(KeyboardInterrupt):
        run_graph([stage], store)
    status = store.status(stage)
    assert (status.state, status.error) == ("interrupted", "ended by KeyboardInterrupt")
    assert store.facts(stage).lease == "free"
    assert (store.progress(stage) / "metrics.jsonl").exists()
    assert not list(store.folder(stage).glob("staging-*"))


def test_a_stop_keeps_the_position_publishes_nothing_and_stays_stopped_until_continued(store: Store):
    stage = toy(does="steps")
    with pytest.raises(StageStopped) as raised:
        run_graph([stage], store, RunContext(resources={"teacher": {"stop_at": 1}}))
    assert (raised.value.stage, raised.value.reason) == (stage, "stopped at step 1")
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
    assert (store.status(stage).state, store.record(stage)) == ("stopped", None)
    with pytest.raises(StageStopped, match="stopped at step 1"):
        run_graph([stage], store)
    assert store.status(stage).attempt == 1
    record = run_graph([stage], store, RunContext(continue_stopped=True))[stage.identity]
    assert record.metrics == {"first": 1}
    assert store.status(stage).state == "done"


def test_what_had_to_end_with_its_run_is_interrupted_and_the_next_run_goes_on_by_itself(store: Store):
    stage = toy(does="steps")
    begun = (store.progress(stage) / "metrics.jsonl").exists
    with pytest.raises(StageInterrupted) as raised:
        run_graph([stage], store, RunContext(stop_requested=begun))
    assert (raised.value.stage, raised.value.reason) == (stage, "asked to end: stopped at step 1")
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
    status = store.status(stage)
    assert (status.state, status.error) == ("interrupted", "asked to end: stopped at step 1")
    assert run_graph([stage], store)[stage.identity].metrics == {"first": 1}


def test_what_was_asked_to_end_is_interrupted_also_when_who_asked_is_gone_by_then(store: Store):
    stage = toy(does="steps")
    answers = iter([False, False, True])  # before it begins, at its first step, at its second; then the flag is down
    with pytest.raises(StageInterrupted, match="asked to end: stopped at step 2"):
        run_graph([stage], store, RunContext(stop_requested=lambda: next(answers, False)))
    assert run_graph([stage], store)[stage.identity].metrics == {"first": 2}


def test_a_run_that_shall_end_begins_nothing(store: Store, journal: Path):
    teacher, distill, _ = chain()
    done = (store.payload(teacher) / "record.json").exists
    with pytest.raises(StageInterrupted, match="before it began"):
        run_graph([distill], store, context(journal, stop_requested=done))
    assert built(journal) == ["teacher"]


def test_a_run_that_is_killed_resumes_from_its_step_checkpoint_at_once(store: Store):
    command = [*SCRIPT, "killed_while_training", str(store.root), "4"]
    killed = subprocess.run(command, env=ENVIRONMENT, check=False)
    assert killed.returncode == -signal.SIGKILL
    stage = toy(does="steps")
    status = store.status(stage)
    assert (status.state, status.checkpoint) == ("interrupted", 4)
    assert status.error.endswith("is gone")
    started: list[str] = []
    begun = time.monotonic()
    run_graph([stage], store, RunContext(on_start=lambda _, action: started.append(str(action))))
    assert time.monotonic() - begun < 5.0
    assert started == [f"resume {stage}: from step checkpoint 4 of attempt 1 which was interrupted: {status.error}"]
    record = store.record(stage)
    assert record is not None
    assert (record.metrics, record.attempt) == ({"first": 4}, 2)
    outcomes = [read_json(store.folder(stage) / "attempts" / name / "outcome.json") for name in ("0001", "0002")]
    assert [outcome["status"] for outcome in outcomes] == ["interrupted", "done"]


def test_two_processes_on_one_store_build_once_and_both_have_it(tmp_path: Path):
    command = [*SCRIPT, "build", str(tmp_path), "0.5"]
    both = [subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(process.communicate(timeout=30)[0].strip() for process in both)
    assert said == ["built", "reused"]
    assert built(tmp_path / "journal") == ["teacher"]


def test_a_waiter_takes_over_when_the_builder_is_killed(tmp_path: Path):
    builder = subprocess.Popen([*SCRIPT, "build", str(tmp_path), "60"], env=ENVIRONMENT, stdout=subprocess.PIPE)
    stage, store = toy(does="slow"), Store(tmp_path / "store")
    deadline = time.monotonic() + 20.0
    while not (store.progress(stage) / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    waited: list[str] = []

    def kill(_: Any, action: Any) -> None:
        waited.append(action.reason)
        builder.kill()

    options = {"seconds": 0.0, "journal": str(tmp_path / "journal")}
    run_graph([stage], store, RunContext(resources={"teacher": options}, poll=0.01, on_wait=kill))
    builder.communicate()
    assert len(waited) == 1
    assert waited[0].startswith(f"process {builder.pid} on ")
    assert waited[0].endswith(" is building it (attempt 1)")
    record = store.record(stage)
    assert record is not None
    assert record.attempt == 2


def test_a_builder_that_was_suspended_until_another_took_over_uses_the_others_artifact(tmp_path: Path):
    command = [*SCRIPT, "build_beating_fast", str(tmp_path)]
    builder = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    stage, store = toy(does="slow"), Store(tmp_path / "store", ttl=0.4)
    deadline = time.monotonic() + 20.0
    while not (store.progress(stage) / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    builder.send_signal(signal.SIGSTOP)
    run_graph([stage], store, RunContext(resources={"teacher": {"seconds": 0.0}}, poll=0.02))
    builder.send_signal(signal.SIGCONT)
    assert builder.communicate(timeout=20)[0].strip() == "[2]"
    assert builder.returncode == 0
    assert store.verify(stage) is not None
    outcomes = [read_json(store.folder(stage) / "attempts" / name / "outcome.json") for name in ("0001", "0002")]
    assert [outcome["status"] for outcome in outcomes] == ["interrupted", "done"]
    assert outcomes[0]["error"].startswith("another process has taken over: ")


def test_a_waiter_fails_with_the_builder_and_does_not_try_the_same_again(store: Store):
    stage = toy(does="fail")
    build = Build.begin(store, stage, Facts())
    assert build is not None

    def fail(*_: Any) -> None:
        build.fail("ValueError: the loss is NaN")
        build.release()

    with pytest.raises(StageFailed, match="the loss is NaN"):
        run_graph([stage], store, context(on_wait=fail))
    assert store.status(stage).attempt == 1


def test_a_waiter_can_be_stopped(store: Store):
    stage = toy()
    build = Build.begin(store, stage, Facts())
    assert build is not None
    with pytest.raises(StageInterrupted, match=r"while it waited: process \d+ on .* is building it"):
        run_graph([stage], store, context(stop_requested=lambda: True))
    build.release()


def test_while_one_input_is_built_elsewhere_the_other_is_built_here(store: Store, journal: Path):
    teacher, data = toy("teacher"), toy("distill", kind="data")
    build = Build.begin(store, teacher, Facts())
    assert build is not None

    def finish(*_: Any) -> None:
        if built(journal) == ["distill"] and not build.ended:
            (build.staging / "config.json").write_text("{}")
            build.publish({})
            build.release()

    target = toy("evaluate", {"teacher": teacher, "data": data})
    run_graph([target], store, context(journal, stop_requested=lambda: bool(finish())))
    assert built(journal) == ["distill", "evaluate"]


def test_a_builder_that_lost_its_lease_hears_it_and_uses_what_its_successor_made(
    store: Store, journal: Path, monkeypatch: pytest.MonkeyPatch
):
    stage = toy("teacher", layers=2)
    write = store_toys.write
    heard: list[bool] = []

    def overtaken(run: StageRun) -> dict[str, float | int]:
        heard.append(run.stop_requested())
        successor = Build.begin(store, stage, Facts(lease="dead", attempt=1, error="silent"))
        assert successor is not None
        heard.append(run.stop_requested())
        write(StageRun(stage, {}, successor.staging, successor.progress, successor.lease.folder))
        successor.publish({"by": "successor"})
        successor.release()
        raise Stopped("asked to stop")

    monkeypatch.setattr(store_toys, "write", overtaken)
    record = run_graph([stage], store, context(journal))[stage.identity]
    assert heard == [False, True]
    assert record.metrics == {"by": "successor"}
    assert store.facts(stage).stopped == ""
    first = read_json(store.folder(stage) / "attempts" / "0001" / "outcome.json")
    assert first["status"] == "interrupted"


def test_two_labels_of_one_artifact_at_the_same_time_share_one_folder(store: Store, journal: Path):
    stages = [toy(label=f"sweep-{n}", layers=2) for n in range(4)]
    threads = [threading.Thread(target=run_graph, args=([stage], store, context(journal))) for stage in stages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list((store.root / "teacher").iterdir())) == 1
    assert built(journal) == ["teacher"]


def test_a_sweeps_cells_share_what_is_the_same(store: Store, journal: Path):
    teacher = toy("teacher", layers=2)
    cells = [toy("distill", {"teacher": teacher}, ratio=ratio) for ratio in (0.3, 0.45, 0.6)]
    records = run_graph(cells, store, context(journal))
    assert built(journal) == ["teacher", "distill", "distill", "distill"]
    assert set(records) == {cell.identity for cell in cells}


def test_importing_the_pure_modules_loads_neither_torch_nor_ray_nor_mlflow():
    script = (
        "import sys, pipeline.fingerprint, pipeline.stage, pipeline.store, pipeline.lease, pipeline.runner\n"
        "print([name for name in ('torch', 'ray', 'mlflow', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_full_disk_is_one_line_with_the_way_out(store: Store, monkeypatch: pytest.MonkeyPatch):
    def fill(run: StageRun) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run.staging / "model.safetensors"))

    monkeypatch.setattr(store_toys, "write", fill)
    with pytest.raises(StageFailed) as raised:
        run_graph([toy()], store)
    assert raised.value.cause.endswith("model.safetensors: the disk is full; free some space and run again")
