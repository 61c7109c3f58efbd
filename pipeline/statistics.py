"""How sure a number is: intervals and tests for a handful of seeds and a few thousand samples. Pure numpy.

- "this exact match is k of n": Wilson's score interval (Wilson 1927), which stays inside [0, 1] and is right near both
  ends, where the textbook normal interval has width zero.
- "this number came out of a resampling": the percentile interval (Efron 1979), and the p-value that agrees with it.
- "could the discordant samples be a coin toss": McNemar's exact test (two-sided binomial), and its like for scores that
  are no yes or no, and for means over seeds: the signs of the samples' differences are tossed (Fisher 1935).

Seeds and tasks together are the matter of `pipeline.reporting.resampling`, systems side by side that of
`pipeline.reporting.comparison`.
"""

from __future__ import annotations

import math
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


def percentiles(value: float, resampled: FloatArray, confidence: float = CONFIDENCE) -> Interval:
    """The percentile interval of an estimate from its resampled values."""
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(low), float(high))


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


def sign_flip(differences: FloatArray, flips: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p-value of the sum of paired `differences` [n] when each sign is a coin toss, from `flips` tosses.

    Differences of one size are exchangeable, so the number of heads among them is one binomial draw."""
    sizes, counts = np.unique(np.abs(differences[differences != 0]).round(12), return_counts=True)
    if sizes.size == 0:
        return 1.0
    generator = np.random.default_rng(seed)
    sums = np.zeros(flips)
    for size, count in zip(sizes, counts, strict=True):
        sums += size * (2.0 * generator.binomial(count, 0.5, size=flips) - count)
    seen = abs(float(differences.sum())) - 1e-9
    return (1 + int((np.abs(sums) >= seen).sum())) / (flips + 1)


def bootstrap_p(resampled: FloatArray) -> float:
    """Two-sided p-value of "it is zero" from resampled values: at 0.05 it agrees with whether the interval holds zero."""
    beyond = min(int((resampled <= 0).sum()), int((resampled >= 0).sum()))
    return min(1.0, 2 * (1 + beyond) / (resampled.size + 1))
