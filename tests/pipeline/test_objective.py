"""The metric that a sweep looks for, and the cell that has the best of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_store import SyntheticStore, outcomes, toy_cells

from pipeline.config import ObjectiveConfig
from pipeline.objective import metric_value, objective_line


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory):
    """Two finished cells, right in 50 and in 30 of 200 samples."""
    invented = SyntheticStore(Path(tmp_path_factory.mktemp("store")))
    cells = toy_cells(evaluate={"tasks": ["toy_get", "toy_sort"]})
    for cell, right in zip(cells, (50, 30), strict=True):
        invented.finish(cell, outcomes(right))
    return cells, invented.store


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("toy_get/exact_match", 0.25),
        ("eval/toy_get/exact_match", 0.25),
        ("toy_sort/perplexity", 3.5),
        ("eval/exact_match", 0.25),
        ("eval/perplexity", pytest.approx(1.6487, abs=1e-4)),
        ("toy_sort/acc", None),
    ],
)
def test_a_metric_is_a_tasks_or_any_other_of_a_record(sweep, name, value):
    (first, _), store = sweep
    assert metric_value(first, store, name) == value


def test_the_best_cell_is_named(sweep):
    cells, store = sweep
    most = objective_line(cells, store, ObjectiveConfig(metric="toy_get/exact_match"))
    assert most == "objective toy_get/exact_match (max): 0.25 in small · 0.5 · overfill · seed 0"
    least = objective_line(cells, store, ObjectiveConfig(metric="toy_get/exact_match", mode="min"))
    assert least == "objective toy_get/exact_match (min): 0.15 in small · 0.5 · pruned · seed 0"


def test_a_metric_that_no_cell_has_is_told_with_near_names(sweep, tmp_path):
    cells, store = sweep
    line = objective_line(cells, store, ObjectiveConfig(metric="toy_get/exact_mach"))
    assert line.startswith("objective toy_get/exact_mach: no cell has this metric; there are toy_get/exact_match")
    empty = objective_line(cells, SyntheticStore(tmp_path).store, ObjectiveConfig())
    assert empty == "objective eval/exact_match: no cell has this metric"
