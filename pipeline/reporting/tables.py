"""The report as text: what to ship first, then the same tables for the terminal (rich) and in Markdown.

Shares carry a 95 % interval; a difference that the paired tests do not hold up is called what it is: within noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.reporting.comparison import Comparison
from pipeline.reporting.groups import Group
from pipeline.reporting.methods import METHOD_NAMES
from pipeline.reporting.pareto import Cost, cost_of, key
from pipeline.reporting.report import Duel, Report
from pipeline.reporting.wording import (
    NOTHING,
    guideline_sentence,
    p_value,
    percent,
    points,
    seconds,
    size,
    span,
    task_name,
    times,
    verdict,
    verdicts,
)

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = ("ratio", "method", "kept", "exact match %", "perplexity", "TTFT", "TPOT", "speed-up", "memory")
DUEL_COLUMNS = ("OverFill / pruned", "difference", "OverFill is", "p")
LEFT = frozenset({"teacher", "method", "variant", "OverFill is", "task"})
"""Columns that read as words."""
DRIFT = 0.1
"""Relative change of the full model's TPOT between benchmarks that is mentioned."""
WIDE = frozenset({"memory"})
"""Columns that a terminal of 80 characters has no room for; what is shipped says its memory in words."""


ON_FRONT = "•"
"""Before a cost: the configuration is on its Pareto front."""


@dataclass(frozen=True)
class Table:
    """A table as text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def without(self, columns: frozenset[str]) -> Table:
        """The table without some columns."""
        kept = [place for place, column in enumerate(self.columns) if column not in columns]
        rows = tuple(tuple(row[place] for place in kept) for row in self.rows)
        return Table(self.title, tuple(self.columns[place] for place in kept), rows)


def tables(report: Report) -> list[Table]:
    """Per teacher one table, and one of its tasks where there are any; OverFill against pruned-only last."""
    found: list[Table] = []
    for teacher in dict.fromkeys(group.teacher for group in report.groups):
        own = [group for group in report.groups if group.teacher == teacher]
        found.append(_teacher_table(teacher, own, report))
        found += [_tasks_table(teacher, own)] if any(group.tasks or group.unpaired for group in own) else []
    return [*found, *([_duel_table(report.duels)] if report.duels else [])]


def markdown(report: Report) -> str:
    """The whole report in Markdown, answers first."""
    parts = [f"# {report.name}", *([report.description.strip()] if report.description.strip() else [])]
    parts += [one.markdown for one in verdicts(report)]
    for table in tables(report):
        parts += [f"## {table.title}", _markdown_table(table)]
    return "\n\n".join([*parts, *notes(report)]) + "\n"


def print_report(report: Report, console: Console) -> None:
    """The whole report on a terminal, answers first."""
    for one in verdicts(report):
        console.print(one.ship, style="bold", markup=False, highlight=False)
        for label, text in one.lines:
            _print_indented(console, label, text)
    if verdicts(report):
        console.print()
    for table in tables(report):
        _print_table(table, console)
    for note in notes(report):
        console.print(note, markup=False, highlight=False)


def _print_indented(console: Console, label: str, text: str) -> None:
    from rich.table import Table as RichTable
    from rich.text import Text

    grid = RichTable.grid(padding=(0, 2))
    grid.add_column(min_width=7, style="dim")
    grid.add_column(overflow="fold")
    grid.add_row(Text(f"  {label}"), Text(text))
    console.print(grid, markup=False, highlight=False)


def _print_table(given: Table, console: Console) -> None:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    table = _narrowed(given if console.width >= 100 else given.without(WIDE))
    gap = (0, 0) if "variant" in given.columns else (0, 1)  # the lines below a method take more room
    shown = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False, padding=gap)
    for column in table.columns:
        header = column.replace(" ", "\n", 1) if column == "exact match %" else column
        folds = column in ("method", "ratio") or "/" in column
        shown.add_column(
            header,
            justify="left" if column in LEFT else "right",
            no_wrap=not folds,
            overflow="fold",
            max_width=14 if column in ("method", "ratio") else None,
        )
    for row in table.rows:
        shown.add_row(*map(Text, row))
    console.print(table.title, style="bold", markup=False, highlight=False)
    console.print(shown)
    console.print()


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


def notes(report: Report) -> list[str]:
    """What the numbers are and where they come from, the guidelines, and how many cells are still missing."""
    fitted = [one for one in report.guidelines if one.fits]
    told = fitted or sorted(report.guidelines, key=lambda one: one.needed - one.configurations)[:1]
    lines = [*(guideline_sentence(one) for one in told), *_drift(report)]
    if any(row["exact_match"] is not None or row["tpot_s"] is not None for row in report.rows):
        lines.append(_legend(report))
    missing = sum(row["state"] != "done" for row in report.rows)
    if missing:
        lines.append(f"{missing} of {len(report.rows)} cells are not done: `overfill status {report.name}` says why.")
    return lines


def _legend(report: Report) -> str:
    measured = dict.fromkeys(
        "batch {batch}, prompt {prompt}, output {output} on {device}".format(**row["benchmark"])
        for row in report.rows
        if row["benchmark"]
    )
    said = "kept: share of the full model's parameters; ± and [ ]: 95 % intervals over samples and seeds."
    if any(fit for one in report.guidelines for fit in one.fits):
        said += " Guideline: P parameters of the full model, k the share kept."
    if measured:
        said += f" TTFT and TPOT are medians at {'; '.join(measured)}; speed-up compares TPOT within one process."
        said += f" {ON_FRONT}: on the Pareto front, nothing else is as accurate and costs less."
    return said


def _drift(report: Report) -> Iterator[str]:
    """How far the speed of the machine itself moved between the benchmarks, where it shows in the full model's TPOT."""
    for teacher in report.to_ship:
        own = [row["full"]["tpot_s"] for row in report.rows if row["teacher"] == teacher and row["full"].get("tpot_s")]
        if min(own) * (1 + DRIFT) < max(own) and len({group.conditions for group in report.groups}) == 1:
            yield (
                f"{teacher}: the full model itself took {seconds(min(own))} to {seconds(max(own))} per token in the "
                "benchmarks, so this machine's speed drifted: between rows trust the speed-up, not the TPOT."
            )


