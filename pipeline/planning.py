"""`overfill plan`: what each stage would do and why, and what it costs. Printed from shapes and the store; no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from overfill.shapes import ModelShape, PrunedWidths
from pipeline.config import StageResources
from pipeline.cost import Cost, cell_costs
from pipeline.experiment import Experiment, planned
from pipeline.graph import ratio_label
from pipeline.resume import Action
from pipeline.store import Store

STYLES = {"reuse": "green", "resume": "cyan", "run": "bold", "wait": "yellow", "refuse": "red"}
NOTHING = "–"
MOST_ROWS, ROWS_EACH = 400, 10
"""Stages that a plan lists one by one; of more it lists a few of each kind."""
WRAPPED = ("of", "why", "methods")
"""Columns that give way on a narrow terminal."""


def print_plan(experiment: Experiment, store: Store, console: Console) -> None:
    """Print the students' shapes, then what each needed stage would do, why, and what it costs."""
    console.print(_student_table(experiment))
    actions = planned(experiment, store)
    console.print(_stage_table(experiment, actions))
    for line in _worker_lines(experiment, {action.stage.name for action in actions}):
        console.print(line, highlight=False)
    counts = Counter(action.kind for action in actions)
    total = ", ".join(f"{counts[kind]} {kind}" for kind in STYLES if counts[kind])
    console.print(f"{len(experiment.cells)} cells, {len(actions)} stages: {total}", highlight=False)
    console.print(f"store: {store.location}", highlight=False, soft_wrap=True)


def _student_table(experiment: Experiment) -> Table:
    table = _table("Students", "teacher", "ratio", "parameters", "kept", "hidden", "intermediate", "methods")
    students: dict[tuple[str, ModelShape, ModelShape, PrunedWidths | None], list[str]] = {}
    for cell in experiment.cells:
        methods = students.setdefault((cell.teacher, cell.shape, cell.decodes, cell.widths), [])
        methods += [] if cell.method in methods else [cell.method]
    for (teacher, full, decodes, widths), methods in students.items():
        table.add_row(Text(teacher), *_student_row(full, decodes, widths), ", ".join(methods))
    return table


def _student_row(full: ModelShape, decodes: ModelShape, widths: PrunedWidths | None) -> list[str]:
    def removed(share: float | None) -> str:
        return "" if share is None else f" (-{share:.1%})"

    return [
        NOTHING if widths is None else ratio_label(widths),
        count(decodes.parameters()),
        "100%" if decodes == full else f"{decodes.parameters() / full.parameters():.1%}",
        f"{decodes.hidden}{removed(widths and widths.hidden_effective)}",
        f"{decodes.intermediate}{removed(widths and widths.intermediate_effective)}",
    ]


def _stage_table(experiment: Experiment, actions: list[Action]) -> Table:
    costs: dict[str, Cost] = {}
    for cell in experiment.cells:
        found = cell_costs(cell)
        costs |= {stage.identity: found[stage.name] for stage in cell.stages if stage.name in found}
    table = _table("Stages", "stage", "of", "action", "memory", "FLOPs", "why")
    for action, more in _shown(actions):
        if action is None:
            table.add_row(NOTHING, Text(more), "", "", "", "")
            continue
        cost = costs.get(action.stage.identity, Cost(None, None))
        table.add_row(
            action.stage.name,
            Text(action.stage.label),
            f"[{STYLES[action.kind]}]{action.kind}[/]",
            NOTHING if cost.memory is None else size(cost.memory),
            NOTHING if cost.flops is None else f"{cost.flops:.2g}",
            Text(action.reason),
        )
    return table


def _shown(actions: list[Action]) -> Iterator[tuple[Action | None, str]]:
    """The actions, or of a large plan the first of each kind of stage and action, and how many more there are."""
    seen: Counter[tuple[str, str]] = Counter()
    for action in actions:
        seen[action.stage.name, action.kind] += 1
        if len(actions) <= MOST_ROWS or seen[action.stage.name, action.kind] <= ROWS_EACH:
            yield action, ""
    if len(actions) > MOST_ROWS:
        for (name, kind), count in seen.items():
            if count > ROWS_EACH:
                yield None, f"and {count - ROWS_EACH:,} more {name}: {kind}"


def _worker_lines(experiment: Experiment, names: set[str]) -> list[str]:
    lines = ["memory is of one worker; FLOPs of training are an upper bound, as if every token were a response token"]
    for name in type(experiment.config.resources).model_fields:
        stage = getattr(experiment.config.resources, name)
        if name in names and isinstance(stage, StageResources) and (stage.workers > 1 or stage.gpus_per_worker):
            zero = f", ZeRO-{stage.zero_stage}" if stage.zero_stage else ""
            lines.append(
                f"{name}: {stage.workers} workers x {stage.gpus_per_worker:g} GPU, {stage.cpus_per_worker:g} CPU{zero}"
            )
    return lines


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        words = column in ("stage", "of", "action", "why", "teacher", "methods")
        table.add_column(column, justify="left" if words else "right", no_wrap=column not in WRAPPED, overflow="fold")
    return table


def count(number: float) -> str:
    """`1.27 B`, `812 k`: a number of parameters."""
    for limit, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """Bytes in binary units: `3.2 GiB`."""
    for limit, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number / 1024:.3g} KiB"
