"""Calibration in a worker: the full model reads its share of the samples, the workers' sums are added.

The sums are over samples in float64, so the scores do not depend on how samples are dealt to workers and micro-batches,
up to the order of summation. Under ZeRO stage 3 each worker holds its share of the full model's weights only.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from overfill.checkpoint import load_full_model
from overfill.config import ImportanceConfig
from overfill.errors import UserError
from overfill.importance import ImportanceAccumulator
from pipeline.config import StageResources
from pipeline.corpus.order import EMPTY_SLOT, BatchOrder
from pipeline.corpus.shards import TokenShards
from pipeline.stage import StageRun
from pipeline.stages.folders import model_folder
from pipeline.training.deepspeed_config import EngineSettings
from pipeline.training.distributed import Place, process_group
from pipeline.training.engine import frozen_engine
from pipeline.training.resources import stage_resources

SCORES_FILE = "scores.safetensors"

log = logging.getLogger(__name__)


def measure_importance(run: StageRun) -> dict[str, Any]:
    """Measure the scores of a `calibrate` stage; rank 0 writes them."""
    resources = stage_resources(run)
    with process_group(resources.gpus_per_worker, resources.threads) as place:
        return measure_in(run, resources, place)


def measure_in(run: StageRun, resources: StageResources, place: Place) -> dict[str, Any]:
    """As `measure_importance`, in a process group that is there."""
    config = ImportanceConfig.model_validate(run.config)
    began = time.perf_counter()
    batches = _batches(TokenShards.open(run.inputs["data"] / "train"), config.samples, resources, place)
    full = load_full_model(model_folder(run.inputs["teacher"]))
    settings = EngineSettings(
        workers=place.workers,
        zero_stage=resources.zero_stage,
        dtype="bf16" if full.dtype == torch.bfloat16 else "fp32",
        micro_batch=len(batches[0][0]),
        accumulation=1,
    )
    call, model = frozen_engine(full, settings, place.device)
    with ImportanceAccumulator(model, config.across, forward=call) as importance:
        for number, (tokens, mask) in enumerate(batches, start=1):
            if place.code_from_first(run.stop_requested()):
                return {"metrics": {}, "stopped": True, "step": number - 1}
            importance.update(tokens.to(place.device), mask.to(place.device))
            if place.first:
                read = place.workers * number * settings.micro_batch
                run.log_metrics(number, len(batches), {"calibrate/samples": read})
    for total in importance.state_dict().values():
        place.sum(total)
    scores = importance.scores()
    if place.first:
        scores.save(run.staging / SCORES_FILE)
    place.barrier()
    metrics = {"samples": scores.samples, "tokens": scores.tokens, "seconds": time.perf_counter() - began}
    return {"metrics": {f"calibrate/{name}": value for name, value in metrics.items()}}


def _batches(
    shards: TokenShards, samples: int, resources: StageResources, place: Place
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This worker's micro-batches (tokens, mask), both [b, T]: as many and of as many rows as every other worker's."""
    if len(shards) == 0:
        raise UserError(f"{shards.folder}: the corpus has no training sample, so there is nothing to calibrate on")
    chosen = calibration_samples(len(shards), samples)
    # One global batch of all chosen samples; the order's rule deals it to workers and micro-batches.
    prompts, responses = shards.prompt_lengths[chosen], shards.response_lengths[chosen]
    order = BatchOrder(prompts, responses, len(chosen), seed=0)
    size = min(resources.micro_batch, -(-len(chosen) // place.workers))
    slots = order.slots(0, place.workers, size, place.rank)
    return [_collate(shards, np.where(part == EMPTY_SLOT, EMPTY_SLOT, chosen[part])) for part in slots]


def calibration_samples(available: int, wanted: int) -> NDArray[np.int64]:
    """Sample numbers spread evenly over the corpus: all of it when it has no more than `wanted`."""
    return np.unique(np.linspace(0, available - 1, min(available, wanted)).round().astype(np.int64))


def _collate(shards: TokenShards, samples: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
    rows = iter(shards.read(samples[samples != EMPTY_SLOT]))
    texts = [
        np.zeros(0, np.int32) if sample == EMPTY_SLOT else np.concatenate([(row := next(rows)).prompt, row.response])
        for sample in samples
    ]
    tokens = torch.zeros(len(texts), max(1, *(len(text) for text in texts)), dtype=torch.int64)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = torch.from_numpy(text.astype(np.int64))
        mask[row, : len(text)] = True
    return tokens, mask
