"""A teacher of our own, trained in this process without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_toys import VOCABULARY, WITHOUT_RAY, make_inputs
from transformers import AutoModelForCausalLM, AutoTokenizer

from overfill.checkpoint import load_full_model
from pipeline.config import StageResources
from pipeline.config_training import PretrainConfig
from pipeline.corpus.order import BatchOrder
from pipeline.corpus.shards import TokenShards
from pipeline.corpus.tokenizer import character_tokenizer, save_tokenizer
from pipeline.fingerprint import identity_config
from pipeline.stage import External, Stage, StageRun
from pipeline.training.distributed import Place

SHAPE = {"hidden": 32, "intermediate": 48, "layers": 2, "heads": 4, "kv_heads": 2, "tied": True}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inputs")
    data = make_inputs(root)["data"]
    save_tokenizer(character_tokenizer(), root / "tokenizer" / "tokenizer")
    return {"data": data, "tokenizer": root / "tokenizer"}


def pretrain_run(root: Path, inputs: dict[str, Path], **config: Any) -> StageRun:
    settings = {"tokens": 12 * 60, "batch_tokens": 60, "learning_rate": 5e-3, "evaluate_samples": 7, **SHAPE} | config
    values = {**identity_config(PretrainConfig.model_validate(settings)), "max_length": 32}
    values.pop("tokenizer")
    stage = Stage("teacher", 1, values, {name: External("x", name) for name in inputs}, "pipeline.stages.teacher:run")
    folders = {name: root / name for name in ("staging", "progress", "attempt")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    return StageRun(stage, inputs, **folders, resources=StageResources(micro_batch=4))


def train(run: StageRun, place: Place) -> dict[str, Any]:
    from pipeline.training.pretrain import train_in

    return train_in(run, run.resources, place, WITHOUT_RAY)


def losses(run: StageRun) -> list[float]:
    lines = [json.loads(line)["metrics"] for line in run.metrics_path.read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def first_batch_nll(run: StageRun, prompts: bool) -> float:
    """Mean NLL of step 0's targets under the untrained model, each row by itself."""
    from pipeline.training.pretrain import new_model

    config = PretrainConfig.model_validate({k: v for k, v in run.config.items() if k != "max_length"})
    model = new_model(config, AutoTokenizer.from_pretrained(run.inputs["tokenizer"] / "tokenizer"), 32)
    shards = TokenShards.open(run.inputs["data"] / "train")
    sequences = round(60 / float(shards.lengths.mean()))
    total, count = 0.0, 0
    for row in shards.read(BatchOrder(shards.prompt_lengths, shards.response_lengths, sequences, 0).batch(0)):
        ids = torch.tensor([[*row.prompt.tolist(), *row.response.tolist()]])
        nll = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        targets = nll if prompts else nll[len(row.prompt) - 1 :]
        total, count = total + targets.sum().item(), count + len(targets)
    return total / count


@pytest.mark.parametrize("prompt_loss", [False, True])
def test_the_loss_is_the_mean_over_response_tokens_or_over_all_tokens(
    prompt_loss: bool, tmp_path: Path, inputs: dict[str, Path], one_worker: Place
) -> None:
    run = pretrain_run(tmp_path, inputs, prompt_loss=prompt_loss)
    train(run, one_worker)
    measured = losses(run)
    assert measured[0] == pytest.approx(first_batch_nll(run, prompts=prompt_loss), rel=1e-5)
    assert measured[-1] < measured[0]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_each_family_becomes_a_folder_that_transformers_and_pruning_accept(
    architecture: str, tmp_path: Path, inputs: dict[str, Path], one_worker: Place
) -> None:
    run = pretrain_run(tmp_path, inputs, architecture=architecture, tied=False, tokens=60)
    metrics = train(run, one_worker)["metrics"]
    folder = run.staging / "model"
    model = load_full_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == architecture
    assert model.config.vocab_size == len(tokenizer) >= VOCABULARY
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.float32
    assert metrics["validation/nll"] == pytest.approx(metrics["validation/best_nll"])


def test_the_seed_decides_the_weights_and_nothing_else_does(
    tmp_path: Path, inputs: dict[str, Path], one_worker: Place
) -> None:
    runs = [pretrain_run(tmp_path / str(i), inputs, seed=seed, tokens=60) for i, seed in enumerate((1, 1, 2))]
    for run in runs:
        torch.manual_seed(len(str(run.staging)))
        torch.rand(7)
        train(run, one_worker)
    first, again, other = (load_full_model(run.staging / "model").state_dict() for run in runs)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
