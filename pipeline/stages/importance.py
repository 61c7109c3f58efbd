"""The calibration stage: channel importance of a full model, on Ray Train workers. See `overfill.importance`."""

from __future__ import annotations

from pipeline.stage import Metrics, StageRun
from pipeline.stages.distill import metrics_of
from pipeline.training.launch import run_workers
from pipeline.training.worker import calibrate


def run(run: StageRun) -> Metrics:
    """Calibrate; the payload is `scores.safetensors`."""
    return metrics_of(run_workers(calibrate, run))
