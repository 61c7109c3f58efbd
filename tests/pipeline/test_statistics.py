"""The intervals and tests against values that others have published or that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.reporting.comparison import compare
from pipeline.reporting.resampling import mean_over_seeds
from pipeline.statistics import mcnemar, wilson


def outcomes(*bits: int) -> dict[int, bool]:
    return {sample: bool(bit) for sample, bit in enumerate(bits)}


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, table I (method 3: Wilson without continuity correction).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_values(correct: int, total: int, low: float, high: float) -> None:
    interval = wilson(correct, total)
    assert interval.value == correct / total
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


def test_wilson_of_everything_right_reaches_one_and_still_has_a_width() -> None:
    interval = wilson(50, 50)
    assert interval.high == 1.0
    assert interval.low == pytest.approx(0.92865, abs=5e-5)


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_what_is_no_share(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match="no share"):
        wilson(correct, total)


@pytest.mark.parametrize(
    ("wins", "losses", "p_value"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (6, 0, 2 / 64),
        (1, 9, 2 * (1 + 10) / 1024),
        (9, 1, 2 * (1 + 10) / 1024),
    ],
)
def test_mcnemar_is_the_exact_two_sided_binomial(wins: int, losses: int, p_value: float) -> None:
    assert mcnemar(wins, losses) == pytest.approx(p_value, rel=1e-12)


def test_mcnemar_does_not_overflow_on_a_large_test_set() -> None:
    # 10,000 pairs, four standard deviations from even: the normal approximation is good to a few per cent here.
    assert mcnemar(5_200, 4_800) == pytest.approx(6.6e-5, rel=0.05)


def test_the_interval_of_a_mean_agrees_with_the_standard_error_and_is_repeatable() -> None:
    values = dict(enumerate(np.random.default_rng(3).normal(10.0, 2.0, size=400)))
    interval = mean_over_seeds([values])
    assert interval.value == pytest.approx(np.mean(list(values.values())))
    assert interval.half_width == pytest.approx(1.96 * np.std(list(values.values())) / 20, rel=0.05)
    assert mean_over_seeds([values]) == interval


def test_one_sample_alone_gives_no_width_and_no_seed_is_an_error() -> None:
    assert mean_over_seeds([{0: 0.25}]).half_width == 0.0
    with pytest.raises(ValueError, match="same seeds"):
        mean_over_seeds([])


def test_the_paired_interval_has_the_width_of_the_paired_standard_error() -> None:
    # 300 wins, 200 losses of 5,000: var of the difference = (p10 + p01 - (p10 - p01)^2) / n.
    a = outcomes(*([1] * 300 + [0] * 200 + [1] * 4_500))
    b = outcomes(*([0] * 300 + [1] * 200 + [1] * 4_500))
    result = compare([a], [b])
    assert (result.wins, result.losses, result.samples) == (300, 200, 5_000)
    assert result.difference.value == pytest.approx(0.02)
    expected = 1.96 * np.sqrt((0.06 + 0.04 - 0.02**2) / 5_000)
    assert result.difference.half_width == pytest.approx(expected, rel=0.05)
    assert not result.within_noise
    assert result.p_value == pytest.approx(mcnemar(300, 200))


def test_pairing_finds_a_difference_that_two_separate_intervals_would_hide() -> None:
    # 5 points apart, and never a sample lost: the Wilson intervals overlap, the paired interval excludes zero.
    a, b = outcomes(*([1] * 110 + [0] * 90)), outcomes(*([1] * 100 + [0] * 100))
    assert wilson(110, 200).low < wilson(100, 200).high
    result = compare([a], [b])
    assert not result.within_noise
    assert result.ratio is not None
    assert result.ratio.value == pytest.approx(1.1)
    assert result.ratio.low > 1.0


def test_equal_systems_are_within_noise_even_when_no_sample_differs() -> None:
    same = outcomes(1, 0, 1, 1)
    result = compare([same], [same])
    assert result.within_noise
    assert result.difference.half_width == 0.0
    assert result.p_value == 1.0


def test_four_wins_without_a_loss_are_too_few_to_call() -> None:
    result = compare([outcomes(*([1] * 500))], [outcomes(*([0] * 4 + [1] * 496))])
    assert result.difference.low > 0
    assert result.p_value == pytest.approx(0.125)
    assert result.within_noise


def test_seeds_that_disagree_widen_the_interval_beyond_that_of_the_samples() -> None:
    rng = np.random.default_rng(0)
    b = [dict(enumerate(rng.random(400) < 0.5)) for _ in range(3)]
    # The first system gains 20, 0 and -20 points in the three seeds: no honest test calls that a gain.
    a = [dict(enumerate(rng.random(400) < share)) for share in (0.7, 0.5, 0.3)]
    result = compare(a, b)
    assert result.difference.half_width > 0.1
    assert result.within_noise
    assert result.p_value > 0.05


def test_a_sample_repeated_over_seeds_is_not_new_evidence() -> None:
    a, b = outcomes(*([1] * 60 + [0] * 40)), outcomes(*([1] * 50 + [0] * 50))
    one, four = compare([a], [b]), compare([a] * 4, [b] * 4)
    assert four.difference.half_width == pytest.approx(one.difference.half_width, rel=0.1)


def test_only_shared_samples_count_and_none_shared_is_an_error() -> None:
    result = compare([{1: True, 2: False, 3: True}], [{2: False, 3: False, 9: True}])
    assert (result.samples, result.first, result.second) == (2, 0.5, 0.0)
    assert result.ratio is None
    with pytest.raises(ValueError, match="no sample in common"):
        compare([{1: True}], [{2: True}])
    with pytest.raises(ValueError, match="same seeds"):
        compare([{1: True}], [])
