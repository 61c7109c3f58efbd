"""Cells that differ in nothing but the seed are one configuration: its numbers over the seeds, with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.reporting.methods import LOOKS, METHODS
from pipeline.reporting.resampling import Scores, average_over_tasks, mean_over_seeds
from pipeline.reporting.rows import Row
from pipeline.reporting.scores import HELD_OUT, CellScores
from pipeline.statistics import Interval

SeedScores = Mapping[int | None, Scores]
"""{seed: scores}; the full model's seed is None."""


@dataclass(frozen=True)
class Group:
    """The cells that differ in nothing but the seed, and their numbers over the seeds."""

    teacher: str
    ratio: float
    variant: str
    method: str
    members: tuple[Row, ...]
    exact_match: Interval | None
    """On the held-out part of the corpus."""
    tasks: Mapping[str, Interval] = field(default_factory=dict)
    """Every other task's score."""
    average: Interval | None = None
    """Over those tasks, every task counting the same; None where some of the report's tasks are missing."""
    quality_tasks: tuple[str, ...] = (HELD_OUT,)
    """The tasks that configurations of this report are ranked by."""
    scores: Mapping[str, SeedScores] = field(default_factory=dict, repr=False)
    """Task -> the samples' scores, the held-out ones among them."""

    @property
    def quality(self) -> Interval | None:
        """What configurations are ranked by: the average over tasks, or the held-out exact match where there are none."""
        return self.exact_match if self.quality_tasks == (HELD_OUT,) else self.average

    @property
    def unpaired(self) -> dict[str, float]:
        """Tasks whose metric is no number per sample, `task metric` -> mean over seeds."""
        found: dict[str, list[float]] = {}
        for member in self.members:
            for task, metric in member.get("tasks", {}).items():
                if task not in self.scores:
                    found.setdefault(f"{task} {metric['metric']}", []).append(metric["value"])
        return {name: sum(values) / len(values) for name, values in found.items()}

    @property
    def is_pruned(self) -> bool:
        """Whether it has a pruning ratio."""
        return LOOKS[self.method].pruned

    def mean(self, name: str) -> float | None:
        """Mean of a column over the seeds that have it."""
        values = [member[name] for member in self.members if member.get(name) is not None]
        return sum(values) / len(values) if values else None

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the members."""
        return tuple(member["seed"] for member in self.members)

    @property
    def conditions(self) -> tuple[tuple[str, Any], ...]:
        """Of its latency: batch, lengths and device. Latencies of other conditions are not compared with it."""
        known = (member["benchmark"] for member in self.members if member.get("benchmark"))
        return tuple(next(known, {}).items())


def groups(table: Sequence[Row], scores: CellScores) -> list[Group]:
    """Rows without their seeds, in the order teacher, ratio, variant, method; the full model once per teacher."""
    gathered: dict[tuple[str, float, str, int], dict[str, Row]] = {}
    for entry in table:
        full = entry["method"] == "full"
        key = (entry["teacher"], 0.0 if full else entry["ratio"], "" if full else entry["variant"])
        gathered.setdefault((*key, METHODS.index(entry["method"])), {})[entry["identity"]] = entry
    names = dict.fromkeys(task for one in scores.values() for task in one if task != HELD_OUT)
    return [
        _group(teacher, ratio, text, METHODS[method], tuple(members.values()), scores, tuple(names) or (HELD_OUT,))
        for (teacher, ratio, text, method), members in sorted(gathered.items(), key=lambda item: item[0])
    ]


def _group(
    teacher: str,
    ratio: float,
    variant: str,
    method: str,
    members: tuple[Row, ...],
    scores: CellScores,
    ranked_by: tuple[str, ...],
) -> Group:
    known = {member["seed"]: scores[member["identity"]] for member in members if member["identity"] in scores}
    names = dict.fromkeys(task for one in known.values() for task in one)
    by_task = {task: {seed: one[task] for seed, one in known.items() if task in one} for task in names}
    intervals = {task: mean_over_seeds(list(seeds.values())) for task, seeds in by_task.items()}
    complete = [one for one in known.values() if all(task in one for task in ranked_by)]
    average = average_over_tasks([[one[task] for one in complete] for task in ranked_by]) if complete else None
    held_out = intervals.pop(HELD_OUT, None)
    return Group(
        teacher, ratio, variant, method, members, held_out, intervals,
        average=None if ranked_by == (HELD_OUT,) else average, quality_tasks=ranked_by, scores=by_task,
    )  # fmt: skip


def paired(first: Group, second: Group) -> dict[str, tuple[list[Scores], list[Scores]]]:
    """The scores of two groups on the tasks of their quality that both have, over the seeds that have all of those.

    The full model has no seed: its one answer stands beside each of the other's."""
    tasks = [task for task in first.quality_tasks if first.scores.get(task) and second.scores.get(task)]
    pairs = {task: _beside(first.scores[task], second.scores[task]) for task in tasks}
    seeds = [
        seed
        for seed in (next(iter(pairs.values()))[0] if pairs else ())
        if all(seed in side for pair in pairs.values() for side in pair)
    ]
    return {
        task: ([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
        for task, (ours, theirs) in pairs.items()
        if seeds
    }


def _beside(ours: SeedScores, theirs: SeedScores) -> tuple[SeedScores, SeedScores]:
    if None in theirs:
        return ours, dict.fromkeys(ours, theirs[None])
    return (dict.fromkeys(theirs, ours[None]), theirs) if None in ours else (ours, theirs)
