"""A rule of thumb fitted to a sweep: size of the full model and share of it kept -> quality and latency.

    logit(quality) = a + b ln P + c ln k        ln TPOT = a + b ln P + c ln k

P parameters of the full model, k share of them that is kept. Logits keep a predicted quality inside (0, 1); a latency
that is bound by reading weights is a power of how many there are. Least squares, one point per configuration. Where the
sweep has one size of full model only, b ln P is left out.

A fit through few points flatters itself, so its error is that on configurations left out: each is predicted from all
others (leave one out) and compared in the unit of the prediction. Beside it stands what the mean of the others would
have missed by: a guideline that is not better than that has nothing to say, and is said not to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.groups import Group
from pipeline.statistics import FloatArray

Target = Literal["quality", "tpot_s"]
SPARE = 2
"""Configurations beyond the number of coefficients that a fit needs."""
EDGE = 1e-3
"""Qualities are drawn this far into (0, 1) before their logit is taken."""


@dataclass(frozen=True)
class Fit:
    """One fitted formula."""

    target: Target
    constant: float
    size: float | None
    """Coefficient of ln P; None where the sweep has one size only."""
    kept: float
    """Coefficient of ln k."""
    error: float
    """Root mean square error on configurations left out: in quality itself; for a latency relative to it."""
    error_of_mean: float
    """The same, had the mean of the others been predicted."""

    @property
    def is_useful(self) -> bool:
        """Whether the formula predicts a configuration left out better than the mean of the others does."""
        return self.error < self.error_of_mean

    def predict(self, parameters: float, kept: float) -> float:
        """Quality as a share, or seconds per token, of a full model of so many parameters and a share of them kept."""
        value = self.constant + (self.size or 0.0) * math.log(parameters) + self.kept * math.log(kept)
        return SCALES[self.target].back(value)


@dataclass(frozen=True)
class Guideline:
    """What the sweep's cells of one method say about cells that were not run."""

    method: str
    variant: str
    configurations: int
    needed: int
    """Configurations that a fit needs."""
    fits: tuple[Fit, ...]
    """Empty where there are too few."""
    parameters: tuple[float, float]
    """Smallest and largest full model in the fit: beyond, it is a guess."""
    kept: tuple[float, float]
    """Smallest and largest share kept."""

    def fit(self, target: Target) -> Fit | None:
        """The formula for a target, None where there is none."""
        return next((fit for fit in self.fits if fit.target == target), None)


@dataclass(frozen=True)
class _Scale:
    forth: Callable[[float], float]
    back: Callable[[float], float]
    relative: bool


SCALES: dict[Target, _Scale] = {
    "quality": _Scale(
        lambda share: math.log(min(max(share, EDGE), 1 - EDGE) / (1 - min(max(share, EDGE), 1 - EDGE))),
        lambda logit: 1 / (1 + math.exp(-logit)),
        relative=False,
    ),
    "tpot_s": _Scale(math.log, math.exp, relative=True),
}


def guidelines(found: Sequence[Group]) -> list[Guideline]:
    """One per method and variant that a student has been judged with."""
    gathered: dict[tuple[str, str], list[Group]] = {}
    for group in found:
        if group.method != "full" and group.quality is not None and group.mean("parameters_kept"):
            gathered.setdefault((group.method, group.variant), []).append(group)
    return [_guideline(method, variant, groups) for (method, variant), groups in gathered.items()]


def _guideline(method: str, variant: str, found: Sequence[Group]) -> Guideline:
    sizes = [group.mean("parameters_full") or 0.0 for group in found]
    kept = [group.mean("parameters_kept") or 0.0 for group in found]
    needed = (3 if len(set(sizes)) > 1 else 2) + SPARE
    points: dict[Target, list[float | None]] = {
        "quality": [None if group.quality is None else group.quality.value for group in found],
        "tpot_s": [group.mean("tpot_s") for group in found] if len({group.conditions for group in found}) == 1 else [],
    }
    fits = tuple(
        fit for target, values in points.items() if (fit := fit_points(target, sizes, kept, values)) is not None
    )
    return Guideline(method, variant, len(found), needed, fits, (min(sizes), max(sizes)), (min(kept), max(kept)))


def fit_points(
    target: Target, sizes: Sequence[float], kept: Sequence[float], values: Sequence[float | None]
) -> Fit | None:
    """Fit a target to the points that have it; None where they are too few or do not tell the coefficients apart."""
    points = [
        (size, share, value) for size, share, value in zip(sizes, kept, values, strict=False) if value is not None
    ]
    if not points:
        return None
    scale, several = SCALES[target], len({size for size, _, _ in points}) > 1
    rows = [[1.0, math.log(share), *([math.log(size)] if several else [])] for size, share, _ in points]
    matrix, wanted = np.array(rows), np.array([scale.forth(value) for _, _, value in points])
    if len(points) < matrix.shape[1] + SPARE or np.linalg.matrix_rank(matrix) < matrix.shape[1]:
        return None
    coefficients = np.linalg.lstsq(matrix, wanted, rcond=None)[0]
    measured = np.array([value for _, _, value in points])
    error = _error(scale, measured, left_out(matrix, wanted))
    of_mean = _error(scale, measured, left_out(matrix[:, :1], wanted))
    size = float(coefficients[2]) if several else None
    return Fit(target, float(coefficients[0]), size, float(coefficients[1]), error, of_mean)


def left_out(matrix: FloatArray, wanted: FloatArray) -> FloatArray:
    """Every point's prediction by least squares through all others, from one decomposition (Allen 1974).

    A point without which the others do not tell the coefficients apart has leverage 1; its prediction is NaN."""
    leverage = np.square(np.linalg.qr(matrix)[0]).sum(axis=1)
    residuals = wanted - matrix @ np.linalg.lstsq(matrix, wanted, rcond=None)[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        missed = np.where(leverage > 1 - 1e-9, np.nan, residuals / (1 - leverage))
    return wanted - missed


def _error(scale: _Scale, measured: FloatArray, predicted: FloatArray) -> float:
    natural = np.array([math.nan if math.isnan(value) else scale.back(value) for value in predicted.tolist()])
    missed = natural / measured - 1 if scale.relative else natural - measured
    return float(np.sqrt(np.nanmean(np.square(missed))))
