"""What a worker learns about the stage that it works for, apart from the stage itself. Imports next to nothing."""

from __future__ import annotations

from pipeline.config import StageResources
from pipeline.stage import StageRun


def stage_resources(run: StageRun) -> StageResources:
    """The resources of a stage, defaults where the experiment gives none."""
    return StageResources.model_validate(run.resources or {})
