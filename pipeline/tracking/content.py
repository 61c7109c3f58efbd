"""What MLflow is told about a sweep, as plain values: nothing here talks to a server.

Parameters are few and numeric, so that the parallel-coordinates chart is of use (mlflow#2273); the whole configuration
is an artifact. Curves of the student's training keep their names; those of stages that cells share (the teacher's
training) go to the parent run under `<stage>/<label>/…`, once. Final metrics have the same names in every cell.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipeline.curves import Curve

if TYPE_CHECKING:
    from pipeline.reporting.rows import Row
    from pipeline.sweep import Cell
    from pipeline.watch import CellView, Snapshot, StageView

RunStatus = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
CELL_STAGE = "distill"
"""The stage whose curve is the cell's own."""
TOKENS = "train/tokens"
"""Corpus tokens read so far, at every logged step."""
NOTED = (
    ("eval/exact_match", "exact match", 100.0, "%"),
    ("eval/perplexity", "perplexity", 1.0, ""),
    ("latency/ttft_s", "time to first token", 1000.0, "ms"),
    ("latency/tpot_s", "time per output token", 1000.0, "ms"),
    ("latency/speed_up", "speed-up over the full model", 1.0, "x"),
    ("shape/parameters_kept", "parameters kept", 100.0, "%"),
)
"""Results in a cell's description: metric, words, factor, unit."""
SUPERSEDED_TAG = "superseded"
"""Metrics of a run whose newest values are only in its description and in `result.json`."""
TEXT_LIMIT = 7500
"""MLflow cuts tags at 8,000 characters."""
LABEL_LIMIT = 120
"""Characters of a stage's label in the names of metrics, of which MLflow takes 250 each."""


@dataclass(frozen=True)
class Value:
    """One metric at one step; `time` in seconds since the epoch."""

    key: str
    value: float
    step: int
    time: float


def wanted_status(view: CellView) -> RunStatus | None:
    """Where the cell's run should be; None as long as nothing of the cell's own has begun.

    A cell that is between two stages, or waits for a stage that others share, keeps the status it has; one that cannot
    go on because a shared stage failed has failed too."""
    if view.state in ("done", "failed"):
        return "FINISHED" if view.state == "done" else "FAILED"
    states = {stage.state for stage in view.own}
    if "running" in states:
        return "RUNNING"
    return "KILLED" if states & {"stopped", "interrupted"} else None


def parent_status(snapshot: Snapshot) -> RunStatus:
    """How a sweep ended that nobody works on any more."""
    states = [view.state for view in snapshot.cells]
    if all(state == "done" for state in states):
        return "FINISHED"
    return "FAILED" if "failed" in states else "KILLED"


def start_time(view: CellView) -> float | None:
    """When the first of the cell's own stages began, in seconds since the epoch; None where the store does not know."""
    return min((stage.started for stage in view.own if stage.started is not None), default=None)


def end_time(view: CellView) -> float | None:
    """When the cell came to where it is, in seconds since the epoch; None where the store does not know."""
    finished = [stage.finished for stage in view.stages if stage.finished is not None]
    if view.state == "done":
        return max(finished, default=None)
    return None if view.current is None or view.current.state == "running" else view.current.since


def parameters(cell: Cell) -> dict[str, float | int | str]:
    """The cell's parameters: all known before it runs, so that they are there from the first moment."""
    distill = cell.config.distill
    values: dict[str, float | int | str | None] = {
        "method": cell.method,
        "ratio": cell.ratio,
        "hidden": cell.decodes.hidden,
        "intermediate": cell.decodes.intermediate,
        "teacher_hidden": cell.shape.hidden,
        "teacher_intermediate": cell.shape.intermediate,
        "layers": cell.decodes.layers,
        "seed": cell.seed,
    }
    if cell.stage(CELL_STAGE) is not None:
        loss = distill.effective_loss
        values |= {
            "learning_rate": distill.effective_learning_rate,
            "tokens": distill.tokens,
            "batch_tokens": distill.batch_tokens,
            "loss_kl": loss.kl,
            "loss_kv": loss.kv,
            "loss_ce": loss.ce,
        }
    return {name: value for name, value in values.items() if value is not None}


def tags(view: CellView, commit: str | None) -> dict[str, str]:
    """What runs are searched by."""
    cell, failure = view.cell, (view.failure or "")[:TEXT_LIMIT]
    found = {
        "teacher": cell.teacher,
        "method": cell.method,
        "ratio": f"{cell.ratio:g}",
        "seed": "" if cell.seed is None else str(cell.seed),
        "identity": cell.identity,
        "state": view.state,
        "failure": failure,
        "mlflow.note.content": _note(view, failure),
        "mlflow.source.name": "overfill",
        "mlflow.source.type": "LOCAL",
    }
    if commit:
        found |= {"commit": commit, "mlflow.source.git.commit": commit.rstrip("+")}
    return found


