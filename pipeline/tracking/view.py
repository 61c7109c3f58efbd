"""A saved view of MLflow's UI per sweep: its cells alone, the columns that matter first, and the charts that compare.

MLflow keeps a saved view in a tag of the experiment (its UI lists them under *Views*): a name, and the state of its
runs page as JSON. Written here as the UI of MLflow 3.17 reads it; a UI that does not know a field ignores it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from pipeline.fingerprint import fingerprint
from pipeline.tracking.ledger import Ledger

VIEW_TAG = "mlflow.sharedViewState."
KIND_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Without it the UI asks what kind of experiment this is."""
PARAMETERS = ("method", "ratio")
COLUMNS = (
    *(("params", name) for name in PARAMETERS),
    *(("metrics", name) for name in ("eval/exact_match", "eval/perplexity", "latency/tpot_ms", "latency/speed_up")),
    *(("metrics", name) for name in ("latency/ttft_ms", "shape/parameters_kept")),
    ("params", "seed"),
)
ACCURACY, LATENCY = "eval/exact_match", "latency/tpot_ms"
GROUPS = ("eval", "latency", "train", "validation", "shape", "cost")
"""Prefixes of metrics whose charts the UI adds by itself: at hand below ours, closed."""
MOST_RUNS = 500
"""Cells that a chart shows."""


def view_key(sweep: str) -> str:
    """The id of a sweep's view: the same at every run of the sweep."""
    return f"overfill-{fingerprint(sweep)}"


def view_tag(sweep: str, changed: float) -> tuple[str, str]:
    """(tag, value) of the sweep's view; `changed` in seconds since the epoch."""
    written = round(1000 * changed)
    state = {"name": f"{sweep}: quality and latency", "createdAt": written, "updatedAt": written}
    return VIEW_TAG + view_key(sweep), json.dumps(state | {"state": json.dumps(_state(sweep))})


def view_path(experiment: str, sweep: str, charts: bool = False) -> str:
    """The part of the UI's address behind the server's: the table of a sweep's cells, or their charts."""
    query = {"viewStateShareKey": view_key(sweep), "workflowType": "machine_learning"}
    query |= {"compareRunsMode": "CHART"} if charts else {}
    return f"/#/experiments/{experiment}/runs?{urlencode(query)}"


def saved_views(sweeps: Path, server: str) -> list[tuple[str, str]]:
    """(name, path of its charts) of every sweep that this server (a masked URI) knows, by name."""
    ledgers = ((folder.name, Ledger.read(folder, server)) for folder in sorted(sweeps.glob("*/")))
    return [(name, view_path(ledger.experiment, name, charts=True)) for name, ledger in ledgers if ledger.experiment]


def _state(sweep: str) -> dict[str, Any]:
    columns = [f"{kind}.`{name}`" for kind, name in COLUMNS]
    charts, lines = "overfill-compare", "overfill-curves"
    return {
        "searchFilter": f"tags.sweep = '{sweep}' and tags.role = 'cell'",
        "orderByKey": f"metrics.`{ACCURACY}`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": columns,
        "columnOrder": columns,
        "runsHiddenMode": "SHOW_ALL",
        "isAccordionReordered": True,  # or the UI sorts sections by name
        "compareRunSections": [
            _section(charts, "What to ship"),
            _section(lines, "Training"),
            *(_section(f"overfill-{name}", name, opened=False) for name in GROUPS),
        ],
        "compareRunCharts": [
            _chart("PARALLEL", "", charts)
            | {"selectedParams": list(PARAMETERS), "selectedMetrics": [LATENCY, ACCURACY], "showAllRuns": True},
            _chart("SCATTER", "", charts) | {"xaxis": _axis(LATENCY), "yaxis": _axis(ACCURACY)},
            *(_chart("BAR", name, charts) | {"metricKey": name} for name in (ACCURACY, LATENCY)),
            *(_line(name, lines) for name in ("train/loss", "validation/nll")),
        ],
    }


def _section(uuid: str, name: str, opened: bool = True) -> dict[str, Any]:
    return {"uuid": uuid, "name": name, "display": opened, "isReordered": False, "deleted": False, "isGenerated": False}


def _chart(kind: str, metric: str, section: str) -> dict[str, Any]:
    return {
        "type": kind,
        "uuid": f"overfill-{kind}-{metric}",
        "metricSectionId": section,
        "runsCountToCompare": MOST_RUNS,
        "deleted": False,
        "isGenerated": False,
    }


def _axis(metric: str) -> dict[str, str]:
    return {"key": metric, "type": "METRIC"}


def _line(metric: str, section: str) -> dict[str, Any]:
    """A curve over the tokens of the corpus that were read."""
    return _chart("LINE", metric, section) | {
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "xAxisKey": "metric",
        "selectedXAxisMetricKey": "train/tokens",
        "useGlobalXaxisKey": False,
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "lineSmoothness": 0,
        "range": {},
        "yAxisKey": "metric",
        "yAxisExpressions": [],
    }
