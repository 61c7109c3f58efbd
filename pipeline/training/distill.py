"""Distillation in a worker: the models and their engines, the loop, and the student that comes out."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from overfill.checkpoint import load_full_model, load_student, read_manifest, save_student
from overfill.config import Method
from overfill.distillation import TeacherModel, TrainingMethod
from overfill.importance import ImportanceScores
from overfill.surgery import random_student, read_config
from pipeline.config import StageResources
from pipeline.config_training import DistillConfig
from pipeline.stage import StageRun
from pipeline.stages.folders import model_folder
from pipeline.training.assemble import Learner, run_training
from pipeline.training.calibrate import SCORES_FILE
from pipeline.training.deepspeed_config import DTYPES, EngineSettings
from pipeline.training.distributed import Place, process_group
from pipeline.training.engine import frozen_engine
from pipeline.training.objective import FullModel, Objective
from pipeline.training.resources import stage_resources
from pipeline.training.session import Services

OBJECTIVES: dict[Method, TrainingMethod] = {
    "overfill": "overfill",
    "pruned": "pruned",
    "scratch": "scratch",
    "lora": "pruned",
}
"""What the student of a method reads and predicts."""


def train_student(run: StageRun) -> dict[str, Any]:
    """Train the student of a `distill` stage."""
    resources = stage_resources(run)
    with process_group(resources.gpus_per_worker, resources.threads) as place:
        return train_in(run, resources, place, Services())


def train_in(run: StageRun, resources: StageResources, place: Place, services: Services) -> dict[str, Any]:
    """As `train_student`, in a process group that is there."""
    settings = dict(run.config)
    seed = int(settings.pop("seed"))
    config = DistillConfig.model_validate(settings)
    student = _student(run, config, seed)
    objective = _objective(run, config, place)
    learner = Learner(
        config=config.model_copy(update={"learning_rate": config.effective_learning_rate}),
        seed=seed,
        model=student,
        objective=objective,
        full=lambda settings: _full_model(run, config, objective, settings, place),
        save=lambda weights: _save(run, config, student, weights),
    )
    return run_training(run, learner, resources, place, services)


def _student(run: StageRun, config: DistillConfig, seed: int) -> PreTrainedModel:
    """The cut student, with adapters on it for `lora`; for `scratch` one of its shape with random weights."""
    folder, dtype = model_folder(run.inputs["student"]), DTYPES[config.dtype]
    if config.method == "scratch":
        full_config = read_config(model_folder(run.inputs["teacher"]))
        return random_student(full_config, read_manifest(folder).widths, seed, dtype)
    student = load_student(folder, dtype=dtype)
    if config.method == "lora":
        from overfill.lora import add_adapters  # loads peft, for this method alone

        add_adapters(student, config.effective_lora, seed)
    return student


def _objective(run: StageRun, config: DistillConfig, place: Place) -> Objective:
    loss = config.effective_loss
    moments = None
    if loss.kv > 0:
        moments = ImportanceScores.load(run.inputs["scores"] / SCORES_FILE).kv_second_moment.to(place.device)
    return Objective(method=OBJECTIVES[config.method], loss=loss, kv_second_moment=moments)


def _full_model(
    run: StageRun, config: DistillConfig, objective: Objective, settings: EngineSettings, place: Place
) -> FullModel | None:
    """The full model, if anything is learned from it."""
    if not objective.needs_full_model:
        return None
    full = load_full_model(model_folder(run.inputs["teacher"]), dtype=DTYPES[config.dtype])
    call, module = frozen_engine(TeacherModel(full), settings, place.device)
    assert isinstance(module, TeacherModel)
    return FullModel(call=call, module=module)


def _save(run: StageRun, config: DistillConfig, student: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    cut = read_manifest(model_folder(run.inputs["student"]))
    changes: dict[str, Any] = {"method": config.method}
    if config.method == "scratch":
        changes |= {"kept_hidden": None, "kept_intermediate": None}
    if config.method == "lora":
        from overfill.lora import merged

        weights = merged(weights, config.effective_lora)
    save_student(
        student,
        run.staging / "model",
        cut.model_copy(update=changes),
        full_folder=model_folder(run.inputs["teacher"]),
        state_dict=weights,
    )
