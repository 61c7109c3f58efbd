"""A whole run in this process: DeepSpeed engine and loop as in a worker, but without Ray."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from machine_metrics import of_the_machine
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from training_toys import WITHOUT_RAY, distill_run, make_inputs, read_directly, tiny_model

from overfill.batch import PromptResponseBatch
from overfill.checkpoint import load_full_model, load_student, read_manifest
from overfill.config import ImportanceConfig
from overfill.distillation import DistillationModel, teacher_pass
from overfill.importance import ImportanceScores
from overfill.lora import add_adapters
from pipeline.config_training import DistillConfig, TrainingConfig
from pipeline.corpus.order import BatchOrder, sequences_per_batch
from pipeline.corpus.shards import TokenShards
from pipeline.fingerprint import identity_config
from pipeline.stage import Stage, StageRun
from pipeline.training import checkpoints
from pipeline.training.deepspeed_config import EngineSettings
from pipeline.training.distill import OBJECTIVES
from pipeline.training.distributed import Place
from pipeline.training.engine import KINDS, WEIGHT, StudentEngine
from pipeline.training.failures import NodeReclaimed
from pipeline.training.schedule import learning_rate
from pipeline.training.session import Services, steps_root
from pipeline.training.stream import StepRows, StreamPlan


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def train(run: StageRun, place: Place, services: Services = WITHOUT_RAY) -> dict[str, Any]:
    from pipeline.training.distill import train_in

    return train_in(run, run.resources, place, services)


def weights(run: StageRun) -> dict[str, torch.Tensor]:
    return dict(load_student(run.staging / "model").named_parameters())


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor - other[name]).abs().max().item() <= tolerance, name


def by_hand(run: StageRun) -> dict[str, torch.Tensor]:
    """The same training with torch alone: one batch without padding slots, its mean loss over tokens, AdamW."""
    config = DistillConfig.model_validate({key: value for key, value in run.config.items() if key != "seed"})
    config = config.model_copy(update={"learning_rate": config.effective_learning_rate})
    loss = config.effective_loss
    shards = TokenShards.open(run.inputs["data"] / "train")
    sequences = sequences_per_batch(config.batch_tokens, shards.lengths)
    order = BatchOrder(shards.prompt_lengths, shards.response_lengths, sequences, run.config["seed"])
    full = load_full_model(run.inputs["teacher"] / "model")
    student = load_student(run.inputs["student"] / "model").train()
    if config.method == "lora":
        add_adapters(student, config.effective_lora, run.config["seed"])
    model = DistillationModel(student)
    moments = ImportanceScores.load(run.inputs["scores"] / "scores.safetensors").kv_second_moment
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2))
    method = OBJECTIVES[config.method]
    for step in range(config.steps):
        rows = [(row.prompt.copy(), row.response.copy()) for row in shards.read(order.batch(step))]
        batch = PromptResponseBatch.collate(rows, pad_id=0)
        terms = model(batch, teacher_pass(full, batch), full.get_output_embeddings(), method, loss, moments, 1)
        total, count = terms["loss"]
        adamw.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(config, step, config.steps)
        adamw.step()
    if config.method == "lora":
        for module in student.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()
        return {name.replace(".base_layer", ""): p for name, p in student.named_parameters() if ".lora_" not in name}
    return dict(student.named_parameters())


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_training_is_adamw_on_the_mean_over_the_batch_tokens_whatever_zero_shards(
    zero_stage: int, tmp_path: Path, inputs: dict[str, Path], one_worker: Place
) -> None:
    # A micro-batch of 4 splits 6 sequences unevenly, so a mean of means or a division by micro-batches would show.
    run = distill_run(tmp_path, inputs, resources={"zero_stage": zero_stage, "micro_batch": 4})
    train(run, one_worker)
    assert_same(weights(run), by_hand(run), tolerance=2e-5)


def test_methods_without_the_full_models_cache_train_on_the_whole_response(
    tmp_path: Path, inputs: dict[str, Path], one_worker: Place
) -> None:
    run = distill_run(tmp_path, inputs, method="pruned", loss={"kl": 1.0, "ce": 0.5})
    train(run, one_worker)
    assert_same(weights(run), by_hand(run), tolerance=2e-5)


LORA = {"method": "lora", "lora": {"rank": 2, "alpha": 6.0, "learning_rate": 2e-2}}


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_lora_trains_the_adapters_alone_and_merges_them_into_a_plain_student(
    zero_stage: int, tmp_path: Path, inputs: dict[str, Path], one_worker: Place
) -> None:
    run = distill_run(tmp_path, inputs, resources={"zero_stage": zero_stage}, **LORA)
    train(run, one_worker)
    assert_same(weights(run), by_hand(run), tolerance=2e-5)
    before = dict(load_student(inputs["student"] / "model").named_parameters())
    moved = {name for name, tensor in weights(run).items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if name.endswith("_proj.weight")}
    assert read_manifest(run.staging / "model").method == "lora"


@pytest.mark.parametrize(("zero_stage", "dtype"), [(0, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")])
def test_a_resumed_lora_run_ends_bit_for_bit_from_checkpoints_of_the_adapters(
    zero_stage: int, dtype: str, tmp_path: Path, inputs: dict[str, Path], one_worker: Place
) -> None:
    resources = {"zero_stage": zero_stage, "checkpoint_every": 3}
    settings: dict[str, Any] = {"resources": resources, "dtype": dtype, "tokens": 8 * 60, **LORA}
    settings["lora"] = {"rank": 2, "targets": ["q_proj", "down_proj"]}
    unbroken = distill_run(tmp_path / "unbroken", inputs, **settings)
    train(unbroken, one_worker)
    broken = distill_run(tmp_path / "broken", inputs, **settings)
    with pytest.raises(Interrupted):
        train(broken, one_worker, dataclasses.replace(WITHOUT_RAY, stream=killed_before(5)))
    (file,) = [folder / "rank-00000.safetensors" for folder in steps_root(broken).glob("step-*")]
    with safe_open(file, "pt") as saved:
        kept = {name for name in saved.keys() if not name.startswith("random/")}  # noqa: SIM118 - not a dict
    adapters = {f"student.model.layers.{layer}.{part}.lora_{side}.default.weight" for layer in (0, 1) for side in "AB"
                for part in ("self_attn.q_proj", "mlp.down_proj")}  # fmt: skip
    assert kept == {f"{kind}/{name}" for kind in KINDS for name in adapters}
    train(broken, one_worker)
    assert_same(weights(broken), weights(unbroken))


def test_a_step_with_more_micro_batches_and_activation_checkpointing_learns_the_same(
    tmp_path: Path, inputs: dict[str, Path], one_worker: Place
) -> None:
    large = distill_run(tmp_path / "large", inputs, resources={"micro_batch": 64})
    small = distill_run(
        tmp_path / "small", inputs, resources={"micro_batch": 1, "activation_checkpointing": True, "loss_chunks": 3}
    )
    train(large, one_worker)
    train(small, one_worker)
    assert_same(weights(large), weights(small), tolerance=2e-5)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_bf16_rounds_weights_but_not_rotary_frequencies(zero_stage: int, one_worker: Place) -> None:
    config = TrainingConfig(dtype="bf16")
    settings = EngineSettings(workers=1, zero_stage=zero_stage, dtype="bf16", micro_batch=1, accumulation=1)
    expected = tiny_model()
    engine = StudentEngine(tiny_model(), config, settings, one_worker.device)
    frequencies = engine.module.get_buffer("model.rotary_emb.inv_freq")
    assert torch.equal(frequencies, expected.get_buffer("model.rotary_emb.inv_freq"))
    for name, parameter in engine.parameters():
        assert parameter.dtype == torch.bfloat16
        rounded = expected.get_parameter(name).to(torch.bfloat16).float()
        assert torch.equal(engine.read(parameter, WEIGHT).reshape(rounded.shape), rounded)


class Interrupted(Exception):
    """Stands for a killed worker."""


def killed_before(step: int) -> Callable[[StreamPlan, int], Iterator[StepRows]]:
    def stream(plan: StreamPlan, first: int) -> Iterator[StepRows]:
        for rows in read_directly(plan, first):
            if rows.step == step:
                raise Interrupted
            yield rows

    return stream


def recording(seen: list[tuple[int, list[list[int]]]]) -> Callable[[StreamPlan, int], Iterator[StepRows]]:
    def stream(plan: StreamPlan, first: int) -> Iterator[StepRows]:
        for rows in read_directly(plan, first):
            seen.append((rows.step, [samples.tolist() for samples in rows.samples]))
            yield rows

    return stream


@pytest.mark.parametrize(("zero_stage", "dtype"), [(0, "fp32"), (2, "fp32"), (3, "fp32"), (2, "bf16"), (3, "bf16")])
def test_a_resumed_run_ends_bit_for_bit_as_an_unbroken_one(
    zero_stage: int, dtype: str, tmp_path: Path, inputs: dict[str, Path], one_worker: Place
) -> None:
    settings = {"resources": {"zero_stage": zero_stage, "checkpoint_every": 3}, "dtype": dtype, "tokens": 8 * 60}
    unbroken = distill_run(tmp_path / "unbroken", inputs, **settings)
    unbroken_samples: list[tuple[int, list[list[int]]]] = []
    expected = train(unbroken, one_worker, dataclasses.replace(WITHOUT_RAY, stream=recording(unbroken_samples)))
    broken = distill_run(tmp_path / "broken", inputs, **settings)
    with pytest.raises(Interrupted):
        train(broken, one_worker, dataclasses.replace(WITHOUT_RAY, stream=killed_before(5)))
    assert not any(broken.staging.iterdir())
    resumed_samples: list[tuple[int, list[list[int]]]] = []
    result = train(broken, one_worker, dataclasses.replace(WITHOUT_RAY, stream=recording(resumed_samples)))
    assert_same(weights(broken), weights(unbroken))
    assert resumed_samples == unbroken_samples[3:]
    same = ("train/loss", "train/kv", "validation/nll", "validation/best_nll", "train/tokens", "train/steps")
    assert {name: result["metrics"][name] for name in same} == {name: expected["metrics"][name] for name in same}


def test_a_run_may_go_on_under_another_zero_stage(tmp_path: Path, inputs: dict[str, Path], one_worker: Place) -> None:
    run = distill_run(tmp_path, inputs, resources={"zero_stage": 3, "checkpoint_every": 4})
    with pytest.raises(Interrupted):
        train(run, one_worker, dataclasses.replace(WITHOUT_RAY, stream=killed_before(6)))
    train(distill_run(tmp_path, inputs, resources={"zero_stage": 0}), one_worker)
    assert_same(weights(run), by_hand(run), tolerance=2e-5)


def test_a_torn_checkpoint_is_skipped_and_the_run_still_ends_the_same(
    tmp_path: Path, inputs: dict[str, Path], one_worker: Place, caplog: pytest.LogCaptureFixture
) -> None:
    run = distill_run(tmp_path / "run", inputs, resources={"checkpoint_every": 2})
    with pytest.raises(Interrupted):
        train(run, one_worker, dataclasses.replace(WITHOUT_RAY, stream=killed_before(7)))
    newest = checkpoints.newest_complete(steps_root(run), lambda folder, reason: None)
    assert newest is not None
    (newest / "rank-00000.safetensors").write_bytes(b"torn")
    train(run, one_worker)
    assert f"{newest.name} is not complete (rank-00000.safetensors has 4 bytes" in caplog.text
    assert_same(weights(run), by_hand(run), tolerance=2e-5)


def test_a_run_that_is_asked_to_stop_saves_its_position_and_publishes_nothing(
    tmp_path: Path, inputs: dict[str, Path], one_worker: Place
) -> None:
    run = distill_run(tmp_path / "run", inputs)
    stopping = dataclasses.replace(run, stop_requested=lambda: run.metrics_path.exists())
    result = train(stopping, one_worker)
    assert (result["stopped"], result["step"]) == (True, 1)
    assert not any(run.staging.iterdir())
    assert train(run, one_worker)["stopped"] is False
    assert_same(weights(run), by_hand(run), tolerance=2e-5)


def test_a_stop_between_two_lines_leaves_the_same_curve_as_no_stop(
    tmp_path: Path, inputs: dict[str, Path], one_worker: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.training.loop.line_every", lambda steps: 4)
    unbroken = distill_run(tmp_path / "unbroken", inputs)
    train(unbroken, one_worker)
    stopped = distill_run(tmp_path / "stopped", inputs)
    seen: list[tuple[int, list[list[int]]]] = []
    services = dataclasses.replace(WITHOUT_RAY, stream=recording(seen))
    for step in (2, 7):
        asked = dataclasses.replace(stopped, stop_requested=lambda step=step: len(seen) == step)
        assert train(asked, one_worker, services)["step"] == step, "it stops after the very step"
    train(stopped, one_worker, services)
    assert [step for step, _ in seen] == list(range(12)), "each step once"
    assert curve(stopped) == curve(unbroken)
    assert_same(weights(stopped), weights(unbroken))


def curve(run: StageRun) -> list[tuple[int, int, dict[str, float]]]:
    """(step, tokens, metrics) of every line, without those of the machine."""
    found = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    return [
        (line["step"], line["tokens"], {k: v for k, v in line["metrics"].items() if not of_the_machine(k)})
        for line in found
    ]


def test_calibration_that_is_asked_to_stop_ends_before_its_next_batch_and_writes_nothing(
    tmp_path: Path, inputs: dict[str, Path], one_worker: Place
) -> None:
    from pipeline.training.calibrate import measure_in

    like = distill_run(tmp_path, inputs, resources={"micro_batch": 2})
    config = identity_config(ImportanceConfig(samples=8))
    stage = Stage("calibrate", 1, config, like.stage.inputs, "pipeline.stages.importance:run")
    run = dataclasses.replace(like, stage=stage, stop_requested=like.metrics_path.exists)
    assert measure_in(run, run.resources, one_worker) == {"metrics": {}, "stopped": True, "step": 1}
    assert not any(run.staging.iterdir())


def test_a_node_that_is_taken_away_loses_no_step(tmp_path: Path, inputs: dict[str, Path], one_worker: Place) -> None:
    run = distill_run(tmp_path, inputs)
    seen: list[tuple[int, list[list[int]]]] = []
    services = dataclasses.replace(WITHOUT_RAY, stream=recording(seen))
    with pytest.raises(NodeReclaimed, match="step 5 is saved"):
        train(run, one_worker, dataclasses.replace(services, reclaimed=lambda: len(seen) == 5))
    train(run, one_worker, services)
    assert [step for step, _ in seen] == list(range(12))
    assert_same(weights(run), by_hand(run), tolerance=2e-5)


def test_a_run_whose_last_step_was_saved_only_writes_the_student_again(
    tmp_path: Path, inputs: dict[str, Path], one_worker: Place
) -> None:
    run = distill_run(tmp_path, inputs)
    first = train(run, one_worker)
    before = weights(run)
    for file in (run.staging / "model").iterdir():
        file.unlink()
    second = train(run, one_worker)
    assert_same(before, weights(run))
    measured = dict.fromkeys(("train/seconds", "train/peak_bytes"), 0)
    assert first["metrics"] | measured == second["metrics"] | measured


def test_metrics_are_means_over_tokens_and_come_with_every_checkpointed_step(
    tmp_path: Path, inputs: dict[str, Path], one_worker: Place
) -> None:
    run = distill_run(tmp_path, inputs, resources={"micro_batch": 4})
    other = distill_run(tmp_path / "other", inputs, resources={"micro_batch": 2, "zero_stage": 2})
    train(run, one_worker)
    train(other, one_worker)
    lines, other_lines = ([json.loads(line) for line in r.metrics_path.read_text().splitlines()] for r in (run, other))
    trained = [line for line in lines if "train/loss" in line["metrics"]]
    assert [line["step"] for line in trained] == list(range(1, 13))
    assert [line["step"] for line in lines if "validation/nll" in line["metrics"]] == [5, 10, 12]
    measured = {name for name in lines[0]["metrics"] if of_the_machine(name)}
    assert "system/cpu_utilization_percentage" in measured
    for line, other_line in zip(lines, other_lines, strict=True):
        for name in line["metrics"].keys() - measured:
            assert line["metrics"][name] == pytest.approx(other_line["metrics"][name], rel=1e-4), name
    loss = trained[0]["metrics"]
    assert loss["train/loss"] == pytest.approx(loss["train/kl"] + 3.0 * loss["train/kv"], rel=0.2)
    assert trained[-1]["metrics"]["train/kl"] < trained[0]["metrics"]["train/kl"]


def test_the_student_folder_names_its_method_and_a_random_start_keeps_no_channels(
    tmp_path: Path, inputs: dict[str, Path], one_worker: Place
) -> None:
    overfill = distill_run(tmp_path / "overfill", inputs, tokens=60)
    scratch = distill_run(tmp_path / "scratch", inputs, method="scratch", tokens=60)
    train(overfill, one_worker)
    train(scratch, one_worker)
    trained, random = (read_manifest(run.staging / "model") for run in (overfill, scratch))
    assert (trained.method, random.method) == ("overfill", "scratch")
    assert trained.kept_hidden is not None
    assert random.kept_hidden is None
    assert trained.full_model == random.full_model
    assert trained.widths == random.widths


def test_random_generators_go_on_where_the_checkpoint_left_them(
    tmp_path: Path, inputs: dict[str, Path], one_worker: Place
) -> None:
    def draw() -> tuple[float, ...]:
        return random.random(), float(np.random.standard_normal()), float(torch.rand(()))

    np.random.standard_normal()  # leaves a second value in the generator's store
    run = distill_run(tmp_path, inputs, tokens=60)
    train(run, one_worker)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    train(run, one_worker)
    assert draw() == expected
