"""The fitted rule of thumb against a case worked out by hand, and its honesty where there is too little."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.reporting.groups import Group
from pipeline.reporting.guideline import Point, fit_latency, fit_quality, guidelines, left_out
from pipeline.reporting.wording import guideline_sentence
from pipeline.statistics import Interval


def group(size: float, kept: float, quality: float, tpot: float, method: str = "overfill") -> Group:
    member = {"seed": 0, "tpot_s": tpot, "parameters_full": size, "parameters_kept": kept}
    member |= {"benchmark": {"device": "cpu"}}
    return Group("t", 1 - kept, "", method, (member,), Interval(quality, quality, quality))


def test_a_straight_line_and_its_left_out_errors_are_those_of_a_sheet_of_paper() -> None:
    # y = 1, 2, 2, 4 over x = 0, 1, 2, 3: slope 0.9, constant 0.9; leverages 0.7, 0.3, 0.3, 0.7.
    matrix, wanted = np.array([[1.0, 0], [1, 1], [1, 2], [1, 3]]), np.array([1.0, 2, 2, 4])
    residuals = np.array([0.1, 0.2, -0.7, 0.4])
    assert wanted - left_out(matrix, wanted) == pytest.approx(residuals / [0.3, 0.7, 0.7, 0.3])


def test_left_out_predictions_are_those_of_fits_without_the_point() -> None:
    rng = np.random.default_rng(5)
    matrix = np.column_stack([np.ones(9), rng.normal(size=(9, 2))])
    wanted = rng.normal(size=9)
    refitted = [
        float(matrix[i] @ np.linalg.lstsq(np.delete(matrix, i, 0), np.delete(wanted, i), rcond=None)[0])
        for i in range(9)
    ]
    assert left_out(matrix, wanted) == pytest.approx(refitted)


def test_a_point_that_alone_decides_a_coefficient_cannot_be_predicted_from_the_others() -> None:
    matrix = np.array([[1.0, 0], [1, 0], [1, 0], [1, 1]])
    assert np.isnan(left_out(matrix, np.array([1.0, 2, 3, 9]))[3])


def test_a_latency_of_an_overhead_and_a_read_of_the_weights_is_found_with_no_error() -> None:
    cells = [(size, kept) for size in (1e6, 4e6, 16e6) for kept in (0.2, 0.4, 0.7)]
    fit = fit_latency([Point(size, kept, tpot_s=2e-3 + 1e-9 * size * kept) for size, kept in cells])
    assert fit is not None
    assert fit.coefficients == {"constant": pytest.approx(2e-3), "p_k": pytest.approx(1e-9)}
    assert fit.error == pytest.approx(0, abs=1e-9)
    assert fit.is_useful
    assert fit.predict(2e6, 0.3) == pytest.approx(2e-3 + 1e-9 * 0.6e6)


def test_the_error_of_a_latency_is_relative() -> None:
    # Three points at 1 s and one at 2 s that nothing tells apart: left out, the one is predicted at 1 s, half of itself.
    points = [Point(1e6, kept, tpot_s=tpot) for kept, tpot in [(0.1, 1.0), (0.2, 1.0), (0.3, 1.0), (0.4, 2.0)]]
    fit = fit_latency(points)
    assert fit is not None
    by_mean = [float(np.mean([1 / q for q in other]) / np.mean([1 / q**2 for q in other])) / tpot - 1 for tpot, other in
               [(1.0, [1, 1, 2])] * 3 + [(2.0, [1, 1, 1])]]  # fmt: skip
    assert fit.error_of_mean == pytest.approx(np.sqrt(np.mean(np.square(by_mean))))


def test_a_predicted_quality_stays_a_share() -> None:
    kept = [0.1, 0.2, 0.4, 0.8]
    fit = fit_quality([Point(1e6, k, 1 / (1 + math.exp(-(1 + 2 * math.log(k))))) for k in kept])
    assert fit is not None
    assert fit.coefficients == {"constant": pytest.approx(1.0), "ln_k": pytest.approx(2.0)}
    assert 0 < fit.predict(1e6, 1e-4) < fit.predict(1e6, 1.0) < 1


def test_noise_without_a_law_is_said_to_be_of_no_use() -> None:
    found = guidelines([group(1e6, kept, quality, 1e-3) for kept, quality in
                        [(0.1, 0.5), (0.2, 0.1), (0.3, 0.9), (0.4, 0.2), (0.5, 0.6)]])  # fmt: skip
    quality = found[0].fit("quality")
    assert quality is not None
    assert not quality.is_useful
    assert "none for quality: a fit misses a configuration left out by" in guideline_sentence(found[0])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_too_few_configurations_give_no_guideline_and_say_how_many_are_needed(count: int) -> None:
    found = guidelines([group(1e6, 0.1 * (place + 1), 0.5, 1e-3) for place in range(count)])
    assert found[0].fits == ()
    assert (
        guideline_sentence(found[0]) == f"No guideline for OverFill: {count} of at least 4 configurations are measured."
    )


def test_two_sizes_of_full_models_need_one_configuration_more() -> None:
    cells = [(1e6, 0.2), (1e6, 0.4), (2e6, 0.2), (2e6, 0.4)]
    assert guidelines([group(size, kept, 0.5, 1e-3) for size, kept in cells])[0].needed == 5


def test_methods_have_guidelines_of_their_own_and_the_full_model_none() -> None:
    found = [group(1e6, 0.1 * n, 0.1 * n, 1e-3 * n, method) for method in ("overfill", "pruned") for n in (1, 2, 3, 4)]
    assert [one.method for one in guidelines([*found, group(1e6, 1.0, 0.9, 0.1, "full")])] == ["overfill", "pruned"]
