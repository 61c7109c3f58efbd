"""What a report gets of a cell's tasks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from synthetic_store import SAMPLES, SyntheticStore, outcomes, toy_cells

from overfill.errors import UserError
from pipeline.harness import results
from pipeline.harness.results import METRICS_FILE, Metrics, Named, Scored, TaskResult, samples_schema

TASKS = ["toy_get", "toy_sort"]


def cell_of():
    return toy_cells(evaluate={"tasks": TASKS})[0]


def test_metrics_and_scores_of_each_task_are_told(tmp_path: Path):
    invented, cell = SyntheticStore(tmp_path), cell_of()
    assert results.task_metrics(cell, invented.store) == []
    assert results.primary_metrics(cell, invented.store) == results.task_scores(cell, invented.store) == {}
    with pytest.raises(UserError, match="its tasks are not evaluated yet"):
        results.task_samples(cell, invented.store)
    invented.finish(cell, outcomes(50))
    metrics = results.task_metrics(cell, invented.store)
    assert [(metric.key, metric.value, metric.samples) for metric in metrics] == [
        ("toy_get/exact_match", 50 / SAMPLES, SAMPLES),
        ("toy_sort/perplexity", 3.5, SAMPLES),
    ]
    assert list(results.primary_metrics(cell, invented.store)) == TASKS
    ((task, scores),) = results.task_scores(cell, invented.store).items()
    assert (task, scores["49"], scores["50"], len(scores)) == ("toy_get", 1.0, 0.0, SAMPLES)
    assert results.task_samples(cell, invented.store).num_rows == 2 * SAMPLES


def published(tmp_path: Path, metrics: Metrics, rows: list[dict]) -> tuple:
    """A cell whose tasks have these results."""
    invented, cell = SyntheticStore(tmp_path), cell_of()
    build = invented.begin(cell.stage("tasks"))
    (build.staging / METRICS_FILE).write_text(metrics.model_dump_json())
    parquet.write_table(pa.Table.from_pylist(rows, schema=samples_schema()), build.staging / "samples.parquet")
    build.publish({})
    build.release()
    return cell, invented.store


def result(*metrics: tuple[str, str, float], is_group: bool = False) -> TaskResult:
    scored = [Scored(metric=m, filter=f, value=v, stderr=None, higher_is_better=True) for m, f, v in metrics]
    return TaskResult(version="1", num_fewshot=0, samples=2, truncated=0, is_group=is_group, metrics=scored)


def row(task: str, sample: int, score: float | None, chosen: str = "none") -> dict:
    return {"task": task, "sample": sample, "filter": chosen, "score": score}


def test_a_groups_scores_are_those_of_its_tasks_and_a_tags_are_its_tasks_own(tmp_path: Path):
    metrics = Metrics(
        tasks={
            "a": result(("acc", "none", 0.5)),
            "b": result(("acc", "none", 1.0)),
            "all": result(("acc", "none", 0.75), is_group=True),
        },
        named={"all": Named(results=["all"], tasks=["a", "b"]), "tag": Named(results=["a"], tasks=["a"])},
    )
    rows = [row("a", 0, 1.0), row("a", 1, 0.0), row("b", 0, 1.0)]
    cell, store = published(tmp_path, metrics, rows)
    assert results.task_scores(cell, store) == {
        "all": {"a/0": 1.0, "a/1": 0.0, "b/0": 1.0},
        "a": {"0": 1.0, "1": 0.0},
    }
    assert list(results.primary_metrics(cell, store)) == ["all", "a"]


def test_the_first_filter_is_a_metrics_own_and_scores_that_are_no_numbers_are_left_out(tmp_path: Path):
    metrics = Metrics(
        tasks={
            "gsm": result(("exact_match", "strict", 0.5), ("exact_match", "flexible", 1.0)),
            "text": result(("perplexity", "none", 9.0)),
        },
        named={name: Named(results=[name], tasks=[name]) for name in ("gsm", "text")},
    )
    rows = [row("gsm", 0, 0.0, "strict"), row("gsm", 0, 1.0, "flexible"), row("text", 0, None)]
    cell, store = published(tmp_path, metrics, rows)
    keys = [metric.key for metric in results.task_metrics(cell, store)]
    assert keys == ["gsm/exact_match", "gsm/exact_match/flexible", "text/perplexity"]
    assert results.task_scores(cell, store) == {"gsm": {"0": 0.0}}
    assert set(results.record_metrics(metrics)) == {
        *("eval/gsm/exact_match", "eval/gsm/exact_match/flexible", "eval/gsm/samples"),
        *("eval/text/perplexity", "eval/text/samples"),
    }


def test_names_that_mlflow_refuses_are_changed():
    metrics = Metrics(tasks={"code": result(("pass@1", "none", 0.5))}, named={})
    assert set(results.record_metrics(metrics)) == {"eval/code/pass_1", "eval/code/samples"}


def test_reading_results_loads_neither_torch_nor_lm_eval():
    program = (
        "import sys, pipeline.harness.results\n"
        "assert not {'torch', 'lm_eval', 'datasets', 'pandas', 'ray'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[3]
    )
    assert done.returncode == 0, done.stderr