def _note(view: CellView, body: str) -> str:
    folders = "\n".join(f"- {stage.name}: `{stage.folder}`" for stage in view.stages if stage.state != "missing")
    return f"**{view.cell.label}** ({view.state})\n\n{body}\n\n{folders}"[:TEXT_LIMIT]


def superseded(results: Sequence[Value], logged: Mapping[str, int], values: Mapping[str, float]) -> list[str]:
    """Metrics of which the run has another value (at step `logged`): their artifact was built anew since.

    They are not logged again. Another value for the same step is not what a history is, and at a next one the UI would
    draw curves instead of bars; so the run is marked."""
    behind = (value for value in results if value.step <= logged.get(value.key, -1))
    return sorted(v.key for v in behind if not math.isclose(v.value, values.get(v.key, v.value), rel_tol=1e-9))


def result_note(view: CellView, results: Sequence[Value], behind: Sequence[str]) -> str:
    """A finished cell's description: its results as a table, which metrics of the run are `behind` them, then where its
    artifacts lie."""
    found = {value.key: value.value for value in results}
    lines = [f"| {words} | {found[key] * scale:.4g} {unit} |" for key, words, scale, unit in NOTED if key in found]
    table = "\n".join(["| | |", "| :--- | ---: |", *lines])
    why = "\n\nBuilt anew since they were logged; the run's metrics have the earlier values: "
    return _note(view, table + why + ", ".join(behind) if behind else table)


def report_note(run: str, report: str) -> str:
    """The sweep's description: the report's tables, and its plot as the server has it among the run's artifacts."""
    plot = f"\n\n![Accuracy over latency](get-artifact?path=report%2Fpareto.png&run_uuid={run})\n"
    return report[: TEXT_LIMIT - len(plot)] + plot


def metric_name(text: str) -> str:
    """A name that MLflow takes, and the same text where it does: a teacher's folder may have any name."""
    parts = [re.sub(r"[^\w. :-]", "_", part) for part in text.split("/")]
    return "/".join("_" if part.strip(".") == "" else part for part in parts)


def curve_values(curve: Curve, logged: Mapping[str, int], prefix: str = "") -> list[Value]:
    """The values of a curve behind what is `logged` (metric -> highest step that the run has), by rising step.

    The tokens read so far are a metric of their own (`TOKENS`), so that a chart can have them as its axis."""
    return [
        Value(prefix + name, value, point.step, point.time)
        for _, point in sorted(curve.points.items())
        for name, value in [*point.metrics.items(), *([(TOKENS, float(point.tokens))] if point.tokens else [])]
        if point.step > logged.get(prefix + name, -1)
    ]


def shared_prefix(stage: StageView, snapshot: Snapshot) -> str:
    """`teacher/small/` for the curves of a shared stage; with its identity where two have the same label."""
    label = _plain_label(stage)
    twins = [other for other in snapshot.stages.values() if (other.name, _plain_label(other)) == (stage.name, label)]
    return f"{stage.name}/{label}/" if len(twins) == 1 else f"{stage.name}/{label}-{stage.identity}/"


def _plain_label(stage: StageView) -> str:
    return metric_name(stage.label[:LABEL_LIMIT])


def final_values(view: CellView, row: Row) -> list[Value]:
    """The cell's results: records' metrics and its own latency. At step 0: MLflow draws bars of those, else curves."""
    end = max((stage.finished for stage in view.stages if stage.finished is not None), default=0.0)
    found: dict[str, Any] = {
        "eval/exact_match": row["exact_match"],
        "eval/perplexity": row["perplexity"],
        "eval/response_nll": row["response_nll"],
        "eval/agreement": row["agreement"],
        "eval/samples": row["samples"],
        "latency/ttft_s": row["ttft_s"],
        "latency/tpot_s": row["tpot_s"],
        "latency/tokens_per_s": row["tokens_per_s"],
        "latency/peak_bytes": row["peak_bytes"],
        "latency/speed_up": row["speed_up"],
        "shape/parameters": row["parameters"],
        "shape/parameters_kept": row["parameters_kept"],
        "shape/ratio_effective": row["ratio_effective"],
        "cost/train_tokens": row["train_tokens"],
    }
    for name in ("ttft", "tpot"):  # in milliseconds too, for the UI shows two decimals
        if _number(seconds := found[f"latency/{name}_s"]):
            found[f"latency/{name}_ms"] = 1000.0 * seconds
    if row["exact_match_interval"] is not None:
        found["eval/exact_match_low"], found["eval/exact_match_high"] = row["exact_match_interval"]
    for stage in view.stages:
        if stage.name in (CELL_STAGE, "evaluate"):
            found[f"cost/{stage.name}_s"] = stage.seconds
    return [Value(key, float(value), 0, end) for key, value in found.items() if _number(value)]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
