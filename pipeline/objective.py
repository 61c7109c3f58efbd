"""What a sweep looks for, `sweep.objective`: the value of one metric in every cell, and the best of them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config import ObjectiveConfig
    from pipeline.store import Store
    from pipeline.sweep import Cell


def metric_value(cell: Cell, store: Store, name: str) -> float | None:
    """A metric of one of a cell's results by its name in the record (`eval/exact_match`, `latency/overfill/tpot_s`), where
    that of a task may leave out `eval/`: `gsm8k_cot_llama/exact_match`. None while it is not there."""
    metrics = cell_metrics(cell, store)
    return metrics.get(name, metrics.get(f"eval/{name}"))


def cell_metrics(cell: Cell, store: Store) -> dict[str, float]:
    """Every number in the records of a cell's results."""
    records = (store.record(stage) for stage in cell.leaves)
    found = {name: value for record in records if record is not None for name, value in record.metrics.items()}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def objective_line(cells: Sequence[Cell], store: Store, objective: ObjectiveConfig) -> str:
    """Which cell is best, in one line; where none has the metric, the nearest names."""
    values = [(cell, metric_value(cell, store, objective.metric)) for cell in cells]
    known = [(cell, value) for cell, value in values if value is not None]
    if known:
        best, value = (max if objective.mode == "max" else min)(known, key=lambda entry: entry[1])
        return f"objective {objective.metric} ({objective.mode}): {value:.4g} in {best.label}"
    names = sorted({name.removeprefix("eval/") for cell in cells for name in cell_metrics(cell, store)})
    near = difflib.get_close_matches(objective.metric, names, n=3) or names[:3]
    return f"objective {objective.metric}: no cell has this metric" + (f"; there are {', '.join(near)}" if near else "")
