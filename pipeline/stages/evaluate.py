"""The accuracy stage: a system's answers to held-out samples, with every sample kept. See `overfill.evaluation`.

A released model reads the same conversations in its own tokens and chat template (`pipeline.stages.held_out`). Its
answers are compared as text, as everybody's. Its likelihood of a reference is one of the same text, whatever its tokens,
so divided by the number of the *full model's* tokens in it, NLL and perplexity have the same unit for all systems.
Agreement on tokens means nothing for it."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overfill.dial import EXACT, Refresh
from pipeline.config import EvaluateConfig
from pipeline.corpus.shards import TokenShards
from pipeline.stage import StageRun
from pipeline.stages.folders import model_folder, tokenizer_folder
from pipeline.stages.remote import Metrics, run_on_worker
from pipeline.statistics import wilson

if TYPE_CHECKING:
    from collections.abc import Sequence

    from overfill.engine import Engine
    from overfill.evaluation import Judged
    from pipeline.corpus.shards import TokenRow


def run(run: StageRun) -> Metrics:
    """Judge; the payload is `samples.parquet` and `metrics.json`, the record carries the metrics too."""
    return run_on_worker(evaluate, run)


def evaluate(run: StageRun) -> Metrics:
    """In a Ray worker: load the models and judge the held-out samples."""
    from overfill.evaluation import Sample, judge

    settings = EvaluateConfig.model_validate({k: v for k, v in run.config.items() if k != "system"})
    released = "released" in run.inputs
    rows = _held_out(run.inputs["held_out" if released else "data"], settings.samples)
    engine, full = load_system(run, settings.dtype, settings.weights)
    exact = settings.refresh == EXACT
    asked: Counter[str] = Counter()
    judged = judge(
        engine,
        full,
        _tokenizer(run),
        [Sample(row.prompt, row.response, row.reference) for row in rows],
        max_new_tokens=settings.max_new_tokens,
        batch=run.resources.micro_batch,
        pattern=settings.answer,
        refresh=None if exact else Refresh.parse(settings.refresh),
        exact=exact,
        asked=asked,
        progress=lambda done: run.log_metrics(done, len(rows), {}),
    )
    theirs = _held_out(run.inputs["data"], len(rows)) if released else None
    metrics = summary(judged, None if theirs is None else sum(len(row.response) for row in theirs)) | asking(asked)
    _write_samples(run, rows, judged)
    (run.staging / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    return metrics


def asking(asked: Counter[str]) -> dict[str, float]:
    """How often the full model was asked again: shares of generated, and of drafted tokens; nothing if never."""
    found = {}
    if asked["refreshes"]:
        found["eval/refreshes_per_token"] = asked["refreshes"] / asked["tokens"]
    if asked["drafted"]:
        found["eval/acceptance_rate"] = asked["accepted"] / asked["drafted"]
    return found


def load_system(run: StageRun, dtype: str, weights: str) -> tuple[Engine, Engine]:
    """The judged system, as the stage's config names it, and the full model alone. A released model, whose tokens are
    not the full model's, stands for both."""
    from overfill.benchmark import DTYPES
    from overfill.checkpoint import load_full_model, load_student
    from overfill.engine import Engine

    device = "cuda" if run.resources.gpus_per_worker else "cpu"
    if "released" in run.inputs:
        model = load_full_model(model_folder(run.inputs["released"]), dtype=DTYPES[dtype], device=device)
        alone = Engine(model, model)
        return alone, alone
    model = load_full_model(model_folder(run.inputs["teacher"]), dtype=DTYPES[dtype], device=device)
    full = Engine(model, model)
    if run.config["system"] == "full":
        return full, full
    student = load_student(model_folder(run.inputs["student"]), dtype=DTYPES[dtype], device=device)
    reader = student if run.config["system"] == "student" else model
    return Engine(reader, student, weights=weights), full


def _tokenizer(run: StageRun) -> Any:
    """Of the judged system."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        tokenizer_folder(run.inputs["released" if "released" in run.inputs else "teacher"])
    )


def _held_out(folder: Path, samples: int) -> list[TokenRow]:
    shards = TokenShards.open(folder / "test")
    return shards.read(range(min(samples, len(shards))))


def summary(judged: Sequence[Judged], tokens_of_full: int | None = None) -> dict[str, float | int]:
    """The `eval/` metrics: shares with Wilson's interval, NLL in nats per response token, its exponential.

    `tokens_of_full`: of a system with other tokens than the full model, the full model's number of tokens in the same
    responses."""
    tokens = sum(one.response_tokens for one in judged) if tokens_of_full is None else tokens_of_full
    nll = sum(one.response_nll for one in judged) / tokens
    match = wilson(sum(one.correct for one in judged), len(judged))
    metrics: dict[str, float | int] = {
        "eval/exact_match": match.value,
        "eval/exact_match_low": match.low,
        "eval/exact_match_high": match.high,
        "eval/response_nll": nll,
        "eval/perplexity": math.exp(min(nll, 700.0)),
        "eval/samples": len(judged),
    }
    if tokens_of_full is None:
        metrics["eval/agreement"] = sum(one.agreeing_tokens for one in judged) / tokens
    return metrics


def _write_samples(run: StageRun, rows: Sequence[TokenRow], judged: Sequence[Judged]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    comparable = "released" not in run.inputs
    agreeing = pa.array([one.agreeing_tokens if comparable else None for one in judged], pa.int64())
    table = pa.table(
        {
            "sample": [row.sample for row in rows],
            "prompt": _tokenizer(run).batch_decode([row.prompt.tolist() for row in rows]),
            "reference": [row.reference for row in rows],
            "prediction": [one.prediction for one in judged],
            "correct": [one.correct for one in judged],
            "response_nll": [one.response_nll for one in judged],
            "response_tokens": [one.response_tokens for one in judged],
            "agreeing_tokens": agreeing,
        }
    )
    pq.write_table(table, run.staging / "samples.parquet")
