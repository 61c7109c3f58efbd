"""The report as text: the same tables for the terminal (rich) and in Markdown, and one sentence on what to ship.

Rows of numbers come from `pipeline.report`; here they only get their form. Percentages of exact match carry a 95 %
interval; a difference that the paired tests do not hold up is called what it is: within noise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.record import write_text
from pipeline.report import KEEP_QUALITY, Advice, Duel, Group, Report
from pipeline.statistics import Comparison, Interval

if TYPE_CHECKING:
    from rich.console import Console

METHOD_NAMES = {"full": "full model", "overfill": "OverFill", "pruned": "pruned only", "scratch": "from scratch"}
REPORT_FILE, ROWS_FILE = "report.md", "report.json"
NOTHING = "–"
COLUMNS = ("ratio", "method", "kept", "exact match %", "perplexity", "TTFT", "TPOT", "speed-up")
DUEL_COLUMNS = ("OverFill / pruned", "difference", "OverFill is", "p")
LEFT = frozenset({"teacher", "method", "variant", "OverFill is"})
"""Columns that read as words."""


@dataclass(frozen=True)
class Table:
    """A table as text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(report: Report) -> list[Table]:
    """One table per teacher, and the comparison of OverFill with pruned-only when there is one."""
    teachers = dict.fromkeys(group.teacher for group in report.groups)
    found = [_teacher_table(teacher, [g for g in report.groups if g.teacher == teacher]) for teacher in teachers]
    return [*found, _duel_table(report.duels)] if report.duels else found


def markdown(report: Report) -> str:
    """The whole report in Markdown."""
    parts = [f"# {report.name}", *([report.description.strip()] if report.description.strip() else [])]
    for table in tables(report):
        parts += [f"## {table.title}", _markdown_table(table)]
    return "\n\n".join([*parts, *sentences(report)]) + "\n"


def print_report(report: Report, console: Console) -> None:
    """The whole report on a terminal."""
    from rich import box
    from rich.table import Table as RichTable

    for given in tables(report):
        table = _narrowed(given)
        gap = (0, 1) if table is given else (0, 0)  # the lines below a method take more room
        shown = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False, padding=gap)
        for column in table.columns:
            header = column.replace(" ", "\n", 1) if column == "exact match %" else column
            folds = column in ("method", "ratio")
            shown.add_column(
                header,
                justify="left" if column in LEFT else "right",
                no_wrap=not folds,
                overflow="fold",
                max_width=14 if folds else None,
            )
        for row in table.rows:
            shown.add_row(*row)
        console.print(table.title, style="bold", markup=False, highlight=False)
        console.print(shown)
        console.print()
    for sentence in sentences(report):
        console.print(sentence, markup=False, highlight=False)


def _narrowed(table: Table) -> Table:
    """The variant on lines below the method (or the ratio, where no method stands), for terminals of 80 columns."""
    if "variant" not in table.columns:
        return table
    variant = table.columns.index("variant")
    below = table.columns.index("method" if "method" in table.columns else "ratio")

    def narrowed(row: tuple[str, ...]) -> tuple[str, ...]:
        parts = [row[below], *(row[variant].split() if row is not table.columns else [])]
        return tuple("\n".join(parts) if i == below else cell for i, cell in enumerate(row) if i != variant)

    return Table(table.title, narrowed(table.columns), tuple(narrowed(row) for row in table.rows))


def to_json(report: Report) -> str:
    """A list with one object per cell; what is not a finite number is null."""
    return rows_to_json(report.rows)


