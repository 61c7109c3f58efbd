"""`overfill plan`: what each stage would do and why, and what it costs. Printed from shapes and the store; no torch."""

from __future__ import annotations

from collections import Counter

from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.config import StageResources
from pipeline.cost import Cost, cell_costs
from pipeline.experiment import Experiment, planned
from pipeline.resume import Action
from pipeline.store import Store

STYLES = {"reuse": "green", "resume": "cyan", "run": "bold", "wait": "yellow", "refuse": "red"}
NOTHING = "–"


def print_plan(experiment: Experiment, store: Store, console: Console) -> None:
    """Print the cells with their students' shapes, then every needed stage with its reason and cost."""
    console.print(_cell_table(experiment))
    actions = planned(experiment, store)
    console.print(_stage_table(experiment, actions))
    counts = Counter(action.kind for action in actions)
    total = ", ".join(f"{counts[kind]} {kind}" for kind in STYLES if counts[kind])
    console.print(f"{len(experiment.cells)} cells, {len(actions)} stages: {total}. Store: {store.root}", highlight=False)
    console.print("Memory is of one worker; operations of training are an upper bound (every token a response token).")


def _cell_table(experiment: Experiment) -> Table:
    table = _table("Cells", "cell", "teacher", "student", "kept", "hidden", "intermediate", "requested", "effective")
    for cell in experiment.cells:
        full = cell.shape.parameters()
        if cell.widths is None:
            table.add_row(cell.label, count(full), *[NOTHING] * 6)
            continue
        widths = cell.widths
        student = cell.shape.pruned(widths.hidden, widths.intermediate).parameters()
        table.add_row(
            cell.label,
            count(full),
            count(student),
            f"{student / full:.1%}",
            f"{widths.hidden} of {cell.shape.hidden}",
            f"{widths.intermediate} of {cell.shape.intermediate}",
            f"{widths.hidden_requested:.4g} / {widths.intermediate_requested:.4g}",
            f"{widths.hidden_effective:.4g} / {widths.intermediate_effective:.4g}",
        )
    return table


def _stage_table(experiment: Experiment, actions: list[Action]) -> Table:
    costs: dict[str, tuple[Cost, StageResources]] = {}
    for cell in experiment.cells:
        found = cell_costs(cell)
        for stage in cell.stages:
            if stage.name in found:
                costs[stage.identity] = found[stage.name], getattr(cell.config.resources, stage.name)
    table = _table("Stages", "stage", "action", "workers", "memory", "FLOPs", "why")
    for action in actions:
        cost, resources = costs.get(action.stage.identity, (Cost(None, None), None))
        table.add_row(
            str(action.stage),
            f"[{STYLES[action.kind]}]{action.kind}[/]",
            _workers(resources),
            NOTHING if cost.memory is None else size(cost.memory),
            NOTHING if cost.flops is None else f"{cost.flops:.2g}",
            action.reason,
        )
    return table


def _workers(resources: StageResources | None) -> str:
    if resources is None:
        return NOTHING
    gpus = f" x {resources.gpus_per_worker:g} GPU" if resources.gpus_per_worker else ""
    zero = f", ZeRO-{resources.zero_stage}" if resources.zero_stage else ""
    return f"{resources.workers}{gpus}{zero}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        words = column in ("cell", "stage", "why", "action")
        table.add_column(column, justify="left" if words else "right", overflow="fold", no_wrap=column in ("cell", "action"))
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
