"""What to ship: the configuration, and the comparisons that say how sure the choice is.

Without a budget: per full model the fastest student that keeps its quality. With one: of everything that fits the most
accurate, full models included, for a small full model is a choice too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.reporting.comparison import Comparison, compare_over_tasks
from pipeline.reporting.groups import Group, paired
from pipeline.reporting.pareto import Budget, cost_of

KEEP_QUALITY = 0.95
"""A configuration is worth shipping when it keeps this share of the full model's quality."""


@dataclass(frozen=True)
class Advice:
    """Which student to ship for one full model."""

    best: Group
    full_group: Group
    keeps_quality: bool
    """Whether `best` keeps `KEEP_QUALITY` of the full model's quality."""
    is_faster: bool
    """Whether `best` decodes faster than the full model; where it does not, no student does."""
    against_full: Comparison | None
    """`best` against the full model on the same samples."""

    @property
    def full(self) -> float:
        """Quality of the full model."""
        return value_of(self.full_group)

    @property
    def surely_keeps(self) -> bool:
        """Whether the whole interval of what it keeps lies above `KEEP_QUALITY`."""
        share = None if self.against_full is None else self.against_full.share
        return share is not None and share.low >= KEEP_QUALITY

    @property
    def surely_faster(self) -> bool | None:
        """Whether even its slowest repetitions were faster than the full model's fastest; None where they are unknown."""
        pairs = [
            (member["tpot_spread_s"][1], member["full"]["tpot_spread_s"][0])
            for member in self.best.members
            if member.get("tpot_spread_s") and member["full"].get("tpot_spread_s")
        ]
        return all(own < full for own, full in pairs) if pairs else None


def to_ship(found: Sequence[Group]) -> dict[str, Advice]:
    """Per teacher the fastest of the students that keep the full model's quality, else the most accurate one.

    Only students that decode faster than the full model are considered, if there are any. Teachers are left out that
    have no right answer themselves, and those without a measured student."""
    chosen: dict[str, Advice] = {}
    for teacher in dict.fromkeys(group.teacher for group in found):
        own = [group for group in found if group.teacher == teacher]
        full = next((group for group in own if group.method == "full" and group.quality), None)
        students = [group for group in own if group.method != "full" and group.quality and group.mean("speed_up")]
        if full is None or not value_of(full) or not students:
            continue
        faster = [group for group in students if _speed(group) > 1.0]
        keeping = [group for group in faster or students if value_of(group) >= KEEP_QUALITY * value_of(full)]
        best = max(keeping, key=_speed) if keeping else max(faster or students, key=value_of)
        chosen[teacher] = Advice(best, full, bool(keeping), bool(faster), against(best, full))
    return chosen


@dataclass(frozen=True)
class BudgetAdvice:
    """What to ship within a budget."""

    budget: Budget
    best: Group | None
    """The most accurate that fits; None when nothing does."""
    runner_up: Group | None
    """The most accurate of the others that fit."""
    lead: Comparison | None
    """`best` against `runner_up`, where they answered the same samples."""
    cheapest: Group | None
    """Where nothing fits: what comes closest to the limits."""


def within_budget(found: Sequence[Group], budget: Budget) -> BudgetAdvice:
    """The most accurate configuration that fits; of equally accurate ones the faster."""
    measured = [group for group in found if group.quality and all(cost_of(group, cost) for cost in budget.limits)]
    fitting = sorted((group for group in measured if budget.fits(group)), key=_accuracy_then_speed, reverse=True)
    if not fitting:
        return BudgetAdvice(budget, None, None, None, min(measured, key=lambda one: _excess(one, budget), default=None))
    best, second = fitting[0], next(iter(fitting[1:]), None)
    return BudgetAdvice(budget, best, second, None if second is None else against(best, second), None)


def against(first: Group, second: Group) -> Comparison | None:
    """Two groups on the samples of their quality that both answered; None without such."""
    pairs = list(paired(first, second).values())
    return compare_over_tasks(pairs) if pairs else None


def value_of(group: Group) -> float:
    """Quality of a group, 0 where it has none."""
    return 0.0 if group.quality is None else group.quality.value


def _speed(group: Group) -> float:
    return group.mean("speed_up") or 0.0


def _accuracy_then_speed(group: Group) -> tuple[float, float]:
    return value_of(group), -(cost_of(group, "tpot_s") or 0.0)


def _excess(group: Group, budget: Budget) -> float:
    """By which factor the group misses the limit that it misses most."""
    return max((cost_of(group, cost) or 0.0) / limit for cost, limit in budget.limits.items())
