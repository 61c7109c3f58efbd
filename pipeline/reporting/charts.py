"""The charts of a report's page: cost against quality, quality over ratio, training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.curves import Curve
from pipeline.reporting.advice import value_of
from pipeline.reporting.groups import Group
from pipeline.reporting.guideline import Guideline
from pipeline.reporting.methods import LOOKS, METHOD_NAMES
from pipeline.reporting.pareto import Cost, cost_of, front, key
from pipeline.reporting.report import Report
from pipeline.reporting.svg import Chart, Line, Mark
from pipeline.reporting.wording import COST_NAMES, describe, percent, quality_name, seconds, size, times

if TYPE_CHECKING:
    from pipeline.store import Store
    from pipeline.sweep import Cell

CURVES = {"validation/nll": "held-out response NLL", "train/loss": "training loss"}
CURVE_POINTS = 150
"""A curve of more points is thinned to about so many."""
WIDE_RANGE = 8.0
"""Costs and perplexities that differ by more than this factor are drawn on a logarithmic axis."""
FIT_POINTS = 24


def cost_chart(report: Report, cost: Cost) -> Chart | None:
    """Quality over a cost with its front, dominated points faded; None where nothing has both."""
    places = report.standings.get(cost, {})
    shown = [group for group in report.groups if key(group) in places]
    if not shown:
        return None
    spent = [places[key(group)].cost for group in shown]
    conditions = dict.fromkeys(group.conditions for group in shown)
    return Chart(
        title=f"{quality_name(shown[0])} over {COST_NAMES[cost]}",
        x_label={"tpot_s": "time per output token", "memory_bytes": "memory while decoding"}[cost],
        y_label=f"{quality_name(shown[0])} (%)",
        marks=tuple(_cost_mark(group, cost, report) for group in shown),
        lines=tuple(_ratio_paths(shown, cost)),
        fronts=tuple(_corners([group for group in shown if group.conditions == one], cost) for one in conditions),
        x_format=seconds if cost == "tpot_s" else size,
        log_x=max(spent) > WIDE_RANGE * min(spent),
        note="Latencies of different conditions have fronts of their own." if len(conditions) > 1 else "",
    )


def _corners(found: Sequence[Group], cost: Cost) -> tuple[tuple[float, float], ...]:
    points = [(cost_of(group, cost) or 0.0, 100 * value_of(group)) for group in found]
    return tuple(points[index] for index in front(points))


def _cost_mark(group: Group, cost: Cost, report: Report) -> Mark:
    place = report.standings[cost][key(group)]
    beaten = "" if place.dominated_by is None else f"\ndominated by {_name(place.dominated_by)}"
    label = f"{group.ratio:g}" if group.is_pruned else group.teacher if group.method == "full" else group.variant
    return _mark(group, place.cost, tip(group) + beaten, label, faded=place.dominated_by is not None)


def _mark(group: Group, x: float, text: str, label: str = "", faded: bool = False) -> Mark:
    share = group.quality
    assert share is not None
    look = LOOKS[group.method]
    return Mark(
        x, 100 * share.value, 100 * share.low, 100 * share.high, group.method, group.teacher, look.marker, text,
        label, faded,
    )  # fmt: skip


def tip(group: Group) -> str:
    """What a pointer over a configuration brings up."""
    lines = [_name(group), f"{quality_name(group)} {percent(group.quality)} %"]
    if group.mean("tpot_s"):
        lines.append(f"TPOT {seconds(group.mean('tpot_s'))}, {times(group.mean('speed_up'))} the full model's speed")
        lines.append(f"TTFT {seconds(group.mean('ttft_s'))}, memory {size(cost_of(group, 'memory_bytes'))}")
    if kept := group.mean("parameters_kept"):
        lines.append(f"{kept:.1%} of the parameters")
    return "\n".join(lines)


def _name(group: Group) -> str:
    return f"{group.teacher}: {describe(group)}"


def _lines(found: Sequence[Group]) -> Iterator[list[Group]]:
    """The groups of one teacher, method and variant that were asked for at several ratios, by rising ratio."""
    lines: dict[tuple[str, str, str], list[Group]] = {}
    for group in found:
        if group.is_pruned:
            lines.setdefault((group.teacher, group.method, group.variant), []).append(group)
    yield from (sorted(line, key=lambda group: group.ratio) for line in lines.values() if len(line) > 1)


def _ratio_paths(found: Sequence[Group], cost: Cost) -> Iterator[Line]:
    for line in _lines(found):
        points = tuple((cost_of(group, cost) or 0.0, 100 * value_of(group)) for group in line)
        yield Line(points, line[0].method, line[0].teacher)


def ratio_charts(report: Report) -> list[Chart]:
    """Quality over the share of parameters removed, per teacher, with the full model's level and fitted guidelines."""
    charts: list[Chart] = []
    for teacher in dict.fromkeys(group.teacher for group in report.groups):
        own = [group for group in report.groups if group.teacher == teacher and group.quality]
        students = [group for group in own if group.is_pruned and group.mean("ratio_effective") is not None]
        if students:
            charts.append(_ratio_chart(teacher, own, students, report.guidelines))
    return charts


