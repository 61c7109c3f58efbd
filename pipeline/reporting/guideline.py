"""A rule of thumb fitted to a sweep: size of the full model and share of it kept -> quality and latency.

    logit(quality) = a + b ln P + c ln k        TPOT = a + b P k

P parameters of the full model, k share of them that is kept. Logits keep a predicted quality inside (0, 1). A token
costs what its step costs whatever is read, and a read of the P k parameters that decode; that is fitted to relative
errors, for latencies of large and small models to count the same. Least squares, one point per configuration. Where the
sweep has one size of full model only, b ln P is left out.

A fit through few points flatters itself, so its error is that on configurations left out: each is predicted from all
others (leave one out) and compared in the unit of the prediction. Beside it stands what the mean of the others would
have missed by: a guideline that is not better than that has nothing to say, and is said not to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.reporting.groups import Group
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
    coefficients: dict[str, float]
    """`constant`, and for a quality `ln_k` and, with several sizes of full models, `ln_p`; for a latency `p_k`."""
    error: float
    """Root mean square error on configurations left out: of a quality in itself, of a latency relative to it."""
    error_of_mean: float
    """The same, had the mean of the others been predicted."""

    @property
    def is_useful(self) -> bool:
        """Whether the formula predicts a configuration left out better than the mean of the others does."""
        return self.error < self.error_of_mean

    def predict(self, parameters: float, kept: float) -> float:
        """Quality as a share, or seconds per token, of a full model of so many parameters and a share of them kept."""
        terms = {"constant": 1.0, "ln_p": math.log(parameters), "ln_k": math.log(kept), "p_k": parameters * kept}
        value = sum(coefficient * terms[name] for name, coefficient in self.coefficients.items())
        return float(_logistic(np.array(value))) if self.target == "quality" else value


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
class Point:
    """One configuration."""

    parameters: float
    """Of the full model."""
    kept: float
    quality: float | None = None
    tpot_s: float | None = None


def guidelines(found: Sequence[Group]) -> list[Guideline]:
    """One per method and variant that a student has been judged with."""
    gathered: dict[tuple[str, str], list[Group]] = {}
    for group in found:
        if group.is_pruned and group.quality is not None and group.mean("parameters_kept"):
            gathered.setdefault((group.method, group.variant), []).append(group)
    return [_guideline(method, variant, groups) for (method, variant), groups in gathered.items()]


def _guideline(method: str, variant: str, found: Sequence[Group]) -> Guideline:
    comparable = len({group.conditions for group in found if group.conditions}) == 1
    points = [
        Point(
            group.mean("parameters_full") or 0.0,
            group.mean("parameters_kept") or 0.0,
            None if group.quality is None else group.quality.value,
            group.mean("tpot_s") if comparable else None,
        )
        for group in found
    ]
    sizes, kept = [point.parameters for point in points], [point.kept for point in points]
    fits = [fit for fit in (fit_quality(points), fit_latency(points)) if fit is not None]
    needed = (3 if len(set(sizes)) > 1 else 2) + SPARE
    return Guideline(
        method, variant, len(points), needed, tuple(fits), (min(sizes), max(sizes)), (min(kept), max(kept))
    )


def fit_quality(points: Sequence[Point]) -> Fit | None:
    """The formula for quality; None where the points are too few or do not tell the coefficients apart."""
    known = [(point, point.quality) for point in points if point.quality is not None]
    columns = {"constant": [1.0] * len(known), "ln_k": [math.log(point.kept) for point, _ in known]}
    if len({point.parameters for point, _ in known}) > 1:
        columns["ln_p"] = [math.log(point.parameters) for point, _ in known]
    measured = np.array([quality for _, quality in known])
    wanted = np.array([_logit(quality) for _, quality in known])
    solved = _solve(columns, wanted)
    if solved is None:
        return None
    coefficients, predicted, by_mean = solved
    errors = [_root_mean_square(_logistic(values) - measured) for values in (predicted, by_mean)]
    return Fit("quality", coefficients, *errors)


def fit_latency(points: Sequence[Point]) -> Fit | None:
    """The formula for TPOT; None where the points are too few or do not tell the coefficients apart."""
    known = [(point, point.tpot_s) for point in points if point.tpot_s]
    # Every row divided by its latency: the residual of 1 is the relative error.
    columns = {
        "constant": [1 / tpot for _, tpot in known],
        "p_k": [point.parameters * point.kept / tpot for point, tpot in known],
    }
    solved = _solve(columns, np.ones(len(known)))
    if solved is None:
        return None
    coefficients, predicted, by_mean = solved
    return Fit("tpot_s", coefficients, _root_mean_square(predicted - 1), _root_mean_square(by_mean - 1))


def _solve(
    columns: dict[str, list[float]], wanted: FloatArray
) -> tuple[dict[str, float], FloatArray, FloatArray] | None:
    """Coefficients, and the points' predictions from all others by the formula and by its constant alone."""
    matrix = np.array(list(columns.values()), dtype=np.float64).T
    if len(wanted) < len(columns) + SPARE:
        return None
    # Columns of one length, for counts of parameters stand beside ones.
    scale = np.linalg.norm(matrix, axis=0)
    if not scale.all() or np.linalg.matrix_rank(matrix / scale) < len(columns):
        return None
    solution = np.linalg.lstsq(matrix / scale, wanted, rcond=None)[0] / scale
    coefficients = dict(zip(columns, map(float, solution), strict=True))
    return coefficients, left_out(matrix / scale, wanted), left_out(matrix[:, :1], wanted)


def left_out(matrix: FloatArray, wanted: FloatArray) -> FloatArray:
    """Every point's prediction by least squares through all others, from one decomposition (Allen 1974).

    A point without which the others do not tell the coefficients apart has leverage 1; its prediction is NaN."""
    leverage = np.square(np.linalg.qr(matrix)[0]).sum(axis=1)
    residuals = wanted - matrix @ np.linalg.lstsq(matrix, wanted, rcond=None)[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        missed = np.where(leverage > 1 - 1e-9, np.nan, residuals / (1 - leverage))
    return wanted - missed


def _root_mean_square(errors: FloatArray) -> float:
    return float(np.sqrt(np.nanmean(np.square(errors))))


def _logit(share: float) -> float:
    inside = min(max(share, EDGE), 1 - EDGE)
    return math.log(inside / (1 - inside))


def _logistic(values: FloatArray) -> FloatArray:
    return 1 / (1 + np.exp(-values))
