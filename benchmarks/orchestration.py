"""What the machinery itself costs: sweeps whose stages do nothing, through the real store, runner and Ray Tune.

    python benchmarks/orchestration.py [--cells 10 100 1000] [--plan 10000] [--tracking 10 100 1000]

For each number of `--cells`, in a fresh store:

- `expand`: the file to cells with identities, and `plan`: what would run (nothing is there yet);
- `alone`: every cell by `run_graph` in this process, one after another: leases, records, renames, digests, disk syncs;
- `run`: the same cells by `overfill run`'s own function in another store: Ray Tune, progress, no MLflow, two trials per cell
  (accuracy, then latency), as many at once as there are cores. Ray's start is told apart;
- `again`: finding out that nothing is left to do; `status`: one look at every stage;
- memory: the driver's resident set before and after.

For each number of `--tracking`, a finished sweep of stages with small results of every kind is told to a new MLflow
database: seconds in MLflow's own calls and in ours, the report's share of those, and what a later look costs.

Prints a table for people and one JSON line per number of cells.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from pipeline import experiment
from pipeline.config import ExperimentConfig
from pipeline.experiment import Experiment, is_done, planned
from pipeline.runner import run_graph
from pipeline.stage import External, Stage, StageRun
from pipeline.store import Store
from pipeline.sweep import Cell, expand
from pipeline.tracking import tracker
from pipeline.tracking.ledger import LEDGER_FILE
from pipeline.tracking.sync import Sync
from pipeline.tracking.tracker import Tracker
from pipeline.watch import snapshot

FUNCTION = "orchestration:nothing"
RATES = [round(0.001 * number, 3) for number in range(1, 11)]
COLUMNS = ("cells", "stages", "expand_s", "plan_s", "alone_s", "ray_s", "run_s", "again_s", "status_s")


def nothing(run: StageRun) -> dict[str, float]:
    """A stage that writes one small file."""
    (run.staging / "note.txt").write_text(run.stage.name)
    return {"eval/exact_match": 0.5}


def sweep(cells: int) -> ExperimentConfig:
    """An experiment of so many cells: learning rates and seeds of one ratio and two methods."""
    methods, rates = ["overfill", "pruned"], RATES[: max(1, min(len(RATES), cells // 2))]
    values: dict[str, Any] = {
        "name": f"orchestration-{cells}",
        "teacher": {"name": "small", "pretrain": {"hidden": 64, "intermediate": 128, "layers": 2}},
        "prune": {"hidden": 0.5, "intermediate": 0.5},
        "sweep": {
            "axes": {"distill.method": methods, "distill.learning_rate": rates},
            "seeds": list(range(-(-cells // (len(methods) * len(rates))))),
        },
    }
    return ExperimentConfig.model_validate(values)


def emptied(cells: list[Cell]) -> list[Cell]:
    """The cells with every stage's function replaced by one that does nothing; stages are shared as before."""
    made: dict[str, Stage] = {}

    def empty(stage: Stage | External) -> Stage | External:
        if isinstance(stage, External):
            return stage
        if stage.identity not in made:
            inputs = {name: empty(source) for name, source in stage.inputs.items()}
            made[stage.identity] = Stage(stage.name, stage.version, stage.config, inputs, FUNCTION, stage.label)
        return made[stage.identity]

    return [replace(cell, stages=tuple(map(empty, cell.stages))) for cell in cells]  # type: ignore[arg-type]