def _ratio_chart(
    teacher: str, own: Sequence[Group], students: Sequence[Group], guidelines: Sequence[Guideline]
) -> Chart:
    removed = [100 * (group.mean("ratio_effective") or 0.0) for group in students]
    lines = [
        Line(tuple((_removed(group), 100 * value_of(group)) for group in line), line[0].method, teacher)
        for line in _lines(students)
    ]
    lines += [
        Line(
            ((min(removed), 100 * value_of(full)), (max(removed), 100 * value_of(full))),
            "full",
            teacher,
            "level",
            tip(full),
        )
        for full in own
        if full.method == "full" and len(set(removed)) > 1
    ]
    lines += _fitted(teacher, students, guidelines)
    return Chart(
        title=teacher,
        x_label="parameters removed (%)",
        y_label=f"{quality_name(students[0])} (%)",
        marks=tuple(_mark(group, _removed(group), tip(group)) for group in students),
        lines=tuple(lines),
    )


def _removed(group: Group) -> float:
    return 100 * (group.mean("ratio_effective") or 0.0) + LOOKS[group.method].dodge / 2


def _fitted(teacher: str, students: Sequence[Group], guidelines: Sequence[Guideline]) -> Iterator[Line]:
    """Where a guideline that is of use puts this teacher, within the range that it was fitted on."""
    parameters = next((group.mean("parameters_full") for group in students), None)
    for one in guidelines:
        fit, (low, high) = one.fit("quality"), one.kept
        if fit is None or not fit.is_useful or not parameters or high <= low:
            continue
        kept = [low * (high / low) ** (step / FIT_POINTS) for step in range(FIT_POINTS + 1)]
        points = tuple((100 * (1 - share), 100 * fit.predict(parameters, share)) for share in kept)
        yield Line(points, one.method, teacher, "fit", f"guideline for {METHOD_NAMES[one.method]}")


def training_charts(cells: Sequence[Cell], store: Store) -> list[Chart]:
    """One chart per curve that the students' training has, one line per cell, over corpus tokens."""
    curves = {cell.identity: (cell, curve) for cell in cells if (curve := _curve(cell, store)) is not None}
    charts: list[Chart] = []
    for metric, name in CURVES.items():
        lines = [
            Line(points, cell.method, cell.teacher, "curve", f"{cell.label}\n{name}: {points[-1][1]:.4g} at the end")
            for cell, curve in curves.values()
            if len(points := _points(curve, metric)) > 1
        ]
        if lines:
            values = [value for line in lines for _, value in line.points]
            log_y = min(values) > 0 and max(values) > WIDE_RANGE * min(values)
            charts.append(
                Chart(name, "corpus tokens", "nats per token", lines=tuple(lines), x_format=_tokens, log_y=log_y)
            )
    return charts


def _curve(cell: Cell, store: Store) -> Curve | None:
    stage = cell.stage("distill")
    if stage is None:
        return None
    curve = Curve(Path(store.progress(stage), "metrics.jsonl"))
    curve.update()
    return curve


def _points(curve: Curve, metric: str) -> tuple[tuple[float, float], ...]:
    found = [
        (float(point.tokens), point.metrics[metric])
        for _, point in sorted(curve.points.items())
        if metric in point.metrics and math.isfinite(point.metrics[metric])
    ]
    step = max(1, len(found) // CURVE_POINTS)
    return (*found[:-1:step], *found[-1:])


def _tokens(value: float) -> str:
    return next(
        (f"{value / scale:g} {unit}" for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)) if value >= scale), "0"
    )
