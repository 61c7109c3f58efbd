"""Training a teacher from scratch in a worker: the same loop, plain cross-entropy, no full model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from overfill.architectures import checked_shape, parameters
from overfill.config import LossConfig
from overfill.surgery import save_config
from overfill.weights import write_weights
from pipeline.config import StageResources
from pipeline.config_training import PretrainConfig
from pipeline.stage import StageRun
from pipeline.stages.folders import tokenizer_folder
from pipeline.training.assemble import Learner, run_training
from pipeline.training.distributed import Place, process_group
from pipeline.training.objective import Objective
from pipeline.training.resources import stage_resources
from pipeline.training.session import Services

MAX_LENGTH = "max_length"
"""Field of the stage's config beside those of `PretrainConfig`: the longest sample in tokens."""


def train_teacher(run: StageRun) -> dict[str, Any]:
    """Train the teacher of a `teacher` stage."""
    resources = stage_resources(run)
    with process_group(resources.gpus_per_worker, resources.threads) as place:
        return train_in(run, resources, place, Services())


def train_in(run: StageRun, resources: StageResources, place: Place, services: Services) -> dict[str, Any]:
    """As `train_teacher`, in a process group that is there."""
    config = PretrainConfig.model_validate({key: value for key, value in run.config.items() if key != MAX_LENGTH})
    tokenizer_files = tokenizer_folder(run.inputs["tokenizer"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_files)
    model = new_model(config, tokenizer, int(run.config[MAX_LENGTH]))
    objective = Objective(method="pretrain", loss=LossConfig(kl=0.0, ce=1.0), prompt_targets=config.prompt_loss)
    learner = Learner(
        config=config,
        seed=config.seed,
        model=model,
        objective=objective,
        full=lambda settings: None,
        save=lambda weights: save_teacher(model, weights, tokenizer_files, run.staging / "model"),
    )
    return run_training(run, learner, resources, place, services)


def new_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast, max_positions: int) -> PreTrainedModel:
    """A model with random weights, drawn from the config's seed."""
    fields = config.model_config_dict(len(tokenizer), max_positions)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    special["pad_token_id"] = tokenizer.pad_token_id
    settings = AutoConfig.for_model(**fields, **special, **_family(config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    model.generation_config = GenerationConfig(**special)
    return model


def save_teacher(model: PreTrainedModel, weights: dict[str, Tensor], tokenizer: Path, folder: Path) -> None:
    """Write a plain transformers folder with the tokenizer's files beside the model."""
    folder.mkdir(parents=True, exist_ok=True)
    names = parameters(checked_shape(model.config.to_dict(), "teacher"))
    sizes = {name: weights[name].numel() * weights[name].element_size() for name in names}
    write_weights(folder, sizes, weights.__getitem__)
    save_config(model.config, folder, weights["model.norm.weight"].dtype, type(model).__name__)
    model.generation_config.save_pretrained(folder)
    for file in sorted(tokenizer.iterdir()):
        if file.is_file():
            shutil.copy(file, folder / file.name)


def _family(config: PretrainConfig) -> dict[str, Any]:
    """Fields that only some families have: no sliding window, because a student reads the whole prompt's cache."""
    return {"sliding_window": None} if config.architecture == "mistral" else {}
