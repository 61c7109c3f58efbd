"""A sweep's store with invented results, written as the stages write them: what is read back is known beforehand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from pipeline.build import Build
from pipeline.config import ExperimentConfig
from pipeline.harness.results import Metrics as TaskMetrics
from pipeline.harness.results import Named, Scored, TaskResult
from pipeline.stage import Stage
from pipeline.statistics import wilson
from pipeline.store import Store
from pipeline.sweep import Cell, expand
from pipeline.watch import METRICS_FILE

SAMPLES = 200
ANSWERS = {True: "4", False: "5"}
"""What a model wrote where it was right, and where it was wrong."""
TPOT = {"full": 0.004, "overfill": 0.001, "student": 0.00095, "exact": 0.002}
PEAK = {"full": 4_000_000, "overfill": 5_000_000, "student": 1_000_000, "exact": 5_000_000}
TTFT = {"full": 0.040, "overfill": 0.041, "student": 0.012, "exact": 0.042}


def toy_cells(
    ratios: Sequence[float] = (0.5,),
    methods: Sequence[str] = ("overfill", "pruned"),
    seeds: Sequence[int] = (0,),
    **sections: Any,
) -> list[Cell]:
    """Cells of a sweep over a teacher that is trained on the toy corpus."""
    axes: dict[str, Any] = {
        "prune": [{"hidden": ratio, "intermediate": ratio} for ratio in ratios],
        "distill.method": list(methods),
    }
    values: dict[str, Any] = {
        "name": "toy",
        "description": "Quality falls slower with the full model's prefill.",
        "teacher": {"name": "small", "pretrain": {"hidden": 64, "intermediate": 128, "layers": 2}},
        "distill": {"tokens": 1000, "batch_tokens": 100},
        "sweep": {"axes": axes | sections.pop("axes", {}), "seeds": list(seeds)},
    }
    return expand(ExperimentConfig.model_validate(values | sections), "toy.yaml")


class SyntheticStore:
    """Writes stages into a store as a run would."""

    def __init__(self, root: Path) -> None:
        self.store = Store(root)

    def begin(self, stage: Stage) -> Build:
        """A running attempt, of this process."""
        build = Build.begin(self.store, stage, self.store.facts(stage, explain=False))
        assert build is not None
        return build

    def log(self, stage: Stage, steps: Iterable[int], of: int = 10, start: float = 1_000.0, **metrics: float) -> None:
        """Lines of a curve: the loss falls as 10 / step, one step a second, 100 tokens a step."""
        folder = self.store.create(stage) / "progress"
        for step in steps:
            line = {"train/loss": 10.0 / step, **metrics}
            entry = {"step": step, "steps": of, "tokens": 100 * step, "time": start + step, "metrics": line}
            with (folder / METRICS_FILE).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")

    def publish(self, stage: Stage, cell: Cell, correct: np.ndarray | None = None, anew: bool = False) -> None:
        """Finish one stage of a cell; `correct` [samples] are an evaluation's outcomes. `anew`: in place of one that was
        altered."""
        if not anew and self.store.record(stage) is not None:
            return
        build = self.begin(stage)
        metrics = _write(stage, cell, build.staging, np.ones(SAMPLES, bool) if correct is None else correct)
        build.publish(metrics)
        build.release()

    def finish(self, cell: Cell, correct: np.ndarray | None = None) -> None:
        """Finish every stage of a cell, with a curve of ten steps for the student's training."""
        for stage in cell.stages:
            if stage.name == "distill" and self.store.record(stage) is None:
                self.log(stage, range(1, 11))
            self.publish(stage, cell, correct)


def outcomes(right: int, samples: int = SAMPLES) -> np.ndarray:
    """The first `right` of `samples` are correct."""
    return np.arange(samples) < right


def _write(stage: Stage, cell: Cell, folder: Path, correct: np.ndarray) -> dict[str, float | int | str]:
    if stage.name in ("teacher", "prune", "distill", "released"):
        return _write_model(stage, cell, folder)
    if stage.name == "evaluate":
        return _write_evaluation(folder, correct)
    if stage.name == "tasks":
        return _write_tasks(stage, folder, correct)
    if stage.name == "benchmark":
        return _write_latency(stage, folder)
    (folder / "note.txt").write_text(stage.name)
    return {}


