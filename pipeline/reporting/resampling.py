"""Bootstrap over seeds, samples and tasks at once, for systems that are judged on the same samples.

Seeds and samples are both resampled (the pigeonhole bootstrap of Owen 2007): a sample that is hard is hard in every
seed, so treating seeds x samples as independent would promise an interval that is far too narrow. Systems that are
compared share every draw, and so do tasks those of the seeds: a seed is one trained student, whatever it is asked.

Of S seeds S - 1 are drawn (Rao and Wu 1988): drawing all S gives (S - 1) / S of the variance, with two seeds half of it.

Samples with the same outcomes are exchangeable, so one multinomial draw over the distinct patterns of outcomes is the
same resample as a list of indices, and for right and wrong thousands of times cheaper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.statistics import CONFIDENCE, RESAMPLES, FloatArray, Interval, percentiles, wilson

Scores = Mapping[int, float] | Mapping[str, float]
"""{sample id: score}; right and wrong are 1 and 0."""
_AT_ONCE = 2_000_000
"""Numbers of a draw that are held in memory at once."""


def score_array(systems: Sequence[Sequence[Scores]]) -> FloatArray:
    """Scores [K systems, S seeds, N samples] of the samples that all of them have, by rising id.

    Raises:
        ValueError: no system, systems with other numbers of seeds, or no sample in common.
    """
    seeds = {len(system) for system in systems}
    if len(seeds) != 1 or 0 in seeds:
        raise ValueError(f"wants the same seeds for every system, got {[len(system) for system in systems]}")
    shared = sorted(set.intersection(*(set(one) for system in systems for one in system)))
    if not shared:
        raise ValueError("the outcomes have no sample in common")
    return np.array(
        [[[one[sample] for sample in shared] for one in system] for system in systems],
        dtype=np.float64,
    )


def resampled_means(tasks: Sequence[FloatArray], resamples: int = RESAMPLES, seed: int = 0) -> list[FloatArray]:
    """Resampled means [resamples, K] per task, from scores [K systems, S seeds, N samples] each."""
    generator = np.random.default_rng(seed)
    weights = seed_weights(tasks[0].shape[1], resamples, generator)
    return [
        over_seeds(sample_means(scores.reshape(-1, scores.shape[2]), resamples, generator), weights) for scores in tasks
    ]


def seed_weights(seeds: int, resamples: int, generator: np.random.Generator) -> FloatArray:
    """Weights [resamples, S] of the seeds in each resample."""
    drawn = max(1, seeds - 1)
    return generator.multinomial(drawn, np.full(seeds, 1 / seeds), size=resamples) / drawn


def sample_means(rows: FloatArray, resamples: int, generator: np.random.Generator) -> FloatArray:
    """Means [resamples, R] of rows [R, N samples], the same samples drawn for all of them."""
    patterns, counts = np.unique(rows, axis=1, return_counts=True)
    samples, step = rows.shape[1], max(1, _AT_ONCE // len(counts))
    parts = [
        generator.multinomial(samples, counts / samples, size=min(step, resamples - start)) @ patterns.T / samples
        for start in range(0, resamples, step)
    ]
    return np.concatenate(parts)


def over_seeds(means: FloatArray, weights: FloatArray) -> FloatArray:
    """Means [resamples, K] over seeds, from means [resamples, K * S] with the seeds of a system side by side."""
    resamples, seeds = weights.shape
    return np.einsum("rks,rs->rk", means.reshape(resamples, -1, seeds), weights)


def mean_over_seeds(
    scores: Sequence[Scores], confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Mean score of one system, one mapping per seed, with an interval over samples and seeds.

    Wilson's interval for one seed of right and wrong.

    Raises:
        ValueError: no seed, or no sample in common.
    """
    array = score_array([scores])
    if len(scores) == 1 and is_binary(array):
        return wilson(int(array.sum()), array.size, confidence)
    return average_over_tasks([scores], confidence, resamples, seed)


def average_over_tasks(
    tasks: Sequence[Sequence[Scores]], confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Mean over tasks of a system's mean score, [task][seed] mappings, every task counting the same."""
    arrays = [score_array([scores]) for scores in tasks]
    value = sum(float(array.mean()) for array in arrays) / len(arrays)
    drawn = sum(means[:, 0] for means in resampled_means(arrays, resamples, seed)) / len(arrays)
    return percentiles(value, np.asarray(drawn), confidence)


def is_binary(scores: FloatArray) -> bool:
    """Whether all scores are right or wrong."""
    return bool(((scores == 0) | (scores == 1)).all())