def rows_to_json(rows: Sequence[Mapping[str, Any]]) -> str:
    """A list of objects; what is not a finite number is null."""
    return json.dumps([_finite(dict(row)) for row in rows], indent=2, allow_nan=False)


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write report.md, report.json and the figures; returns the files.

    Figures are not drawn again when the rows are those of the last time: report.json is written last."""
    from pipeline.plots import FIGURES, write_plots

    folder.mkdir(parents=True, exist_ok=True)
    text, rows = folder / REPORT_FILE, folder / ROWS_FILE
    content = to_json(report) + "\n"
    write_text(text, markdown(report))
    figures = [path for name in FIGURES for path in sorted(folder.glob(f"{name}.*"))]
    if not figures or not rows.is_file() or rows.read_text(encoding="utf-8") != content:
        figures = write_plots(report.groups, folder)
        write_text(rows, content)
    return [text, rows, *figures]


def sentences(report: Report) -> list[str]:
    """What to ship per teacher, and how many cells are still missing."""
    lines = [_advise(teacher, advice) for teacher, advice in report.to_ship.items()]
    lines += _conditions(report)
    missing = sum(row["state"] != "done" for row in report.rows)
    if missing:
        lines.append(f"{missing} of {len(report.rows)} cells are not done: `overfill status {report.name}` says why.")
    return lines


def _conditions(report: Report) -> list[str]:
    """What the numbers are: intervals, and where latency was measured."""
    if all(row["exact_match"] is None and row["tpot_s"] is None for row in report.rows):
        return []
    measured = dict.fromkeys(
        "batch {batch}, prompt {prompt}, output {output} on {device}".format(**row["benchmark"])
        for row in report.rows
        if row["benchmark"]
    )
    latency = f" TTFT and TPOT are medians at {'; '.join(measured)}; speed-up compares TPOT within one process."
    return [f"kept: share of the full model's parameters; ± and [ ]: 95 % intervals.{latency if measured else ''}"]


def _advise(teacher: str, advice: Advice) -> str:
    best, share = advice.best, f"{KEEP_QUALITY:.0%} of the full model's exact match"
    what = f"{METHOD_NAMES[best.method]} at ratio {best.ratio:g}" + (f" ({best.variant})" if best.variant else "")
    numbers = f"exact match {_percent(best.exact_match)} % against {100 * advice.full:.1f} %, TPOT "
    numbers += f"{_seconds(best.mean('tpot_s'))}, {_times(best.mean('speed_up'))} the full model's speed"
    if not advice.is_faster:
        return f"{teacher}: ship the full model; no student decodes faster on this device (best: {what}, {numbers})."
    if advice.keeps_quality:
        return f"{teacher}: ship {what}, the fastest that keeps {share}: {numbers}."
    return f"{teacher}: nothing faster keeps {share}; the best is {what}: {numbers}."


def _teacher_table(teacher: str, found: Sequence[Group]) -> Table:
    variants, seeds = any(group.variant for group in found), max(len(group.members) for group in found)
    columns = (*COLUMNS[:2], *(("variant",) if variants else ()), *COLUMNS[2:])
    rows = [_result_row(group, variants) for group in found]
    title = teacher + (f" (mean over {seeds} seeds)" if seeds > 1 else "")
    return Table(title, columns, tuple(rows))


def _result_row(group: Group, variants: bool) -> tuple[str, ...]:
    kept, perplexity = group.mean("parameters_kept"), group.mean("perplexity")
    return (
        NOTHING if group.method == "full" else f"{group.ratio:g}",
        METHOD_NAMES[group.method],
        *((group.variant,) if variants else ()),
        NOTHING if kept is None else f"{kept:.1%}",
        _percent(group.exact_match),
        NOTHING if perplexity is None else f"{perplexity:.3f}",
        _seconds(group.mean("ttft_s")),
        _seconds(group.mean("tpot_s")),
        _times(group.mean("speed_up")),
    )


def _duel_table(found: Sequence[Duel]) -> Table:
    teachers, variants = len({duel.teacher for duel in found}) > 1, any(duel.variant for duel in found)
    columns = (*(("teacher",) if teachers else ()), "ratio", *(("variant",) if variants else ()), *DUEL_COLUMNS)
    rows = tuple(_duel_row(duel, teachers, variants) for duel in found)
    return Table("OverFill against pruned only: exact match on the same samples, in points", columns, rows)


def _duel_row(duel: Duel, teachers: bool, variants: bool) -> tuple[str, ...]:
    result = duel.comparison
    return (
        *((duel.teacher,) if teachers else ()),
        f"{duel.ratio:g}",
        *((duel.variant,) if variants else ()),
        NOTHING if result.ratio is None else f"{_times(result.ratio.value)} {_range(result.ratio, 2)}",
        f"{100 * result.difference.value:+.1f} {_range(result.difference, 1, 100)}",
        verdict(result),
        _p_value(result.p_value),
    )


def verdict(result: Comparison) -> str:
    """`better`, `worse`, or `within noise` (see `Comparison.within_noise`)."""
    return "within noise" if result.within_noise else "better" if result.difference.low > 0 else "worse"


def _p_value(value: float | None) -> str:
    """McNemar's; it does not hold over several seeds."""
    return NOTHING if value is None else "< 0.001" if value < 0.001 else f"{value:.2g}"


def _range(interval: Interval, digits: int, scale: float = 1.0) -> str:
    return f"[{scale * interval.low:.{digits}f}, {scale * interval.high:.{digits}f}]"


def _percent(share: Interval | None) -> str:
    return NOTHING if share is None else f"{100 * share.value:.1f} ± {100 * share.half_width:.1f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms" if value >= 0.01 else f"{1000 * value:.2f} ms"


def _times(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}x"


def _markdown_table(table: Table) -> str:
    marks = [":---" if column in LEFT else "---:" for column in table.columns]
    lines = [table.columns, marks, *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
