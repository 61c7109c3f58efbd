"""What a sweep found: rows, configurations, comparisons between them, and what to ship. Everything is read from the store.

OverFill against pruned-only is a paired question: the same samples, seeds, ratio and full model, per task and over all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.reporting.advice import Advice, BudgetAdvice, to_ship, within_budget
from pipeline.reporting.comparison import Comparison, Improvement, compare_over_tasks, relative_improvement
from pipeline.reporting.groups import Group, groups, paired
from pipeline.reporting.guideline import Guideline, guidelines
from pipeline.reporting.pareto import COSTS, Budget, Cost, Standings, key, standings
from pipeline.reporting.rows import Row, rows
from pipeline.reporting.scores import read_scores

if TYPE_CHECKING:
    from pipeline.store import Store
    from pipeline.sweep import Cell


@dataclass(frozen=True)
class Duel:
    """OverFill against pruned-only under otherwise equal conditions."""

    teacher: str
    ratio: float
    variant: str
    comparison: Comparison
    """Over the tasks that make the quality."""
    tasks: dict[str, Comparison] = field(default_factory=dict)
    """Per task, where there are several."""


@dataclass(frozen=True)
class Report:
    """Everything that is said about a sweep."""

    name: str
    description: str
    rows: list[Row]
    groups: list[Group]
    duels: list[Duel]
    to_ship: dict[str, Advice] = field(default_factory=dict)
    """Per teacher."""
    standings: dict[Cost, Standings] = field(default_factory=dict)
    """Where every group stands on the front of each cost."""
    improvement: Improvement | None = None
    """OverFill over pruned-only, relative, averaged over tasks and configurations."""
    guidelines: list[Guideline] = field(default_factory=list)
    budget: BudgetAdvice | None = None
    """What to ship within the limits that were asked for."""


def make_report(
    name: str, description: str, cells: Sequence[Cell], store: Store, budget: Budget | None = None
) -> Report:
    """Read the store and compare the cells. Raises UserError for a result in the store that cannot be read."""
    found = groups(rows(cells, store), read_scores(cells, store))
    rivals = _rivals(found)
    fronts: dict[Cost, Standings] = {cost: standings(found, cost) for cost in COSTS}
    table = [_placed(member, group, fronts) for group in found for member in group.members]
    order = {cell.identity: place for place, cell in enumerate(cells)}
    return Report(
        name,
        description,
        sorted(table, key=lambda row: order[row["identity"]]),
        found,
        [_duel(first, second) for first, second in rivals],
        to_ship(found),
        fronts,
        relative_improvement([paired(first, second) for first, second in rivals]),
        guidelines(found),
        within_budget(found, budget) if budget else None,
    )


def _rivals(found: Sequence[Group]) -> list[tuple[Group, Group]]:
    """OverFill and pruned-only of every (teacher, ratio, variant) where both are evaluated on a common task and seed."""
    pruned = {(group.teacher, group.ratio, group.variant): group for group in found if group.method == "pruned"}
    pairs = [
        (group, rival)
        for group in found
        if group.method == "overfill" and (rival := pruned.get((group.teacher, group.ratio, group.variant))) is not None
    ]
    return [(first, second) for first, second in pairs if paired(first, second)]


def _duel(first: Group, second: Group) -> Duel:
    tasks = paired(first, second)
    each = {task: compare_over_tasks([pair]) for task, pair in tasks.items()} if len(tasks) > 1 else {}
    return Duel(first.teacher, first.ratio, first.variant, compare_over_tasks(list(tasks.values())), each)


def _placed(member: Row, group: Group, fronts: dict[Cost, Standings]) -> Row:
    """A row with the places of its configuration."""
    places = {cost: fronts[cost].get(key(group)) for cost in COSTS}
    on_front = {cost: None if place is None else place.dominated_by is None for cost, place in places.items()}
    return member | {"on_front": on_front}
