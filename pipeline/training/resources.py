"""What a worker learns about the stage that it works for, apart from the stage itself. Imports next to nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.config import StageResources
from pipeline.stage import StageRun

STOP_FILE = "stop"
"""In the progress folder of a stage that shall save its position and end."""


@dataclass(frozen=True)
class StopFile:
    """`stop_requested` for workers on any machine: whether a file is there."""

    path: Path

    def __call__(self) -> bool:
        return self.path.exists()


def stage_resources(run: StageRun) -> StageResources:
    """The resources of a stage, defaults where the experiment gives none."""
    return StageResources.model_validate(run.resources or {})
