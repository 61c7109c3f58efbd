"""System against system on the same samples, over seeds and tasks: difference, ratio, and whether it is noise.

The ratio over several tasks is the mean of the tasks' ratios: minus one it is the paper's "relative improvement,
averaged over tasks" (arXiv 2508.08446, abstract). A task where the second system gets nothing right, in the data or in
some resample, has no ratio and is left out of that mean, and of nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.reporting.resampling import (
    Scores,
    is_binary,
    over_seeds,
    resampled_means,
    sample_means,
    score_array,
    seed_weights,
)
from pipeline.statistics import (
    CONFIDENCE,
    RESAMPLES,
    FloatArray,
    Interval,
    bootstrap_p,
    mcnemar,
    percentiles,
    sign_flip,
)

Systems = tuple[Sequence[Scores], Sequence[Scores]]
"""The two systems' scores, one mapping per seed each, seeds in the same order."""


@dataclass(frozen=True)
class Comparison:
    """System `first` against system `second` on the same samples."""

    first: float
    """Mean of the first system over tasks, seeds and samples."""
    second: float
    """Mean of the second system."""
    difference: Interval
    """first - second, with its paired interval."""
    ratio: Interval | None
    """Mean over tasks of first / second; None where no task has one."""
    share: Interval | None
    """first / second of the means over tasks; None where the second is 0 in the data or in some resample."""
    ratio_tasks: int
    """How many tasks have one."""
    wins: int
    """(task, seed, sample) triples that the first system scores higher on."""
    losses: int
    """Those that the second scores higher on."""
    p_value: float
    """Two-sided: McNemar's exact test for one seed of right and wrong, else the toss of signs over samples, or with
    several seeds the bootstrap's over seeds and samples where that is less sure."""
    seeds: int
    samples: int
    """Over all tasks."""
    tasks: int = 1

    @property
    def within_noise(self) -> bool:
        """Whether the interval of the difference contains zero, or the test is not significant.

        The bootstrap alone is too sure of itself when few samples differ: four wins without a loss exclude zero."""
        return self.p_value > 1 - CONFIDENCE or self.difference.contains(0.0)


def compare(
    first: Sequence[Scores],
    second: Sequence[Scores],
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare two systems by their scores on one task, one mapping {sample id: score} per seed, seeds in the same order.

    Only samples that every mapping has are compared.

    Raises:
        ValueError: another number of seeds on the two sides, or no sample in common.
    """
    return compare_over_tasks([(first, second)], confidence, resamples, seed)


def compare_over_tasks(
    tasks: Sequence[Systems], confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> Comparison:
    """As `compare`, over the mean of several tasks, every task counting the same."""
    arrays = [score_array(task) for task in tasks]
    means = [array.mean(axis=(1, 2)) for array in arrays]
    drawn = resampled_means(arrays, resamples, seed)
    over_tasks = np.mean(drawn, axis=0)
    differences = over_tasks[:, 0] - over_tasks[:, 1]
    first, second = (float(np.mean([mean[system] for mean in means])) for system in (0, 1))
    known = [
        (mean[0] / mean[1], one[:, 0] / one[:, 1]) for mean, one in zip(means, drawn, strict=True) if one[:, 1].all()
    ]
    return Comparison(
        first=first,
        second=second,
        difference=percentiles(first - second, differences, confidence),
        ratio=_mean_ratio(known, confidence),
        share=percentiles(first / second, over_tasks[:, 0] / over_tasks[:, 1], confidence)
        if over_tasks[:, 1].all()
        else None,
        ratio_tasks=len(known),
        wins=sum(int((array[0] > array[1]).sum()) for array in arrays),
        losses=sum(int((array[0] < array[1]).sum()) for array in arrays),
        p_value=_p_value(arrays, differences),
        seeds=arrays[0].shape[1],
        samples=sum(array.shape[2] for array in arrays),
        tasks=len(arrays),
    )


def _mean_ratio(known: Sequence[tuple[float, FloatArray]], confidence: float) -> Interval | None:
    if not known:
        return None
    drawn = np.mean([ratios for _, ratios in known], axis=0)
    return percentiles(float(np.mean([ratio for ratio, _ in known])), drawn, confidence)


def _p_value(arrays: Sequence[FloatArray], resampled: FloatArray) -> float:
    seeds = arrays[0].shape[1]
    if len(arrays) == 1 and seeds == 1 and is_binary(arrays[0]):
        first, second = arrays[0]
        return mcnemar(int((first > second).sum()), int((first < second).sum()))
    # Per sample the mean over seeds, in the weight that the sample has in the mean over tasks.
    differences = np.concatenate([(array[0] - array[1]).mean(axis=0) / array.shape[2] for array in arrays])
    tossed = sign_flip(differences * sum(array.shape[2] for array in arrays))
    return tossed if seeds == 1 else max(tossed, bootstrap_p(resampled))


@dataclass(frozen=True)
class Improvement:
    """Relative improvement of one method over another, averaged over tasks and configurations."""

    relative: Interval
    """0.8 is +80 %."""
    tasks: int
    """Those that have one somewhere."""
    configurations: int


def relative_improvement(
    configurations: Sequence[Mapping[str, Systems]], resamples: int = 2_000, seed: int = 0
) -> Improvement | None:
    """Mean of first / second - 1 over all (configuration, task) that have it; None where none has.

    Each configuration is {task: its two systems}. Configurations share the draws of samples, for they answer the same
    questions, and the draws of seeds where they have as many. They are those that were chosen: not resampled.
    """
    generator = np.random.default_rng(seed)
    weights = {
        count: seed_weights(count, resamples, generator)
        for count in sorted({len(first) for one in configurations for first, _ in one.values()})
    }
    values: list[float] = []
    ratios: list[FloatArray] = []
    counted: set[tuple[str, int]] = set()
    for task in dict.fromkeys(task for one in configurations for task in one):
        asked = [place for place, one in enumerate(configurations) if task in one]
        pairs = [configurations[place][task] for place in asked]
        # Every (configuration, method, seed) is a row of its own, on the samples that all have.
        rows = score_array([[scores] for first, second in pairs for scores in (*first, *second)])[:, 0]
        drawn, place = sample_means(rows, resamples, generator), 0
        for configuration, (first, _) in zip(asked, pairs, strict=True):
            own = slice(place, place := place + 2 * len(first))
            means = over_seeds(drawn[:, own], weights[len(first)])
            ours, theirs = rows[own].mean(axis=1).reshape(2, -1).mean(axis=1)
            if means[:, 1].all():
                values.append(float(ours / theirs) - 1)
                ratios.append(means[:, 0] / means[:, 1] - 1)
                counted.add((task, configuration))
    if not values:
        return None
    interval = percentiles(float(np.mean(values)), np.mean(ratios, axis=0))
    return Improvement(interval, *(len(set(part)) for part in zip(*counted, strict=True)))
