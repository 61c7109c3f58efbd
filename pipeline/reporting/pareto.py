"""Which configurations are worth a look: those that no other beats in cost and quality at once. And budgets.

Costs that were measured under other conditions (another device, batch or length) say nothing about each other: every
set of equal conditions has a front of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from overfill.errors import UserError
from pipeline.reporting.groups import Group

Cost = Literal["tpot_s", "memory_bytes"]
COSTS: tuple[Cost, ...] = ("tpot_s", "memory_bytes")
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, quality) points that no other point beats, by rising cost; of equal points the first."""
    order = sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1]))
    kept: list[int] = []
    for index in order:
        if not kept or points[index][1] > points[kept[-1]][1]:
            kept.append(index)
    return kept


def dominator(point: tuple[float, float], points: Sequence[tuple[float, float]]) -> int | None:
    """Index of the best of `points` that is nowhere worse than `point` and somewhere better; None without one."""
    better = [
        index for index, other in enumerate(points) if other != point and other[0] <= point[0] and other[1] >= point[1]
    ]
    return max(better, key=lambda index: (points[index][1], -points[index][0]), default=None)


@dataclass(frozen=True)
class Standing:
    """Where a group stands on the front of one cost."""

    cost: float
    dominated_by: Group | None
    """Another that is nowhere worse and somewhere better, both counted as measured; None on the front."""


Standings = Mapping[tuple[str, float, str, str], Standing]


def key(group: Group) -> tuple[str, float, str, str]:
    """What tells a group from all others of a report."""
    return group.teacher, group.ratio, group.variant, group.method


def cost_of(group: Group, cost: Cost) -> float | None:
    """A cost of a group, mean over seeds: seconds per output token; bytes at the peak of decoding, or of the weights
    where nobody counts the peak."""
    if cost == "tpot_s":
        return group.mean("tpot_s")
    peak = group.mean("peak_bytes")
    return group.mean("weight_bytes") if peak is None else peak


def standings(found: Sequence[Group], cost: Cost) -> dict[tuple[str, float, str, str], Standing]:
    """Where every group stands that has this cost and a quality, compared under equal conditions."""
    measured = [
        (group, spent, group.quality.value) for group in found if group.quality and (spent := cost_of(group, cost))
    ]
    result: dict[tuple[str, float, str, str], Standing] = {}
    for group, spent, value in measured:
        rivals = [entry for entry in measured if entry[0].conditions == group.conditions]
        best = dominator((spent, value), [(other, quality) for _, other, quality in rivals])
        result[key(group)] = Standing(spent, None if best is None else rivals[best][0])
    return result


@dataclass(frozen=True)
class Budget:
    """What a configuration may cost at most; None is no limit."""

    tpot_s: float | None = None
    memory_bytes: float | None = None

    def __bool__(self) -> bool:
        """Whether there is a limit."""
        return self != Budget()

    def fits(self, group: Group) -> bool:
        """Whether the group's costs are known and within."""
        return all(
            (spent := cost_of(group, cost)) is not None and spent <= limit for cost, limit in self.limits.items()
        )

    @property
    def limits(self) -> dict[Cost, float]:
        """The limits that there are."""
        named: dict[Cost, float | None] = {"tpot_s": self.tpot_s, "memory_bytes": self.memory_bytes}
        return {cost: limit for cost, limit in named.items() if limit is not None}


def read_budget(max_tpot: str | None, max_memory: str | None) -> Budget:
    """The budget of `--max-tpot 20ms` and `--max-memory 6GB`. Raises UserError for what is no time or size."""
    return Budget(
        None if max_tpot is None else _quantity("--max-tpot", max_tpot, SECONDS, "20ms"),
        None if max_memory is None else _quantity("--max-memory", max_memory, BYTES, "6GB"),
    )


def _quantity(option: str, text: str, units: Mapping[str, float], example: str) -> float:
    found = re.fullmatch(r"\s*(\d*\.?\d+(?:[eE][+-]?\d+)?)\s*([A-Za-zµ]+)\s*", text)
    scale = next((units[unit] for unit in units if found and unit.lower() == found[2].lower()), None)
    if found is None or scale is None:
        raise UserError(f"{option} {text}: give a number and a unit ({', '.join(units)}), such as {example}")
    value = float(found[1]) * scale
    if not 0 < value < math.inf:
        raise UserError(f"{option} {text}: nothing costs that little or that much; give a number such as {example}")
    return value
