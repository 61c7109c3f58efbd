"""The training loop of one worker, for distillation and for a teacher of our own.

Each optimizer step takes the global batch of its number. A worker computes its micro-batches: one pass of the full model
(where there is one), the student's losses as sums, and their gradient divided by the number of target tokens of the
*global* batch, known from the index of the shards. Losses are accumulated as sums too and written every few steps by
rank 0 to the run's metrics file; Ray Train hears of step checkpoints only, because each of its reports is a barrier.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from overfill.batch import DUMMY_ROW, PromptResponseBatch
from overfill.config import LossConfig
from overfill.distillation import TeacherModel, TeacherPass, TrainingMethod
from pipeline.config import StageResources
from pipeline.config_training import TrainingConfig
from pipeline.corpus.order import BatchOrder
from pipeline.stage import StageRun
from pipeline.training import state
from pipeline.training.checkpoints import Position
from pipeline.training.distributed import Place
from pipeline.training.engine import StudentEngine
from pipeline.training.metrics import LossSums, Rate
from pipeline.training.schedule import learning_rate
from pipeline.training.stream import Row, StreamPlan, stream_steps
from pipeline.training.validation import validation_nll

log = logging.getLogger(__name__)

MOST_STEPS_BETWEEN_LINES = 10
LINES_AT_LEAST = 50


@dataclass(frozen=True)
class Objective:
    """What is learned."""

    method: TrainingMethod
    loss: LossConfig
    prompt_targets: bool = False
    kv_second_moment: torch.Tensor | None = None

    def target_tokens(self, order: BatchOrder, step: int) -> int:
        """Tokens of a global batch that the student is to predict."""
        samples = order.batch(step)
        responses = order.response_lengths[samples]
        if self.method == "overfill":  # the first token of a response is the full model's
            return max(1, int(np.maximum(responses - 1, 0).sum()))
        prompts = order.prompt_lengths[samples]
        extra = int(np.where(responses > 0, prompts - 1, 0).sum()) if self.prompt_targets else 0
        return max(1, int(responses.sum()) + extra)


@dataclass(frozen=True)
class FullModel:
    """The full model as the loop uses it: a call for a pass over a batch, and the module with its output head."""

    call: Callable[[PromptResponseBatch], TeacherPass]
    module: TeacherModel


@dataclass(frozen=True)
class Session:
    """All that a worker's loop works with."""

    run: StageRun
    config: TrainingConfig
    resources: StageResources
    objective: Objective
    plan: StreamPlan
    engine: StudentEngine
    full: FullModel | None
    place: Place
    pad_id: int
    data: Path

    @property
    def steps_root(self) -> Path:
        """Where step checkpoints lie."""
        return steps_root(self.run)


@dataclass(frozen=True)
class Outcome:
    """How a worker's loop ended."""

    position: Position
    stopped: bool
    metrics: dict[str, float]
    """The last values of the training and validation metrics."""


def steps_root(run: StageRun) -> Path:
    """Where a run's step checkpoints lie: Ray Train's folder of the run, outside of which it takes no checkpoint."""
    return run.progress / run.stage.identity


def train(session: Session, start: Position) -> Outcome:
    """Train from `start` to the last step, or until the run is asked to stop. A collective over all workers."""
    steps, resources = session.plan.steps, session.resources
    position, saved_at = start, start.step
    sums, rate, last = LossSums(session.place), Rate(), dict[str, float]()
    line_every = max(1, min(MOST_STEPS_BETWEEN_LINES, steps // LINES_AT_LEAST))
    session.engine.train()
    for rows in stream_steps(session.plan, start.step):
        norm, rate_of_step = _optimize(session, rows.step, rows.rows, sums)
        tokens = session.plan.order().total_tokens(rows.step)
        rate.add(tokens)
        if rows.step == start.step:
            log.info("first step done")
        position = replace(position, step=rows.step + 1, tokens=position.tokens + tokens)
        done = position.step == steps
        stop = False
        if position.step % line_every == 0 or done:
            last |= _line(session, position, sums, rate, {"learning_rate": rate_of_step, "grad_norm": norm})
            stop = session.place.from_first(session.run.stop_requested()) and not done
        paused = rate.pause()
        if done or _due(position.step, session.config.evaluate_every):
            position = _validate(session, position)
            last["validation/nll"] = position.last_nll if position.last_nll is not None else float("nan")
        if done or stop or _due(position.step, resources.checkpoint_every):
            if position.step != saved_at:
                checkpoint(session, position)
                saved_at = position.step
        rate.resume(paused)
        if stop:
            return Outcome(position, stopped=True, metrics=last)
    return Outcome(position, stopped=False, metrics=last)


def collate(rows: list[Row | None], pad_id: int, device: torch.device) -> PromptResponseBatch:
    """A micro-batch on the device; empty slots become rows that count for nothing."""
    return PromptResponseBatch.collate([DUMMY_ROW if row is None else row for row in rows], pad_id).to(device)


def checkpoint(session: Session, position: Position) -> None:
    """Write a step checkpoint and tell Ray Train of it. A collective."""
    folder = state.save(
        session.engine, session.steps_root, position, session.place, session.resources.keep_checkpoints
    )
    report(position, folder)


def report(position: Position, folder: Path) -> None:
    """Tell Ray Train of a checkpoint that is in its place already."""
    from ray import train as ray_train
    from ray.train import Checkpoint
    from ray.train.v2.api.report_config import CheckpointUploadMode

    ray_train.report(
        {"step": position.step, "tokens": position.tokens},
        checkpoint=Checkpoint(str(folder)),
        checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
    )


def _optimize(
    session: Session, step: int, micro_batches: list[list[Row | None]], sums: LossSums
) -> tuple[float, float]:
    """One optimizer step; returns the gradient's norm and the learning rate."""
    engine, objective, full = session.engine, session.objective, session.full
    tokens = objective.target_tokens(session.plan.order(), step)
    rate = learning_rate(session.config, step, session.plan.steps)
    norm: float | None = None
    for rows in micro_batches:
        batch = collate(rows, session.pad_id, session.place.device)
        with torch.no_grad():
            teacher = full.call(batch) if full is not None else None
        terms: Any = engine(
            batch,
            teacher,
            full.module.head if full is not None else None,
            objective.method,
            objective.loss,
            kv_second_moment=objective.kv_second_moment,
            chunks=session.resources.loss_chunks,
            prompt_targets=objective.prompt_targets,
        )
        engine.backward(terms["loss"][0], tokens)
        norm = engine.step(rate)
        sums.add(terms)
    if norm is None:
        raise RuntimeError(f"step {step} ended without an update: the micro-batches do not match the engine's settings")
    return norm, rate


def _line(session: Session, position: Position, sums: LossSums, rate: Rate, values: dict[str, float]) -> dict[str, float]:
    means = sums.means() | values | {"tokens_per_second": rate.read()}
    metrics = {f"train/{name}": value for name, value in means.items()}
    if session.place.first:
        session.run.log_metrics(position.step, session.plan.steps, metrics, tokens=position.tokens)
    return metrics


def _validate(session: Session, position: Position) -> Position:
    nll = validation_nll(session)
    if session.place.first:
        session.run.log_metrics(position.step, session.plan.steps, {"validation/nll": nll}, tokens=position.tokens)
    best = position.best_nll is None or nll < position.best_nll
    return replace(
        position,
        last_nll=nll,
        best_nll=nll if best else position.best_nll,
        best_step=position.step if best else position.best_step,
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