def _teacher_table(teacher: str, found: Sequence[Group], report: Report) -> Table:
    variants, seeds = any(group.variant for group in found), max(len(group.members) for group in found)
    columns = (*COLUMNS[:2], *(("variant",) if variants else ()), *COLUMNS[2:])
    rows = tuple(_result_row(group, variants, report) for group in found)
    title = teacher + (f" (mean over {seeds} seeds)" if seeds > 1 else "")
    return Table(title, columns, rows)


def _result_row(group: Group, variants: bool, report: Report) -> tuple[str, ...]:
    kept, perplexity = group.mean("parameters_kept"), group.mean("perplexity")
    return (
        *_name(group, variants),
        NOTHING if kept is None else f"{kept:.1%}",
        percent(group.exact_match),
        NOTHING if perplexity is None else f"{perplexity:.3f}",
        seconds(group.mean("ttft_s")),
        _marked(seconds(group.mean("tpot_s")), group, "tpot_s", report),
        times(group.mean("speed_up")),
        _marked(size(cost_of(group, "memory_bytes")), group, "memory_bytes", report),
    )


def _name(group: Group, variants: bool) -> tuple[str, ...]:
    ratio = f"{group.ratio:g}" if group.is_pruned else NOTHING
    return (ratio, METHOD_NAMES[group.method], *((group.variant,) if variants else ()))


def _marked(text: str, group: Group, cost: Cost, report: Report) -> str:
    place = report.standings.get(cost, {}).get(key(group))
    return f"{ON_FRONT} {text}" if place is not None and place.dominated_by is None else text


def _tasks_table(teacher: str, found: Sequence[Group]) -> Table:
    tasks = list(dict.fromkeys(task for group in found for task in group.tasks))
    unpaired = list(dict.fromkeys(name for group in found for name in group.unpaired))
    variants, average = any(group.variant for group in found), len(tasks) > 1
    columns = (
        *("ratio", "method"), *(("variant",) if variants else ()),
        *(f"{task} %" for task in tasks), *(("average %",) if average else ()), *unpaired,
    )  # fmt: skip
    rows = tuple(
        (
            *_name(group, variants),
            *(percent(group.tasks.get(task)) for task in tasks),
            *((percent(group.average),) if average else ()),
            *(NOTHING if (value := group.unpaired.get(name)) is None else f"{value:.4g}" for name in unpaired),
        )
        for group in found
    )
    return Table(f"{teacher}: tasks", columns, rows)


def _duel_table(found: Sequence[Duel]) -> Table:
    teachers, variants = len({duel.teacher for duel in found}) > 1, any(duel.variant for duel in found)
    tasks = any(duel.tasks for duel in found)
    columns = (
        *(("teacher",) if teachers else ()), "ratio", *(("variant",) if variants else ()),
        *(("task",) if tasks else ()), *DUEL_COLUMNS,
    )  # fmt: skip
    rows = tuple(
        (
            *((duel.teacher,) if teachers else ()), f"{duel.ratio:g}", *((duel.variant,) if variants else ()),
            *((name,) if tasks else ()), *_comparison_row(result),
        )
        for duel in found
        for name, result in [*((task_name(task), one) for task, one in duel.tasks.items()), ("average", duel.comparison)]
    )  # fmt: skip
    what = "scores" if tasks else "exact match"
    return Table(f"OverFill against pruned only: {what} on the same samples, in points", columns, rows)


def _comparison_row(result: Comparison) -> tuple[str, ...]:
    ratio = NOTHING if result.ratio is None else f"{times(result.ratio.value)} {span(result.ratio, 2)}"
    return ratio, points(result.difference), verdict(result), p_value(result.p_value)


def _markdown_table(table: Table) -> str:
    marks = [":---" if column in LEFT else "---:" for column in table.columns]
    lines = [table.columns, marks, *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