@contextmanager
def timed(into: dict[str, float], name: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    into[name] = round(time.perf_counter() - begun, 3)


def measure(count: int, folder: Path, with_ray: bool) -> dict[str, float]:
    """One row of the table."""
    found: dict[str, float] = {"cells": count}
    config = sweep(count)
    with timed(found, "expand_s"):
        cells = emptied(expand(config, "orchestration"))
    assert len(cells) == count, f"{len(cells)} cells"
    whole = Experiment(config, cells)
    found["stages"] = len({stage.identity for cell in cells for stage in cell.stages})
    alone = Store(folder / f"alone-{count}")
    with timed(found, "plan_s"):
        planned(whole, alone)
    with timed(found, "alone_s"):
        for cell in cells:
            run_graph(cell.stages, alone)
    with timed(found, "again_s"):
        assert is_done(whole, alone)
    with timed(found, "status_s"):
        assert snapshot(alone, cells).counts["done"] == count
    found["memory_before_mb"] = _memory()
    if with_ray:
        found |= run_on_ray(whole, Store(folder / f"run-{count}"))
    return found | {"memory_after_mb": _memory()}


def run_on_ray(whole: Experiment, store: Store) -> dict[str, float]:
    """Seconds of Ray's start and of the run after it."""
    found: dict[str, float] = {}
    begun = time.perf_counter()
    inner: Callable[..., Any] = experiment._accuracy_then_latency

    def started(*arguments: Any) -> Any:
        found["ray_s"] = round(time.perf_counter() - begun, 3)
        with timed(found, "run_s"):
            return inner(*arguments)

    experiment._accuracy_then_latency = started
    tracker.Tracker = lambda *_: nullcontext()  # type: ignore[assignment, misc] - it would look for models
    try:
        with timed(found, "all_s"):
            outcomes = experiment.run_missing(whole, store, None, Console(file=sys.stderr))
    finally:
        experiment._accuracy_then_latency, tracker.Tracker = inner, Tracker  # type: ignore[misc]
    assert all(outcome.state == "done" for outcome in outcomes), outcomes
    return found


def tracked(count: int, folder: Path) -> dict[str, float]:
    """A row of the table about MLflow."""
    from synthetic_store import SyntheticStore  # of the tests

    found: dict[str, float] = {"cells": count, "mlflow_s": 0.0, "report_s": 0.0}
    config = sweep(count)
    cells = expand(config, "orchestration")
    synthetic = SyntheticStore(folder / f"tracked-{count}")
    for cell in cells:
        synthetic.finish(cell)
    found["memory_before_mb"] = _memory()
    with mlflow_timed(found), timed(found, "all_s"), Tracker(Store(synthetic.store.root), config, cells, flush=1e6):
        pass
    found["memory_after_mb"] = _memory()
    with timed(found, "again_s"), Tracker(Store(synthetic.store.root), config, cells):
        pass
    ledger = synthetic.store.root / "sweeps" / config.name / LEDGER_FILE
    return found | {"ledger_kb": round(ledger.stat().st_size / 1000, 1)}


@contextmanager
def mlflow_timed(into: dict[str, float]) -> Iterator[None]:
    """Inside, seconds in MLflow's calls, in its start, and in our report are added up."""
    connect, report = Tracker._connect, Sync._push_report

    def connected(self: Tracker) -> Any:
        with timed(into, "start_s"):
            return Timed(connect(self), into)

    def reported(*arguments: Any) -> None:
        with added(into, "report_s"):
            report(*arguments)

    Tracker._connect, Sync._push_report = connected, reported  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tracker._connect, Sync._push_report = connect, report  # type: ignore[method-assign]


class Timed:
    """MLflow's server, with the time that its calls take."""

    def __init__(self, server: Any, into: dict[str, float]) -> None:
        self._server, self._into = server, into

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with added(self._into, "mlflow_s"):
                return getattr(self._server, name)(*arguments)

        return call


@contextmanager
def added(into: dict[str, float], name: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    into[name] = round(into[name] + time.perf_counter() - begun, 4)


def print_tracked(rows: list[dict[str, float]]) -> None:
    names = (
        "cells",
        "start_s",
        "all_s",
        "MLflow per cell",
        "ours per cell",
        "report_s",
        "again_s",
        "ledger_kb",
        "memory",
    )
    print("| " + " | ".join(names) + " |\n|" + " ---: |" * len(names))
    for row in rows:
        ours = row["all_s"] - row["start_s"] - row["mlflow_s"]
        shown = [f"{row[name]:g}" for name in ("cells", "start_s", "all_s")]
        shown += [f"{seconds / row['cells']:.3f}" for seconds in (row["mlflow_s"], ours)]
        shown += [f"{row[name]:g}" for name in ("report_s", "again_s", "ledger_kb")]
        print("| " + " | ".join([*shown, f"{row['memory_before_mb']:g} → {row['memory_after_mb']:g} MiB"]) + " |")


def _memory() -> float:
    return round(psutil.Process().memory_info().rss / 2**20, 1)


def print_rows(rows: list[dict[str, float]]) -> None:
    names = [*COLUMNS, "run per cell", "alone per cell", "memory"]
    print("| " + " | ".join(names) + " |\n|" + " ---: |" * len(names))
    for row in rows:
        shown = [f"{row[name]:g}" if name in row else "–" for name in COLUMNS]
        shown += [f"{row['run_s'] / row['cells']:.3f}" if "run_s" in row else "–"]
        shown += [f"{row['alone_s'] / row['cells']:.3f}" if "alone_s" in row else "–"]
        shown += [f"{row['memory_before_mb']:g} → {row['memory_after_mb']:g} MiB" if "memory_before_mb" in row else "–"]
        print("| " + " | ".join(shown) + " |")


def _said(row: dict[str, float]) -> dict[str, float]:
    """The row, printed as a JSON line at once: what follows takes longer."""
    print(json.dumps(row), flush=True)
    return row


def plan_only(count: int, folder: Path) -> dict[str, float]:
    """Expanding and planning, nothing run."""
    found: dict[str, float] = {"cells": count}
    config = sweep(count)
    with timed(found, "expand_s"):
        cells = expand(config, "orchestration")
    found["stages"] = len({stage.identity for cell in cells for stage in cell.stages})
    with timed(found, "plan_s"):
        planned(Experiment(config, cells), Store(folder / "none"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, nargs="*", default=[10, 100, 1000])
    parser.add_argument("--plan", type=int, nargs="*", default=[10_000])
    parser.add_argument("--tracking", type=int, nargs="*", default=[10, 100, 1000])
    parser.add_argument("--no-ray", action="store_true", help="Leave out the runs through Ray Tune.")
    given = parser.parse_args()
    # Trials are other processes: they find this module, and the package, by the path.
    here = Path(__file__).resolve()
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    sys.path[:0] = [str(here.parent), str(here.parents[1] / "tests")]
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    with tempfile.TemporaryDirectory(prefix="orchestration-") as folder:
        rows = [_said(plan_only(count, Path(folder))) for count in given.plan]
        rows += [_said(measure(count, Path(folder), not given.no_ray)) for count in given.cells]
        told = [_said(tracked(count, Path(folder))) for count in given.tracking]
    print_rows(rows)
    print_tracked(told)


if __name__ == "__main__":
    main()
