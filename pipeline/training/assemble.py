"""From a model and an objective to a trained model: plan, engine, resume, loop, result. The same for every run."""

from __future__ import annotations

import logging
import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from overfill.distillation import DistillationModel
from pipeline.config import StageResources
from pipeline.config_training import TrainingConfig
from pipeline.corpus.order import sequences_per_batch
from pipeline.corpus.shards import TokenShards
from pipeline.stage import Located, StageRun, here
from pipeline.training import state
from pipeline.training.checkpoints import Position, StepFolders
from pipeline.training.deepspeed_config import EngineSettings
from pipeline.training.distributed import Place
from pipeline.training.engine import StudentEngine, is_sharded, whole_parameter
from pipeline.training.loop import train
from pipeline.training.objective import FullModel, Objective
from pipeline.training.session import Outcome, Services, Session, steps_of
from pipeline.training.stream import StreamPlan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Learner:
    """What a kind of training run brings along."""

    config: TrainingConfig
    seed: int
    """Seed of the data order."""
    model: PreTrainedModel
    """The model that is trained, on the CPU."""
    objective: Objective
    full: Callable[[EngineSettings], FullModel | None]
    """Loads the full model."""
    save: Callable[[dict[str, Tensor]], None]
    """Writes the trained model, given its gathered weights; called on rank 0."""


def run_training(
    run: StageRun, learner: Learner, resources: StageResources, place: Place, services: Services
) -> dict[str, Any]:
    """Train until the end, or until the stage is asked to stop; rank 0 writes the model. A collective."""
    plan = _plan(run.located("data", run.inputs["data"] / "train"), learner, resources, place)
    settings = _engine_settings(learner.config, resources, plan)
    module = DistillationModel(learner.model)
    if place.first:
        run.clear_staging()  # a worker may have died while it wrote its result
    steps = steps_of(run)
    found = _newest_checkpoint(steps, place)
    if found is not None:
        state.load_weights(module, found)
    if resources.activation_checkpointing:
        module.enable_activation_checkpointing()
    log.info("models loaded")
    engine = StudentEngine(module, learner.config, settings, place.device)
    start = state.restore(engine, found, place) if found is not None else Position(step=0, tokens=0)
    session = Session(
        run=run,
        config=learner.config,
        resources=resources,
        objective=learner.objective,
        plan=plan,
        engine=engine,
        full=learner.full(settings),
        place=place,
        services=services,
        steps=steps,
    )
    began = time.perf_counter()
    log.info("engines made; training from step %d to %d on %d workers", start.step, plan.steps, place.workers)
    outcome = train(session, start)
    log.info("training ended at step %d%s", outcome.position.step, ", stopped" if outcome.stopped else "")
    if not outcome.stopped:
        weights = gathered_weights(engine, place)
        if place.first:
            learner.save(weights)
        place.barrier()
    return _result(outcome, time.perf_counter() - began)


def gathered_weights(engine: StudentEngine, place: Place) -> dict[str, Tensor]:
    """The model's weights by name, whole, on rank 0's CPU; empty elsewhere. A collective."""
    module = engine.module
    assert isinstance(module, DistillationModel)
    gathered: dict[str, Tensor] = {}
    for name, parameter in module.student.named_parameters():
        if not is_sharded(parameter):
            if place.first:
                gathered[name] = parameter.detach().cpu()
            continue
        with whole_parameter(parameter):
            if place.first:
                gathered[name] = parameter.detach().cpu().clone()
    return gathered


def _plan(folder: Path | Located, learner: Learner, resources: StageResources, place: Place) -> StreamPlan:
    sequences = sequences_per_batch(learner.config.batch_tokens, TokenShards.open(here(folder)).lengths)
    return StreamPlan(
        folder=folder,
        sequences_per_batch=sequences,
        seed=learner.seed,
        steps=learner.config.steps,
        workers=place.workers,
        micro_batch=min(resources.micro_batch, math.ceil(sequences / place.workers)),
        rank=place.rank,
    )


def _engine_settings(config: TrainingConfig, resources: StageResources, plan: StreamPlan) -> EngineSettings:
    return EngineSettings(
        workers=plan.workers,
        zero_stage=resources.zero_stage,
        dtype=config.dtype,
        micro_batch=plan.micro_batch,
        accumulation=plan.order().micro_batches(plan.workers, plan.micro_batch),
    )


def _newest_checkpoint(steps: StepFolders, place: Place) -> Path | None:
    """Where to go on from, chosen by rank 0 for all: the newest that every worker has whole. A collective."""

    def torn(name: str, reason: str) -> None:
        log.warning("step checkpoint %s is not complete (%s): it is skipped", name, reason)

    while True:
        found = place.from_first(steps.newest(torn) if place.first else None)
        if found is None:
            return None
        why = steps.bring(found)
        if why is not None:
            torn(found, why)
        if place.every(why is None):
            return steps.open(found)
        steps.skipped.add(found)


def _result(outcome: Outcome, seconds: float) -> dict[str, Any]:
    position = outcome.position
    metrics: dict[str, float | int] = dict(position.metrics)
    metrics |= {"train/steps": position.step, "train/tokens": position.tokens, "train/seconds": seconds}
    metrics["train/peak_bytes"] = _peak_bytes()
    if position.best_nll is not None and position.best_step is not None:
        metrics |= {"validation/best_nll": position.best_nll, "validation/best_step": position.best_step}
    return {"metrics": metrics, "stopped": outcome.stopped, "step": position.step}


def _peak_bytes() -> int:
    """Most memory this worker held: of its GPU's allocator, or resident on the CPU (libraries included)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
