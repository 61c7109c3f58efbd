"""The distillation stage: a student is trained on Ray Train workers. See `pipeline.training`."""

from __future__ import annotations

from typing import Any

from pipeline.stage import Metrics, StageRun, Stopped
from pipeline.training.launch import run_workers
from pipeline.training.worker import METRICS, STOPPED, distill


def run(run: StageRun) -> Metrics:
    """Train the student; the payload is `model/`, a student folder. Raises Stopped when it was asked to stop."""
    return metrics_of(run_workers(distill, run))


def metrics_of(result: dict[str, Any]) -> Metrics:
    """The metrics of what a worker returned. Raises Stopped, which workers return as a value."""
    if result.get(STOPPED):
        raise Stopped(f"stopped after step {result['step']}")
    return result[METRICS]