def _write_model(stage: Stage, cell: Cell, folder: Path) -> dict[str, float | int | str]:
    assert cell.config.teacher.pretrain is not None
    config = cell.config.teacher.pretrain.model_config_dict(vocabulary=40, max_positions=128)
    if stage.name in ("prune", "distill"):
        assert cell.widths is not None
        config |= {"hidden_size": cell.widths.hidden, "intermediate_size": cell.widths.intermediate}
    if stage.name == "released":
        assert cell.config.released is not None
        config = cell.config.released.shape
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(config))
    return {"train/loss": 1.0} if stage.name == "distill" else {}


def _write_evaluation(folder: Path, correct: np.ndarray) -> dict[str, float | int | str]:
    samples = len(correct)
    table = {
        "sample": np.arange(samples),
        "prompt": ["2+2"] * samples,
        "reference": ["4"] * samples,
        "prediction": [ANSWERS[bool(right)] for right in correct],
        "correct": correct,
        "response_nll": np.full(samples, 0.5),
        "response_tokens": np.full(samples, 2),
    }
    parquet.write_table(pa.table(table), folder / "samples.parquet")
    share = wilson(int(correct.sum()), samples)
    metrics: dict[str, float | int | str] = {
        "eval/exact_match": share.value,
        "eval/exact_match_low": share.low,
        "eval/exact_match_high": share.high,
        "eval/perplexity": float(np.exp(0.5)),
        "eval/response_nll": 0.5,
        "eval/agreement": 0.75,
        "eval/samples": samples,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return metrics


def _write_tasks(stage: Stage, folder: Path, correct: np.ndarray) -> dict[str, float | int | str]:
    """Of every task all samples as judged, but each task after the first has half of the right ones; the last one's
    metric is no number per sample."""
    names: list[str] = list(stage.config["tasks"])
    rows: list[dict[str, Any]] = []
    results: dict[str, TaskResult] = {}
    for place, name in enumerate(names):
        right = correct & (np.arange(len(correct)) % (1 + min(place, 1)) == 0)
        scored = name != names[-1] or len(names) == 1
        metric, value = ("exact_match", float(right.mean())) if scored else ("perplexity", 3.5)
        own = Scored(metric=metric, filter="none", value=value, stderr=None, higher_is_better=scored)
        results[name] = TaskResult(
            version="1", num_fewshot=0, samples=len(right), truncated=0, is_group=False, metrics=[own]
        )
        for sample, is_right in enumerate(right):
            score = float(is_right) if scored else None
            text = {"prompt": f"{name}?", "target": "4", "response": ANSWERS[bool(is_right)]}
            rows.append({"task": name, "sample": sample, "filter": "none", "score": score, **text})
    parquet.write_table(pa.Table.from_pylist(rows), folder / "samples.parquet")
    metrics = TaskMetrics(tasks=results, named={name: Named(results=[name], tasks=[name]) for name in names})
    (folder / "metrics.json").write_text(metrics.model_dump_json())
    return {f"eval/{name}/{result.metrics[0].metric}": result.metrics[0].value for name, result in results.items()}


def _write_latency(stage: Stage, folder: Path) -> dict[str, float | int | str]:
    systems = ["full", *(["student"] if stage.inputs.keys() & {"student", "released"} else [])]
    systems += ["overfill"] if "student" in stage.inputs else []
    systems += ["exact"] if stage.config["refresh"] == "exact" else []
    rows = [
        {"system": system, "batch": batch, "prompt": 128, "output": 32, "ttft_s": TTFT[system]}
        | {"tpot_s": TPOT[system] * batch, "tokens_per_s": 1 / TPOT[system], "peak_bytes": PEAK[system]}
        | {"tpot_spread_s": [0.9 * TPOT[system] * batch, 1.2 * TPOT[system] * batch]}
        for batch in (1, 8)
        for system in systems
    ]
    (folder / "latency.json").write_text(json.dumps({"rows": rows, "device": "test", "versions": {}}))
    return {}
