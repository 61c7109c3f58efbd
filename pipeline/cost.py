"""What a stage will cost, from shapes alone: memory of a worker and floating-point operations. Estimates, no torch.

Memory of a training worker, in bytes (ZeRO, arXiv 1910.02054, section 3, with W workers):

- weights and gradients in the training type; under stage 3 weights / W, from stage 2 gradients / W;
- AdamW's two moments in fp32 and, under bf16, fp32 master weights; from stage 1 all of them / W;
- the full model's weights, / W under stage 3, and its keys and values for a micro-batch;
- activations of a micro-batch: per layer and token about 16 hidden + 4 intermediate values, or with activation
  checkpointing one hidden vector per layer and one layer whole; and the logits of a loss chunk, three times.

Operations of training are an upper bound: as if every token of the corpus were part of a response, since the share of
responses is known only when the corpus has been read.
"""

from __future__ import annotations

from dataclasses import dataclass

from overfill.config import LoraConfig
from overfill.shapes import BYTES, ModelShape
from pipeline.config import StageResources, TrainingConfig
from pipeline.sweep import Cell


@dataclass(frozen=True)
class Cost:
    """Cost of one stage; bytes and operations, None where a stage has no such cost worth naming."""

    memory: float | None
    """Bytes of one worker."""
    flops: float | None
    """Floating-point operations of the whole stage, all workers together; an upper bound for training."""


def cell_costs(cell: Cell) -> dict[str, Cost]:
    """Stage name -> cost, for the stages of a cell that hold a model."""
    config, full, student = cell.config, cell.shape, cell.decodes
    length = config.data.max_length
    costs: dict[str, Cost] = {}
    if config.teacher.pretrain is not None:
        training = config.teacher.pretrain
        memory = training_memory(full, None, training, config.resources.teacher, length)
        costs["teacher"] = Cost(memory, 3 * full.forward_flops(training.tokens, length / 2))
    if cell.widths is not None:
        costs |= {
            "calibrate": _calibration(cell, full, length),
            "prune": Cost(full.weight_bytes("fp32") / full.layers + student.weight_bytes("fp32"), None),
            "distill": _distillation(cell, full, student, length),
        }
    costs["evaluate"] = _evaluation(cell, full, student, length)
    costs["tasks"] = Cost(costs["evaluate"].memory, None)  # how long its prompts are is known only when they are made
    return costs


def _calibration(cell: Cell, full: ModelShape, length: int) -> Cost:
    resources = cell.config.resources.calibrate
    weights = full.weight_bytes("bf16") / (resources.workers if resources.zero_stage == 3 else 1)
    activations = _layer_activations(full, resources.micro_batch * length) * BYTES["bf16"]
    tokens = cell.config.calibrate.samples * length
    return Cost(weights + activations, full.forward_flops(tokens, length / 2))


def _distillation(cell: Cell, full: ModelShape, student: ModelShape, length: int) -> Cost:
    training, resources = cell.config.distill, cell.config.resources.distill
    forward = full.forward_flops(training.tokens, length / 2)
    passes = 4 if resources.activation_checkpointing else 3
    trained: int | None = None
    if cell.method == "lora":
        passes -= 1  # gradients go through the frozen weights, none are computed for them
        trained = adapter_parameters(student, training.effective_lora)
    flops = forward + passes * student.forward_flops(training.tokens, length / 2)
    return Cost(training_memory(student, full, training, resources, length, trained), flops)


def adapter_parameters(shape: ModelShape, lora: LoraConfig) -> int:
    """Parameters of the adapters on a model of this shape."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {
        "q_proj": shape.hidden + queries,
        "k_proj": shape.hidden + keys,
        "v_proj": shape.hidden + keys,
        "o_proj": queries + shape.hidden,
        "gate_proj": shape.hidden + shape.intermediate,
        "up_proj": shape.hidden + shape.intermediate,
        "down_proj": shape.intermediate + shape.hidden,
    }
    return shape.layers * lora.rank * sum(sizes[target] for target in lora.targets)


def _evaluation(cell: Cell, full: ModelShape, student: ModelShape, length: int) -> Cost:
    settings = cell.config.evaluate
    reader = student if cell.method == "released" else full
    models = [reader, student] if cell.widths else [reader]
    weights = sum(model.weight_bytes(settings.dtype) for model in models)
    cache = cell.config.resources.evaluate.micro_batch * length * reader.kv_bytes_per_token(settings.dtype)
    per_token = student.forward_flops(settings.max_new_tokens, length)
    return Cost(weights + cache, settings.samples * (reader.forward_flops(length, length / 2) + per_token))


def training_memory(
    trained: ModelShape,
    full: ModelShape | None,
    training: TrainingConfig,
    resources: StageResources,
    length: int,
    parameters: int | None = None,
) -> float:
    """Bytes of one training worker; `full` is the frozen full model beside the trained one, if any, and `parameters`
    how many are trained where the model itself is frozen."""
    workers, stage, size = resources.workers, resources.zero_stage, BYTES[training.dtype]
    frozen, learning = (0, trained.parameters()) if parameters is None else (trained.parameters(), parameters)
    states = 8 + (4 if training.dtype == "bf16" else 0)
    memory = (frozen + learning) * size / (workers if stage >= 3 else 1)
    memory += learning * size / (workers if stage >= 2 else 1)
    memory += learning * states / (workers if stage >= 1 else 1)
    tokens = resources.micro_batch * length
    if full is not None:
        memory += full.weight_bytes(training.dtype) / (workers if stage >= 3 else 1)
        memory += tokens * full.kv_bytes_per_token(training.dtype)
    layers = 1 if resources.activation_checkpointing else trained.layers
    memory += layers * _layer_activations(trained, tokens) * size
    memory += trained.layers * trained.hidden * tokens * size if resources.activation_checkpointing else 0
    return memory + 3 * tokens / resources.loss_chunks * trained.vocabulary * BYTES["fp32"]


def _layer_activations(shape: ModelShape, tokens: int) -> float:
    return tokens * (16 * shape.hidden + 4 * shape.intermediate)
