"""What the stage `tasks` has found for a cell, read from the store. Needs neither torch nor lm_eval."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from overfill.errors import UserError

if TYPE_CHECKING:
    from pipeline.store import Store
    from pipeline.sweep import Cell

STAGE, METRICS_FILE, SAMPLES_FILE = "tasks", "metrics.json", "samples.parquet"


class _Kept(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, ser_json_inf_nan="constants")


class Scored(_Kept):
    """A metric of a task under one of its filters."""

    metric: str
    filter: str
    value: float
    """As the task aggregates it."""
    stderr: float | None
    """Standard error; None where there is none."""
    higher_is_better: bool | None


class TaskResult(_Kept):
    """A task or group."""

    version: str
    """The task's own, from its YAML."""
    num_fewshot: int | None
    samples: int
    """Documents."""
    truncated: int
    """Contexts that were cut from the left, because the models have too few positions."""
    is_group: bool
    """Whether it is an aggregate over other tasks, without samples of its own."""
    metrics: list[Scored]
    """The task's own order; the first is its primary one."""

    def key(self, scored: Scored, suffix: str = "") -> str:
        """`exact_match` for a metric's first filter, `exact_match/flexible-extract` for its others; the suffix goes behind
        the metric's name."""
        first = next(other for other in self.metrics if other.metric == scored.metric)
        name = scored.metric + suffix
        return name if scored.filter == first.filter else f"{name}/{scored.filter}"


class Named(_Kept):
    """What a name in `evaluate.tasks` stands for."""

    results: list[str]
    """Tasks or the group that have its result."""
    tasks: list[str]
    """Tasks that have its samples."""


class Metrics(_Kept):
    """`metrics.json`."""

    tasks: dict[str, TaskResult]
    """By task or group."""
    named: dict[str, Named]
    """By name in `evaluate.tasks`."""


def samples_schema() -> Any:
    """Columns of `samples.parquet`."""
    import pyarrow as pa

    texts = ("prompt", "target", "response", "answer", "metrics", "requests", "responses", "document", "digest")
    first = [("task", pa.string()), ("sample", pa.int64()), ("filter", pa.string()), ("score", pa.float64())]
    return pa.schema([*first, *((name, pa.string()) for name in texts)])


def record_metrics(metrics: Metrics) -> dict[str, float | int | str]:
    """`eval/<task>/<metric>` and more, under names that MLflow takes."""
    found: dict[str, float | int | str] = {}
    for task, result in metrics.tasks.items():
        for scored in result.metrics:
            found[f"eval/{task}/{result.key(scored)}"] = scored.value
            if scored.stderr is not None:
                found[f"eval/{task}/{result.key(scored, '_stderr')}"] = scored.stderr
        found[f"eval/{task}/samples"] = result.samples
        if result.truncated:
            found[f"eval/{task}/truncated"] = result.truncated
    return {re.sub(r"[^A-Za-z0-9_\-. :/]", "_", name): value for name, value in found.items()}


@dataclass(frozen=True)
class TaskMetric:
    """A number of a report."""

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    samples: int
    higher_is_better: bool
    is_group: bool
    key: str
    """`gsm8k_cot_llama/exact_match`; with the filter behind it, where it is not the metric's first."""


def task_metrics(cell: Cell, store: Store) -> list[TaskMetric]:
    """Every metric of every task and group, a task's primary one first; empty while there are none."""
    found = read_metrics(cell, store)
    if found is None:
        return []
    return [_metric(task, result, scored) for task, result in found.tasks.items() for scored in result.metrics]


def primary_metrics(cell: Cell, store: Store) -> dict[str, TaskMetric]:
    """The primary metric of each name in `evaluate.tasks`; of a tag, which has no result of its own, those of its tasks."""
    found = read_metrics(cell, store)
    if found is None:
        return {}
    shown = [name for named in found.named.values() for name in named.results if name in found.tasks]
    return {name: _metric(name, found.tasks[name], found.tasks[name].metrics[0]) for name in shown}


def task_scores(cell: Cell, store: Store) -> dict[str, dict[str, float]]:
    """{name as in `primary_metrics`: {sample: score}} by the primary metric of each sample's task.

    A sample is `12`, or `mmlu_anatomy/12` in a group. Names are left out some of whose samples have no number for a score:
    then there is nothing to pair."""
    found = read_metrics(cell, store)
    if found is None:
        return {}
    table = task_samples(cell, store, ["task", "sample", "filter", "score"]).to_pydict()
    by_task: dict[str, dict[int, float | None]] = {}
    for task, sample, chosen, score in zip(*table.values(), strict=True):
        if chosen == found.tasks[task].metrics[0].filter:
            by_task.setdefault(task, {})[sample] = score
    gathered: dict[str, dict[str, float | None]] = {}
    for named in found.named.values():
        for name in named.results:
            tasks = named.tasks if name not in by_task else [name]
            gathered[name] = {
                str(sample) if task == name else f"{task}/{sample}": score
                for task in tasks
                for sample, score in by_task.get(task, {}).items()
            }
    return {name: known for name, scores in gathered.items() if (known := _all_known(scores))}


def _all_known(scores: Mapping[str, float | None]) -> dict[str, float]:
    known = {sample: score for sample, score in scores.items() if score is not None}
    return known if len(known) == len(scores) else {}


def task_samples(cell: Cell, store: Store, columns: list[str] | None = None) -> Any:
    """The per-sample table as a pyarrow.Table, one row per task, document and filter (see `samples_schema`).

    Raises UserError while there is none."""
    import pyarrow.parquet as parquet

    folder = _payload(cell, store)
    if folder is None:
        raise UserError(f"{cell.label}: its tasks are not evaluated yet; run the experiment")
    with parquet.ParquetFile(folder / SAMPLES_FILE) as file:
        return file.read(columns=columns)


def read_metrics(cell: Cell, store: Store) -> Metrics | None:
    """`metrics.json` of a cell; None while there is none. Raises UserError when it cannot be read."""
    folder = _payload(cell, store)
    if folder is None:
        return None
    try:
        return Metrics.model_validate_json((folder / METRICS_FILE).read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(
            f"{folder / METRICS_FILE}: cannot be read; remove its stage folder and run the sweep again"
        ) from error


def _payload(cell: Cell, store: Store) -> Path | None:
    stage = cell.stage(STAGE)
    return None if stage is None or store.record(stage) is None else store.payload(stage)


def _metric(task: str, result: TaskResult, scored: Scored) -> TaskMetric:
    return TaskMetric(
        task=task,
        metric=scored.metric,
        filter=scored.filter,
        value=scored.value,
        stderr=scored.stderr,
        samples=result.samples,
        higher_is_better=scored.higher_is_better is not False,
        is_group=result.is_group,
        key=f"{task}/{result.key(scored)}",
    )
