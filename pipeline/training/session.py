"""All that a worker's training loop works with, as one value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import StageResources
from pipeline.config_training import TrainingConfig
from pipeline.stage import StageRun
from pipeline.training.checkpoints import Position, StepFolders
from pipeline.training.distributed import Place
from pipeline.training.engine import StudentEngine
from pipeline.training.objective import FullModel, Objective
from pipeline.training.stream import StepRows, StreamPlan, stream_steps


def report_to_ray(position: Position) -> None:
    """Tell Ray Train of a position. A barrier over all workers."""
    from ray import train

    train.report({"step": position.step, "tokens": position.tokens})


def node_is_reclaimed() -> bool:
    """Whether Ray has told this worker that a node of its group is being taken away.

    Ray's public `get_preemption_info` says the same through a barrier over all workers; every worker is told alike."""
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


@dataclass(frozen=True)
class Services:
    """What Ray does for the loop. Other functions make a run in one process, without Ray."""

    stream: Callable[[StreamPlan, int], Iterator[StepRows]] = stream_steps
    """(plan, first step) -> the steps from there on."""
    report: Callable[[Position], None] = report_to_ray
    """Called on every worker when a step checkpoint is complete."""
    reclaimed: Callable[[], bool] = node_is_reclaimed
    """Whether a node is about to be taken away; asked after every step."""


@dataclass(frozen=True)
class Session:
    """A worker's run."""

    run: StageRun
    config: TrainingConfig
    resources: StageResources
    objective: Objective
    plan: StreamPlan
    engine: StudentEngine
    full: FullModel | None
    place: Place
    services: Services
    steps: StepFolders
    """Its step checkpoints."""

    @property
    def held_out(self) -> Path:
        """Token shards for validation."""
        return self.run.inputs["data"] / "test"


@dataclass(frozen=True)
class Outcome:
    """How a worker's loop ended."""

    position: Position
    stopped: bool
    """Whether it was asked to stop before the last step."""


def steps_root(run: StageRun) -> Path:
    """Where a run's step checkpoints lie."""
    return run.progress / run.stage.identity


def steps_of(run: StageRun) -> StepFolders:
    """A run's step checkpoints."""
    if run.site is None:
        return StepFolders(steps_root(run))
    from pipeline.objects.steps import ObjectSteps

    return ObjectSteps.of(run.site, steps_root(run))
