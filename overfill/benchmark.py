"""Latency of three systems through the same code: the full model, the student alone, OverFill.

TTFT is the time from the prompt to the first token, TPOT the time per token after it; both are reported apart, because
OverFill's first token costs what the full model's does and its others what the student's do (arXiv 2508.08446,
section 5). The systems alternate within every repetition, so that a machine that slows down slows all of them, and
medians are taken. Prompts are random tokens and nothing ends early: latency depends on shapes, not on what is said.

Letters: B batch, P prompt.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from overfill.checkpoint import load_full_model, load_student
from overfill.engine import Engine
from overfill.errors import UserError
from overfill.memory import peak_growth
from overfill.shapes import ModelShape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Timing:
    """One generation, in seconds."""

    ttft: float
    """From the prompt to the first token."""
    tpot: float
    """Mean time of each token after the first."""


def measure_systems(
    full: Path,
    student: Path | None,
    *,
    batches: Sequence[int],
    prompts: Sequence[int],
    outputs: Sequence[int],
    repeats: int,
    warmup: int,
    dtype: str,
    device: str,
) -> list[dict[str, Any]]:
    """Time the full model and, with a student folder, the student alone and OverFill on every grid point.

    Returns one row per grid point and system: `system, batch, prompt, output, ttft_s, tpot_s, tokens_per_s` (new tokens
    of all rows over the whole time), `ttft_spread_s` and `tpot_spread_s` ([lowest, highest]), `peak_bytes` (weights that
    the system holds and what it allocated beside them), `bytes_per_token` (what a decode step must read, at the prompt's
    length). Raises UserError where a grid point is longer than the models' positions.
    """
    place = torch.device(device)
    models = {"full": load_full_model(full, dtype=DTYPES[dtype], device=place)}
    if student is not None:
        models["student"] = load_student(student, dtype=DTYPES[dtype], device=place)
    engines = {name: Engine(model, model) for name, model in models.items()}
    if student is not None:
        engines["overfill"] = Engine(models["full"], models["student"])
    rows: list[dict[str, Any]] = []
    for batch, prompt, output in product(batches, prompts, outputs):
        _check_positions(engines, prompt + output)
        rows += measure_point(engines, batch, prompt, output, repeats, warmup, dtype)
    return rows


def measure_point(
    engines: dict[str, Engine], batch: int, prompt: int, output: int, repeats: int, warmup: int, dtype: str
) -> list[dict[str, Any]]:
    """One grid point: rows as in `measure_systems`, in the order of `engines`."""
    vocabulary = min(engine.prefill_model.config.vocab_size for engine in engines.values())
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (batch, prompt), generator=source)
    timings: dict[str, list[Timing]] = {name: [] for name in engines}
    for repetition in range(warmup + repeats):
        for name, engine in engines.items():
            timing = time_generation(engine, ids, output)
            if repetition >= warmup:
                timings[name].append(timing)
    point = {"batch": batch, "prompt": prompt, "output": output, "dtype": dtype, "repeats": repeats}
    return [
        {"system": name, **point, **_summary(timings[name], batch, output), **_memory(engine, ids, output, dtype)}
        for name, engine in engines.items()
    ]


@torch.no_grad()
def time_generation(engine: Engine, prompt_ids: Tensor, output: int) -> Timing:
    """Generate `output` tokens greedily after `prompt_ids` [B, P], all real tokens."""
    mask = torch.ones_like(prompt_ids, dtype=torch.bool)
    _wait(engine.device)
    start = time.perf_counter()
    logits, state = engine.prefill(prompt_ids, mask)
    tokens = logits.argmax(-1)
    _wait(engine.device)
    first = time.perf_counter()
    for _ in range(output - 1):
        tokens = engine.decode_one(state, tokens).argmax(-1)
    _wait(engine.device)
    return Timing(first - start, (time.perf_counter() - first) / max(1, output - 1))


def _summary(timings: Sequence[Timing], batch: int, output: int) -> dict[str, Any]:
    ttft, tpot = [t.ttft for t in timings], [t.tpot for t in timings]
    whole = median(t.ttft + t.tpot * (output - 1) for t in timings)
    return {
        "ttft_s": median(ttft),
        "tpot_s": median(tpot),
        "tokens_per_s": batch * output / whole,
        "ttft_spread_s": [min(ttft), max(ttft)],
        "tpot_spread_s": [min(tpot), max(tpot)],
    }


def _memory(engine: Engine, ids: Tensor, output: int, dtype: str) -> dict[str, Any]:
    models = {id(model): model for model in (engine.prefill_model, engine.decode_model)}
    growth = peak_growth(lambda: time_generation(engine, ids, output), engine.device)
    weights = sum(_weight_bytes(model) for model in models.values())
    shape = ModelShape.from_config(engine.decode_model.config.to_dict())
    return {
        "peak_bytes": None if growth is None else weights + growth,
        "weight_bytes": weights,
        "bytes_per_token": shape.decode_bytes(dtype, ids.shape[1], len(ids)),
    }


def _weight_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _check_positions(engines: dict[str, Engine], length: int) -> None:
    longest = min(engine.max_positions for engine in engines.values())
    if length > longest:
        raise UserError(
            f"benchmark: prompt + output is {length} tokens, the models have {longest} positions; shorten either"
        )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
