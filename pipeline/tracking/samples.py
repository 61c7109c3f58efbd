"""Judged samples as tables that MLflow's UI shows, and the results of tasks. See `pipeline.stages.evaluate`, `tasks`."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

from pipeline.tracking.content import Value

if TYPE_CHECKING:
    from pipeline.store import Store
    from pipeline.sweep import Cell

TABLES = {"evaluate": "samples.json", "tasks": "task_samples.json"}
"""Stage whose payload has `samples.parquet` -> name of the table among a run's artifacts."""


def tables_tag(cell: Cell) -> dict[str, str]:
    """The tag by which MLflow knows which artifacts are tables."""
    there = [{"path": name, "type": "table"} for stage, name in TABLES.items() if cell.stage(stage) is not None]
    return {"mlflow.loggedArtifacts": json.dumps(there)}


def sample_tables(cell: Cell, store: Store) -> dict[str, str]:
    """Every judged sample of a finished cell: name of the table -> JSON with columns and rows."""
    import pyarrow.parquet as parquet

    found: dict[str, str] = {}
    for name, table in TABLES.items():
        stage = cell.stage(name)
        if stage is not None and store.record(stage) is not None:
            with parquet.ParquetFile(store.payload(stage) / "samples.parquet") as file:
                columns = file.read().to_pydict()
            rows = [list(row) for row in zip(*columns.values(), strict=True)]
            found[table] = json.dumps({"columns": list(columns), "data": rows})
    return found


def task_values(cell: Cell, store: Store) -> list[Value]:
    """What the cell reached on lm-eval's tasks, as its record has it."""
    stage = cell.stage("tasks")
    record = None if stage is None else store.record(stage)
    if record is None:
        return []
    metrics = record.metrics.items()
    return [
        Value(key, float(v), 0, record.finished)
        for key, v in metrics
        if isinstance(v, int | float) and math.isfinite(v)
    ]
