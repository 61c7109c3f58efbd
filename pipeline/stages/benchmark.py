"""The latency stage: full model, student alone and OverFill in one process, alternating. See `overfill.benchmark`.

A released model stands in the student's place, alone. Its tokens are its own: prompts and outputs of the grid are as
many of them, and may be more or less text."""

from __future__ import annotations

import json

from pipeline.config import BenchmarkConfig
from pipeline.corpus.shards import TokenShards
from pipeline.stage import StageRun
from pipeline.stages.folders import model_folder
from pipeline.stages.remote import Metrics, run_on_worker

_CONTEXT = ("device", "threads", "versions")
_READING = ("refresh", "weights")
_TEXTS = 64
"""Held-out prompts that are at hand where latency depends on what is written."""
_FIGURES = ("ttft_s", "tpot_s", "tokens_per_s", "peak_bytes")


def run(run: StageRun) -> Metrics:
    """Measure; the payload is `latency.json`, the record carries `latency/<system>/...` of the first grid point."""
    return run_on_worker(measure, run, exclusive=True)


def measure(run: StageRun) -> Metrics:
    """In a Ray worker: load the models and time every grid point."""
    from overfill.benchmark import measure_systems

    settings = BenchmarkConfig.model_validate({k: v for k, v in run.config.items() if k not in (*_CONTEXT, *_READING)})
    student, released = run.inputs.get("student"), run.inputs.get("released")
    rows = measure_systems(
        model_folder(run.inputs["teacher"]),
        None if student is None else model_folder(student),
        batches=settings.batch,
        prompts=settings.prompt,
        outputs=settings.output,
        repeats=settings.repeats,
        warmup=settings.warmup,
        dtype=settings.dtype,
        device="cuda" if run.resources.gpus_per_worker else "cpu",
        decoder=settings.decoder,
        refresh=run.config["refresh"],
        weights=run.config["weights"],
        texts=_held_out_prompts(run),
        released=None if released is None else model_folder(released),
    )
    content = {"rows": rows, **{key: run.config[key] for key in _CONTEXT}}
    (run.staging / "latency.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    first = {row["system"]: row for row in reversed(rows)}
    figures = {f"latency/{system}/{name}": row[name] for system, row in sorted(first.items()) for name in _FIGURES}
    return {name: value for name, value in figures.items() if value is not None}


def _held_out_prompts(run: StageRun) -> list[list[int]]:
    """Token ids of prompts, where the stage was given the corpus."""
    if "data" not in run.inputs:
        return []
    shards = TokenShards.open(run.inputs["data"] / "test")
    return [row.prompt.tolist() for row in shards.read(range(min(_TEXTS, len(shards))))]
