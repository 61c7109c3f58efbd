"""The saved view: a name and a state that MLflow's UI can read, about metrics and parameters that cells really have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from synthetic_store import SyntheticStore, toy_cells

from pipeline.reporting.rows import row
from pipeline.tracking.content import final_values, parameters
from pipeline.tracking.ledger import Ledger
from pipeline.tracking.view import VIEW_TAG, saved_views, view_key, view_tag
from pipeline.watch import snapshot

LARGEST_VIEW = 20_000
"""Characters of a view that the UI saves."""


def state(sweep: str) -> dict:
    _, value = view_tag(sweep, changed=1_000.0)
    return json.loads(json.loads(value)["state"])


def test_a_view_is_an_envelope_that_the_ui_takes_for_one_of_its_own() -> None:
    tag, value = view_tag("toy", changed=1_000.5)
    envelope = json.loads(value)
    assert tag == VIEW_TAG + view_key("toy")
    assert envelope["name"] == "toy: quality and latency"
    assert envelope["createdAt"] == envelope["updatedAt"] == 1_000_500
    assert isinstance(envelope["state"], str)
    assert len(value) < LARGEST_VIEW


def test_columns_and_charts_name_what_a_finished_cell_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synthetic, cells = SyntheticStore(tmp_path / "runs"), toy_cells(methods=("full", "overfill"))
    for cell in cells:
        synthetic.finish(cell)
    view = snapshot(synthetic.store, cells).cells[1]
    metrics = {value.key for value in final_values(view, row(cells[1], synthetic.store))}
    known = {f"metrics.`{name}`" for name in metrics} | {f"params.`{name}`" for name in parameters(cells[1])}
    found = state("toy")
    assert set(found["selectedColumns"]) <= known
    assert found["orderByKey"] in known
    parallel, scatter, *_ = found["compareRunCharts"]
    assert set(parallel["selectedMetrics"]) | {scatter["xaxis"]["key"], scatter["yaxis"]["key"]} <= metrics
    assert set(parallel["selectedParams"]) <= set(parameters(cells[1]))


def test_every_chart_stands_in_a_section_and_has_a_name_of_its_own() -> None:
    found = state("toy")
    charts = found["compareRunCharts"]
    assert {chart["metricSectionId"] for chart in charts} <= {
        section["uuid"] for section in found["compareRunSections"]
    }
    assert len({chart["uuid"] for chart in charts}) == len(charts)


def test_a_sweep_is_shown_where_its_server_has_it(tmp_path: Path) -> None:
    for name, server in (("known", "here"), ("elsewhere", "there")):
        ledger = Ledger.read(tmp_path / name, server)
        ledger.experiment = "7"
        ledger.write(tmp_path / name, server, "")
    ((name, path),) = saved_views(tmp_path, "here")
    assert name == "known"
    assert path.startswith(f"/#/experiments/7/runs?viewStateShareKey={view_key('known')}")
