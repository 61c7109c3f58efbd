"""How sure a number is: intervals and paired tests for a handful of seeds and a few thousand samples.

Pure numpy. Four questions, one function each:

- "this exact match is k of n": Wilson's score interval (Wilson 1927), which stays inside [0, 1] and is right near both
  ends, where the textbook normal interval has width zero.
- "this number came from a few seeds": percentile bootstrap of the mean (Efron 1979).
- "system A beats system B on the same samples": paired bootstrap of the difference and of the ratio. With several seeds
  both seeds and samples are resampled (the pigeonhole bootstrap of Owen 2007): a sample that is hard is hard in every
  seed, so treating seeds x samples as independent would promise an interval that is far too narrow.
- "could the discordant samples be a coin toss": McNemar's exact test (two-sided binomial).

The bootstrap of binary outcomes needs no list of resampled indices: samples with the same outcomes are exchangeable, so
one multinomial draw over the distinct outcome patterns is the same resample, thousands of times cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval around it, in the unit of the estimate."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval's length: the number behind ±."""
        return (self.high - self.low) / 2

    def contains(self, value: float) -> bool:
        """Whether `value` lies inside the interval, its ends included."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Comparison:
    """System `first` against system `second` on the same samples."""

    first: float
    """Mean of the first system."""
    second: float
    """Mean of the second system."""
    difference: Interval
    """first - second, with its paired interval."""
    ratio: Interval | None
    """first / second; None where the second system has no correct sample in the data or in some resample."""
    wins: int
    """(seed, sample) pairs that only the first system has right."""
    losses: int
    """(seed, sample) pairs that only the second system has right."""
    p_value: float | None
    """McNemar's exact test; None with several seeds, where the pairs are not independent and the test does not hold."""
    seeds: int
    samples: int

    @property
    def within_noise(self) -> bool:
        """Whether the interval of the difference contains zero, or McNemar's test, where it holds, is not significant.

        The bootstrap alone is too sure of itself when few samples differ: four wins without a loss exclude zero."""
        unsure = self.p_value is not None and self.p_value > 1 - CONFIDENCE
        return unsure or self.difference.contains(0.0)


def wilson(correct: int, total: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval of a share `correct / total`.

    Raises:
        ValueError: no sample, or more correct ones than samples.
    """
    if total <= 0 or not 0 <= correct <= total:
        raise ValueError(f"wilson: {correct} correct of {total} samples is no share")
    share, z = correct / total, NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    spread = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    low = 0.0 if correct == 0 else max(0.0, centre - spread)
    high = 1.0 if correct == total else min(1.0, centre + spread)
    return Interval(share, low, high)


def bootstrap_mean(
    values: Sequence[float] | FloatArray,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean of `values` [n] with its percentile bootstrap interval; one value alone gives an interval of width zero.

    Raises:
        ValueError: no value.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"bootstrap_mean wants a non-empty list of numbers, got shape {array.shape}")
    distinct, counts = np.unique(array, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(array.size, counts / array.size, size=resamples)
    return _percentiles(float(array.mean()), drawn @ distinct / array.size, confidence)


def share_over_seeds(
    outcomes: Sequence[Mapping[int, bool]],
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Share of correct samples, one mapping {sample id: correct} per seed.

    Wilson's interval for one seed; for several, seeds and samples resampled as in `compare`, over the shared samples.

    Raises:
        ValueError: no seed, or no sample in common.
    """
    if len(outcomes) == 1:
        return wilson(sum(outcomes[0].values()), len(outcomes[0]), confidence)
    array = _outcome_array(outcomes, _shared_samples(outcomes))
    means, _ = _paired_resamples(array, array, resamples, seed)
    return _percentiles(float(array.mean()), means, confidence)


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided exact p-value of `wins` against `losses` discordant pairs under a fair coin; 1.0 without any."""
    if wins < 0 or losses < 0:
        raise ValueError(f"mcnemar: {wins} wins against {losses} losses")
    pairs, fewer = wins + losses, min(wins, losses)
    k = np.arange(1, fewer + 1, dtype=np.float64)
    # log C(n, k) as a running sum: exact enough for any n, where factorials overflow.
    log_choose = np.concatenate([[0.0], np.cumsum(np.log((pairs - k + 1) / k))])
    tail = float(np.exp(log_choose - pairs * math.log(2)).sum())
    return min(1.0, 2 * tail)


def compare(
    first: Sequence[Mapping[int, bool]],
    second: Sequence[Mapping[int, bool]],
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare two systems by their correct samples, one mapping {sample id: correct} per seed, seeds in the same order.

    Only samples that every mapping has are compared.

    Raises:
        ValueError: another number of seeds on the two sides, or no sample in common.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"compare wants the same seeds on both sides, got {len(first)} and {len(second)}")
    shared = _shared_samples([*first, *second])
    a, b = _outcome_array(first, shared), _outcome_array(second, shared)
    means_a, means_b = _paired_resamples(a, b, resamples, seed)
    wins, losses = int((a > b).sum()), int((a < b).sum())
    return Comparison(
        first=float(a.mean()),
        second=float(b.mean()),
        difference=_percentiles(float(a.mean() - b.mean()), means_a - means_b, confidence),
        ratio=_ratio(a, b, means_a, means_b, confidence),
        wins=wins,
        losses=losses,
        p_value=mcnemar(wins, losses) if len(first) == 1 else None,
        seeds=len(first),
        samples=len(shared),
    )


def _shared_samples(outcomes: Sequence[Mapping[int, bool]]) -> list[int]:
    shared = sorted(set.intersection(*(set(one) for one in outcomes))) if outcomes else []
    if not shared:
        raise ValueError("the outcomes have no sample in common")
    return shared


def _outcome_array(outcomes: Sequence[Mapping[int, bool]], samples: Sequence[int]) -> npt.NDArray[np.int8]:
    return np.array([[one[sample] for sample in samples] for one in outcomes], dtype=np.int8)


def _paired_resamples(
    a: npt.NDArray[np.int8], b: npt.NDArray[np.int8], resamples: int, seed: int
) -> tuple[FloatArray, FloatArray]:
    """Means [resamples] of outcomes `a` and `b` [S seeds, N samples], seeds and samples drawn alike for both."""
    seeds, samples = a.shape
    patterns, counts = np.unique(np.concatenate([a, b]), axis=1, return_counts=True)
    generator = np.random.default_rng(seed)
    by_sample = generator.multinomial(samples, counts / samples, size=resamples) / samples
    by_seed = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    means = by_sample @ patterns.T.astype(np.float64)
    return (means[:, :seeds] * by_seed).sum(axis=1), (means[:, seeds:] * by_seed).sum(axis=1)


def _ratio(
    a: npt.NDArray[np.int8],
    b: npt.NDArray[np.int8],
    means_a: FloatArray,
    means_b: FloatArray,
    confidence: float,
) -> Interval | None:
    if not means_b.all():
        return None
    return _percentiles(float(a.mean() / b.mean()), means_a / means_b, confidence)


def _percentiles(value: float, resampled: FloatArray, confidence: float) -> Interval:
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(low), float(high))
