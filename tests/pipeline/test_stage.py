"""What counts in a stage's identity, and what a stage's function is given."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.stage import External, Stage, StageRun, append_line, resolve, sinks, topological


def stage(name: str = "distill", **changes: Any) -> Stage:
    values: dict[str, Any] = {
        "version": 1,
        "config": {"loss": {"kv": 3.0}, "tokens": 1000},
        "inputs": {"teacher": External("model", "llama", "abc", "/models/llama")},
        "function": "pipeline.stages.distill:run",
        "label": "xyz",
    }
    return Stage(name, **(values | changes))


def test_the_identity_is_pinned_so_that_old_stores_stay_valid():
    assert stage().identity == "2856453ca5f5"


@pytest.mark.parametrize(
    "changed",
    [
        stage("evaluate"),
        stage(version=2),
        stage(config={"loss": {"kv": 0.0}, "tokens": 1000}),
        stage(config={"loss": {"kv": 3.0}, "tokens": 1000.0}),
        stage(config={"loss": {"kv": 3.0}}),
        stage(inputs={}),
        stage(inputs={"student": External("model", "llama", "abc")}),
        stage(inputs={"teacher": External("model", "llama", "abd")}),
        stage(inputs={"teacher": External("model", "llama3", "abc")}),
        stage(inputs={"teacher": External("files", "llama", "abc")}),
        stage(inputs={"teacher": stage()}),
        stage(function="pipeline.stages.distill:run2"),
    ],
)
def test_every_part_of_the_description_counts(changed: Stage):
    assert changed.identity != stage().identity


def test_labels_and_locations_do_not_count():
    elsewhere = {"teacher": External("model", "llama", "abc", "/other/place")}
    assert stage(label="another", inputs=elsewhere) == stage()
    assert len({stage(label="another", inputs=elsewhere), stage()}) == 1


def test_a_change_upstream_changes_everything_downstream():
    def evaluate(kv: float) -> Stage:
        return stage("evaluate", inputs={"student": stage(config={"kv": kv}, label="same")})

    assert evaluate(3.0).identity != evaluate(0.0).identity
    assert evaluate(3.0).identity == evaluate(3.0).identity


def test_the_order_of_inputs_and_of_config_keys_does_not_count():
    a, b = External("x", "a"), External("x", "b")
    assert stage(inputs={"a": a, "b": b}).identity == stage(inputs={"b": b, "a": a}).identity
    assert stage(config={"p": 1, "q": 2}).identity == stage(config={"q": 2, "p": 1}).identity


def test_editing_the_callers_config_afterwards_changes_nothing():
    config: dict[str, Any] = {"loss": {"kv": 3.0}, "prompt": (1, 2)}
    made = stage(config=config)
    before = made.identity
    config["loss"]["kv"] = 0.0
    assert made.config == {"loss": {"kv": 3.0}, "prompt": [1, 2]}
    assert made.identity == before


def test_an_identity_is_the_same_in_another_process_and_through_pickle():
    script = "import pickle, sys; print(pickle.loads(sys.stdin.buffer.read()).identity)"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    sent = pickle.dumps(stage())
    done = subprocess.run([sys.executable, "-c", script], input=sent, env=environment, capture_output=True, check=True)
    assert done.stdout.decode().strip() == stage().identity


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"config": {"loss": {"kv": float("nan")}}}, TypeError, r"config\.loss\.kv is nan"),
        ({"config": {"path": Path("/x")}}, TypeError, r"config\.path is a pathlib"),
        ({"function": "pipeline.stages.distill.run"}, ValueError, r"package\.module:function"),
        ({"name": "../escape"}, ValueError, "stage name"),
        ({"name": ""}, ValueError, "stage name"),
    ],
)
def test_a_malformed_description_is_refused_at_once(changes: dict[str, Any], error: type[Exception], match: str):
    with pytest.raises(error, match=match):
        stage(**{"name": "distill", **changes})


@pytest.mark.parametrize(
    ("label", "folder"),
    [
        ("xyz", "xyz_"),
        ("llama-3.2-3b h0.45/i0.45", "llama-3.2-3b-h0.45-i0.45_"),
        ("../../etc", "etc_"),
        ("", ""),
        ("/", ""),
        ("a" * 300, "a" * 80 + "_"),
    ],
)
def test_a_folder_is_the_label_made_safe_and_the_identity(label: str, folder: str):
    assert stage(label=label).folder_name == folder + stage().identity


def test_topological_gives_every_ancestor_once_inputs_first_and_sinks_what_nobody_reads():
    tokens, teacher = stage("tokens"), stage("teacher", inputs={"tokens": stage("tokens", label="same artifact")})
    student = stage("distill", inputs={"teacher": teacher, "tokens": tokens})
    score, speed = stage("evaluate", inputs={"s": student}), stage("benchmark", inputs={"s": student, "t": teacher})
    assert topological([speed, score]) == [teacher.inputs["tokens"], teacher, student, speed, score]
    assert sinks([tokens, teacher, student, score, speed]) == [score, speed]


def run_of(folder: Path) -> StageRun:
    return StageRun(stage(), {}, folder, folder, folder)


def test_logged_metrics_are_one_line_each(tmp_path: Path):
    run = run_of(tmp_path)
    run.log_metrics(1, 10, {"train/loss": 2}, tokens=16)
    run.log_metrics(2, 10, {"train/loss": float("nan")})
    first, second = (json.loads(line) for line in run.metrics_path.read_text().splitlines())
    assert {key: first[key] for key in ("step", "steps", "tokens", "metrics")} == {
        "step": 1,
        "steps": 10,
        "tokens": 16,
        "metrics": {"train/loss": 2.0},
    }
    assert second["time"] >= first["time"] > 1e9
    assert second["metrics"]["train/loss"] != second["metrics"]["train/loss"]


def test_a_line_after_a_killed_writers_half_line_stands_alone(tmp_path: Path):
    run = run_of(tmp_path)
    run.metrics_path.write_text('{"step": 1, "ste')
    run.log_metrics(2, 10, {"train/loss": 1.0})
    assert json.loads(run.metrics_path.read_text().splitlines()[1])["step"] == 2


def test_a_line_that_does_not_fit_on_the_disk_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, write = tmp_path / "metrics.jsonl", os.write
    path.write_text("first\n")
    room = [8]

    def until_full(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(descriptor, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", until_full)
    with pytest.raises(OSError, match="No space left on device"):
        append_line(path, "longer than what is left")
    assert path.read_text() == "first\n"
    room[0] = 100
    append_line(path, "second")
    assert path.read_text() == "first\nsecond\n"


def test_a_short_write_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    append_line(tmp_path / "metrics.jsonl", "a whole line")
    assert (tmp_path / "metrics.jsonl").read_text() == "a whole line\n"


def test_lines_of_several_writers_do_not_mix(tmp_path: Path):
    import threading

    path = tmp_path / "lines"

    def write(letter: str) -> None:
        for _ in range(50):
            append_line(path, letter * 500)

    writers = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines = path.read_text().splitlines()
    assert len(lines) == 200
    assert set(lines) == {letter * 500 for letter in "abcd"}


def test_a_function_is_found_by_name_and_its_absence_is_said():
    assert resolve("pipeline.stage:resolve") is resolve
    with pytest.raises(ImportError, match=r"module pipeline\.stage has no function nothing"):
        resolve("pipeline.stage:nothing")
    with pytest.raises(ImportError):
        resolve("pipeline.absent:run")
