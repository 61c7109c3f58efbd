"""The report for programs: rows as JSON and CSV, conclusions as one JSON object, and the files in the sweep's folder."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.record import write_text
from pipeline.reporting.advice import Advice, BudgetAdvice
from pipeline.reporting.groups import Group
from pipeline.reporting.pareto import COSTS, key
from pipeline.reporting.report import Report
from pipeline.reporting.tables import markdown
from pipeline.statistics import Interval

REPORT_FILE, ROWS_FILE, SUMMARY_FILE = "report.md", "report.json", "summary.json"


def to_json(report: Report) -> str:
    """A list with one object per cell; what is not a finite number is null."""
    return rows_to_json(report.rows)


def rows_to_json(rows: Sequence[Mapping[str, Any]]) -> str:
    """A list of objects; what is not a finite number is null."""
    return _dump([dict(row) for row in rows])


def to_csv(report: Report) -> str:
    """One line per cell; nested values have dotted columns, intervals and spreads `.0` for low and `.1` for high."""
    flat = [dict(_flat(row)) for row in report.rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    stream = io.StringIO()
    # A value that is None in one row and nested in another has a column in each form; what is empty everywhere goes.
    used = [name for name in columns if any(row.get(name) is not None for row in flat)]
    writer = csv.DictWriter(stream, used, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return stream.getvalue()


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) or (isinstance(value, list | tuple) and value):
        entries = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, item in entries:
            yield from _flat(item, f"{path}.{name}" if path else str(name))
    else:
        yield path, value


def summary(report: Report) -> dict[str, Any]:
    """What is concluded from the rows, as plain values: configurations, comparisons, fronts, guidelines, what to ship."""
    return {
        "name": report.name,
        "description": report.description,
        "relative_improvement": None if report.improvement is None else asdict(report.improvement),
        "to_ship": [_advice(teacher, advice) for teacher, advice in report.to_ship.items()],
        "within_budget": None if report.budget is None else _budget(report.budget),
        "configurations": [_configuration(group, report) for group in report.groups],
        "overfill_against_pruned": [
            {**asdict(duel), "within_noise": duel.comparison.within_noise} for duel in report.duels
        ],
        "guidelines": [
            {**asdict(one), "fits": [{**asdict(fit), "is_useful": fit.is_useful} for fit in one.fits]}
            for one in report.guidelines
        ],
    }


def _advice(teacher: str, advice: Advice) -> dict[str, Any]:
    return {
        "teacher": teacher,
        "configuration": _named(advice.best),
        "full_quality": advice.full,
        "keeps_quality": advice.keeps_quality,
        "surely_keeps_quality": advice.surely_keeps,
        "is_faster": advice.is_faster,
        "surely_faster": advice.surely_faster,
        "against_full": None if advice.against_full is None else asdict(advice.against_full),
    }


def _budget(advice: BudgetAdvice) -> dict[str, Any]:
    return {
        "limits": asdict(advice.budget),
        "configuration": None if advice.best is None else _named(advice.best),
        "runner_up": None if advice.runner_up is None else _named(advice.runner_up),
        "lead": None if advice.lead is None else asdict(advice.lead),
        "closest": None if advice.cheapest is None else _named(advice.cheapest),
    }


def _configuration(group: Group, report: Report) -> dict[str, Any]:
    means = ("parameters", "parameters_kept", "perplexity", "ttft_s", "tpot_s", "speed_up", "peak_bytes", "train_s")
    places = {cost: report.standings.get(cost, {}).get(key(group)) for cost in COSTS}
    return {
        **_named(group),
        "seeds": list(group.seeds),
        "exact_match": _interval(group.exact_match),
        "tasks": {task: _interval(score) for task, score in group.tasks.items()},
        "unpaired_tasks": group.unpaired,
        "average": _interval(group.average),
        **{name: group.mean(name) for name in means},
        "dominated_by": {
            cost: None if place is None or place.dominated_by is None else _named(place.dominated_by)
            for cost, place in places.items()
        },
        "on_front": {cost: None if place is None else place.dominated_by is None for cost, place in places.items()},
    }


def _named(group: Group) -> dict[str, Any]:
    return {"teacher": group.teacher, "method": group.method, "ratio": group.ratio, "variant": group.variant}


def _interval(value: Interval | None) -> dict[str, float] | None:
    return None if value is None else asdict(value)


def summary_json(report: Report) -> str:
    """`summary` as JSON; what is not a finite number is null."""
    return _dump(summary(report))


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write report.md, summary.json, report.json and the figures; returns the files.

    Figures are not drawn again when the rows are those of the last time: report.json is written last."""
    from pipeline.reporting.plots import FIGURES, write_plots

    folder.mkdir(parents=True, exist_ok=True)
    text, conclusions, rows = (folder / name for name in (REPORT_FILE, SUMMARY_FILE, ROWS_FILE))
    content = to_json(report) + "\n"
    write_text(text, markdown(report))
    write_text(conclusions, summary_json(report) + "\n")
    figures = [path for name in FIGURES for path in sorted(folder.glob(f"{name}.*"))]
    if not figures or not rows.is_file() or rows.read_text(encoding="utf-8") != content:
        figures = write_plots(report.groups, folder)
        write_text(rows, content)
    return [text, conclusions, rows, *figures]


def _dump(value: Any) -> str:
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
