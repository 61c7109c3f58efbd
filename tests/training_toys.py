"""A tiny teacher, student, corpus and stage run for tests of training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from overfill.checkpoint import FullModel, Manifest, weights_digest, write_manifest
from overfill.config import PruneConfig
from overfill.importance import ImportanceAccumulator
from overfill.shapes import ModelShape, resolve_widths
from overfill.surgery import prune_folder
from pipeline.config import StageResources
from pipeline.config_training import DistillConfig
from pipeline.corpus.shards import write_samples
from pipeline.fingerprint import identity_config
from pipeline.stage import External, Stage, StageRun
from pipeline.training.session import Services
from pipeline.training.stream import StepRows, StreamPlan, read_step

VOCABULARY = 40
INPUTS = ("teacher", "student", "scores", "data")


def make_inputs(root: Path) -> dict[str, Path]:
    """Token shards of random tokens, a random teacher, its scores, and a student cut from it."""
    inputs = {name: root / name for name in INPUTS}
    generator = np.random.default_rng(0)

    def ids(low: int, high: int) -> list[int]:
        return generator.integers(1, VOCABULARY, generator.integers(low, high)).tolist()

    for split, samples in (("train", 60), ("test", 9)):
        write_samples(inputs["data"] / split, [(ids(2, 9), ids(1, 8), "") for _ in range(samples)])
    full = tiny_model()
    full.save_pretrained(inputs["teacher"] / "model")
    tokens = torch.randint(1, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(1))
    with ImportanceAccumulator(full) as importance:
        importance.update(tokens, torch.ones_like(tokens))
    inputs["scores"].mkdir()
    importance.scores().save(inputs["scores"] / "scores.safetensors")
    shape = ModelShape.from_config(full.config.to_dict())
    widths = resolve_widths(shape, PruneConfig(hidden=0.5, intermediate=0.5))
    student, teacher = inputs["student"] / "model", inputs["teacher"] / "model"
    kept = prune_folder(teacher, importance.scores(), widths, student)
    named = FullModel(id=str(teacher), digest=weights_digest(teacher))
    write_manifest(student, Manifest.of(named, shape.architecture, widths, kept))
    return inputs


def tiny_model() -> LlamaForCausalLM:
    """A random Llama with two layers, tied embeddings and grouped KV heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def distill_run(
    root: Path, inputs: dict[str, Path], *, seed: int = 3, resources: dict[str, Any] | None = None, **config: Any
) -> StageRun:
    """A distill stage's run in the folder `root`: 12 steps of 6 sequences unless `config` says otherwise."""
    settings = {
        "tokens": 12 * 60,
        "batch_tokens": 60,
        "learning_rate": 5e-3,
        "weight_decay": 0.01,
        "clip": 0.5,
        "evaluate_every": 5,
        "evaluate_samples": 7,
    } | config
    described = DistillConfig.model_validate(settings)
    values = {**identity_config(described), "loss": identity_config(described.effective_loss), "seed": seed}
    sources = {name: External("folder", name) for name in inputs}
    stage = Stage("distill", 1, values, sources, "pipeline.stages.distill:run", "toy")
    folders = {name: root / name for name in ("staging", "progress", "attempt")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    given = StageResources.model_validate({"micro_batch": 4, "checkpoint_every": 0} | (resources or {}))
    return StageRun(stage, dict(inputs), **folders, resources=given)


def read_directly(plan: StreamPlan, first: int) -> Iterator[StepRows]:
    """The stream's steps without Ray Data."""
    return (read_step(plan, step) for step in range(first, plan.steps))


WITHOUT_RAY = Services(stream=read_directly, report=lambda position: None, reclaimed=lambda: False)
"""Services for a run in this process."""
