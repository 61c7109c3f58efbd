"""The stage of the tasks in this process: workers' parts, going on after a kill, and what is published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_toys import DOCUMENTS, TASKS, assert_close, model, tokenizer, write_tasks

from overfill.checkpoint import FullModel, Manifest, weights_digest, write_manifest
from overfill.config import PruneConfig
from overfill.errors import UserError
from overfill.importance import ImportanceAccumulator
from overfill.shapes import ModelShape, resolve_widths
from overfill.surgery import prune_folder
from pipeline.config import StageResources
from pipeline.harness import shards
from pipeline.harness.results import METRICS_FILE, SAMPLES_FILE, Metrics
from pipeline.stage import External, Stage, StageRun
from pipeline.stages import tasks

DOCUMENTS_IN_ALL = len(DOCUMENTS) * len(TASKS)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inputs")
    teacher = root / "teacher" / "model"
    model().save_pretrained(teacher)
    tokenizer().save_pretrained(teacher)
    return {"teacher": root / "teacher", "task_files": write_tasks(root / "mine")}


@pytest.fixture(scope="module")
def unpruned(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with all of the full model's channels, in an order of its own."""
    full, folder = model(), tmp_path_factory.mktemp("student")
    tokens = torch.randint(5, 40, (4, 9), generator=torch.Generator().manual_seed(1))
    with ImportanceAccumulator(full) as importance:
        importance.update(tokens, torch.ones_like(tokens))
    shape, teacher = ModelShape.from_config(full.config.to_dict()), inputs["teacher"] / "model"
    widths = resolve_widths(shape, PruneConfig(hidden=0.0, intermediate=0.0))
    kept = prune_folder(teacher, importance.scores(), widths, folder / "model")
    named = FullModel(id=str(teacher), digest=weights_digest(teacher))
    write_manifest(folder / "model", Manifest.of(named, shape.architecture, widths, kept))
    return folder


def stage_run(root: Path, inputs: dict[str, Path], **config: Any) -> StageRun:
    settings = {"tasks": sorted(TASKS), "system": "full", "dtype": "fp32", "refresh": "none", "weights": "stored"}
    settings |= {"task_samples": None, "template": None} | config
    sources = {name: External("files", name, location=str(path)) for name, path in inputs.items()}
    stage = Stage("tasks", 1, settings, sources, "pipeline.stages.tasks:run", "toy")
    folders = {name: root / name for name in ("staging", "progress", "attempt")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    return StageRun(stage, inputs, **folders, resources=StageResources(micro_batch=1))


def lines(run: StageRun) -> list[tuple[int, int]]:
    read = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    return [(line["step"], line["steps"]) for line in read]


def test_two_workers_share_out_the_documents_and_one_evaluates_them(tmp_path, inputs):
    run, alone = stage_run(tmp_path / "two", inputs), stage_run(tmp_path / "one", inputs)
    for worker in (1, 0):
        tasks.answer_shards(run, worker, 2)
    tasks.answer_shards(alone, 0, 1)
    steps = lines(run)
    assert steps[-1] == (DOCUMENTS_IN_ALL, DOCUMENTS_IN_ALL)
    assert [step for step, _ in steps] == sorted(step for step, _ in steps)
    metrics = tasks.evaluate_answers(run)
    assert metrics == tasks.evaluate_answers(alone)
    assert {"eval/choose/acc", "eval/roll/byte_perplexity", "eval/write/exact_match"} <= metrics.keys()
    assert {path.name for path in run.staging.iterdir()} == {METRICS_FILE, SAMPLES_FILE}
    assert set(Metrics.model_validate_json((run.staging / METRICS_FILE).read_bytes()).named) == set(TASKS)


def test_a_killed_run_goes_on_behind_its_finished_shards(tmp_path, inputs, monkeypatch):
    run = stage_run(tmp_path, inputs)
    answer, calls = shards.answer, []

    def killed_at_the_third(lm, documents):
        calls.append([requests[0].doc_id for requests in documents])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(lm, documents)

    monkeypatch.setattr(shards, "answer", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        tasks.answer_shards(run, 0, 1)
    assert len(list((run.progress / "shards").glob("*/*.json"))) == 2
    with pytest.raises(RuntimeError, match="documents are answered"):
        tasks.evaluate_answers(run)
    tasks.answer_shards(run, 0, 1)
    assert sum(map(len, calls[:2])) + sum(map(len, calls[3:])) == DOCUMENTS_IN_ALL, "nothing is answered twice"
    unbroken = stage_run(tmp_path / "unbroken", inputs)
    tasks.answer_shards(unbroken, 0, 1)
    assert tasks.evaluate_answers(run) == tasks.evaluate_answers(unbroken)


def test_nothing_is_loaded_when_all_is_answered(tmp_path, inputs, monkeypatch):
    run = stage_run(tmp_path, inputs, tasks=["write"])
    tasks.answer_shards(run, 0, 1)
    monkeypatch.setattr(tasks, "load_system", lambda *_: pytest.fail("a model was loaded"))
    tasks.answer_shards(run, 0, 1)


@pytest.mark.parametrize("refresh", ["none", 2, "exact"])
def test_a_student_that_is_the_full_model_has_the_full_models_results_sample_by_sample(
    tmp_path, inputs, unpruned, refresh
):
    """Exactly, and whichever way the full model is asked again."""
    import pyarrow.parquet as parquet

    full = stage_run(tmp_path / "full", inputs)
    same = stage_run(tmp_path / "same", inputs | {"student": unpruned}, system="overfill", refresh=refresh)
    tables = []
    for run in (full, same):
        tasks.answer_shards(run, 0, 1)
        tasks.evaluate_answers(run)
        tables.append(parquet.ParquetFile(run.staging / SAMPLES_FILE).read())
    if refresh == "none":
        assert tables[0] == tables[1]
        return
    for one, other in zip(*(table.to_pylist() for table in tables), strict=True):
        if one["task"] == "write":
            assert one == other
        elif one["task"] != "draw":  # exact mode draws other tokens, with the same probabilities
            assert_close(json.loads(one["responses"]), json.loads(other["responses"]))


def test_a_tokenizer_without_a_template_is_told_in_one_line(tmp_path, inputs):
    bare = tokenizer()
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="evaluate.chat_template: this tokenizer has no chat template"):
        tasks.answer_shards(stage_run(tmp_path, inputs | {"teacher": tmp_path / "bare"}), 0, 1)
