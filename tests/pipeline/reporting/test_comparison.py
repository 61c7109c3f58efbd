"""Systems against each other over seeds and tasks: against closed forms, scipy's tests, and coverage by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pipeline.reporting.comparison import compare, compare_over_tasks, relative_improvement
from pipeline.reporting.resampling import average_over_tasks, mean_over_seeds
from pipeline.statistics import bootstrap_p, mcnemar, sign_flip, wilson


def scores(values) -> dict[int, float]:
    return {sample: float(value) for sample, value in enumerate(values)}


@pytest.mark.parametrize(("wins", "losses"), [(12, 3), (40, 61), (7, 7), (1, 0)])
def test_mcnemar_is_scipys_binomial_test(wins: int, losses: int) -> None:
    assert mcnemar(wins, losses) == pytest.approx(stats.binomtest(wins, wins + losses).pvalue, rel=1e-9)


@pytest.mark.parametrize(("correct", "total"), [(7, 50), (300, 1319), (0, 9), (9, 9)])
def test_wilson_is_scipys(correct: int, total: int) -> None:
    theirs = stats.binomtest(correct, total).proportion_ci(method="wilson")
    ours = wilson(correct, total)
    assert (ours.low, ours.high) == (pytest.approx(theirs.low), pytest.approx(theirs.high))


def test_the_bootstrap_is_scipys_percentile_bootstrap() -> None:
    values = np.random.default_rng(1).gamma(2.0, size=300)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=2).confidence_interval
    ours = mean_over_seeds([scores(values)])
    assert ours.low == pytest.approx(theirs.low, rel=0.01)
    assert ours.high == pytest.approx(theirs.high, rel=0.01)


def test_tossed_signs_of_right_and_wrong_are_mcnemars_test() -> None:
    differences = np.array([1.0] * 14 + [-1.0] * 4 + [0.0] * 80)
    assert sign_flip(differences) == pytest.approx(mcnemar(14, 4), abs=0.006)
    assert sign_flip(np.zeros(5)) == 1.0


def test_tossed_signs_of_scores_are_scipys_permutation_test() -> None:
    differences = np.random.default_rng(0).normal(0.4, 1.0, size=25)
    theirs = stats.permutation_test(
        (differences, np.zeros(25)), lambda a, b: np.sum(a - b), permutation_type="samples", n_resamples=20_000, rng=3
    ).pvalue
    assert sign_flip(differences) == pytest.approx(theirs, abs=0.01)


def test_a_bootstrap_p_agrees_with_its_interval() -> None:
    drawn = np.linspace(-0.1, 0.9, 10_000)
    assert bootstrap_p(drawn) == pytest.approx(0.2, abs=0.001)
    assert bootstrap_p(drawn + 1) == pytest.approx(2 / 10_001)


def test_the_interval_over_seeds_and_samples_covers_the_truth() -> None:
    # Crossed random effects: students differ by seed (sd 0.05), samples by difficulty. 95 % are promised; 200 sweeps of
    # three seeds tell 0.90 from 0.60, which is what the samples alone would give.
    rng = np.random.default_rng(11)
    covered = 0
    for _ in range(200):
        difficulty = rng.normal(0, 0.25, size=300)
        seeds = 0.5 + rng.normal(0, 0.05, size=3)
        values = [scores(seed + difficulty + rng.normal(0, 0.1, size=300)) for seed in seeds]
        covered += mean_over_seeds(values, resamples=300).contains(0.5)
    assert covered >= 165


def test_two_seeds_give_the_variance_of_two_seeds() -> None:
    # Seeds at 0.4 and 0.6 on samples that never vary: the standard error of their mean is 0.1; a bootstrap that draws
    # both seeds would have 0.1 / sqrt(2).
    interval = mean_over_seeds([scores([0.4] * 50), scores([0.6] * 50)])
    assert (interval.low, interval.high) == (pytest.approx(0.4), pytest.approx(0.6))


def test_scores_that_are_no_yes_or_no_are_compared_too() -> None:
    rng = np.random.default_rng(4)
    base = rng.random(200)
    result = compare([scores(base + 0.1)], [scores(base + rng.normal(0, 0.05, size=200))])
    assert result.difference.value == pytest.approx(0.1, abs=0.01)
    assert result.difference.half_width == pytest.approx(1.96 * 0.05 / np.sqrt(200), rel=0.15)
    assert result.p_value < 0.001
    assert not result.within_noise


def test_several_seeds_have_a_p_and_agreeing_ones_a_small_one() -> None:
    rng = np.random.default_rng(9)
    better = [scores(rng.random(300) < 0.6) for _ in range(3)]
    worse = [scores(rng.random(300) < 0.4) for _ in range(3)]
    result = compare(better, worse)
    assert result.p_value < 0.01
    assert not result.within_noise


def test_tasks_count_the_same_whatever_their_size() -> None:
    tasks = [
        ([scores([1] * 90 + [0] * 10)], [scores([1] * 60 + [0] * 40)]),
        ([scores([1, 1, 0, 0])], [scores([1, 0, 0, 0])]),
    ]
    result = compare_over_tasks(tasks)
    assert (result.tasks, result.samples) == (2, 104)
    assert result.difference.value == pytest.approx((0.3 + 0.25) / 2)
    assert result.share is not None
    assert result.share.value == pytest.approx((0.9 + 0.5) / (0.6 + 0.25))
    assert average_over_tasks([first for first, _ in tasks]).value == pytest.approx((0.9 + 0.5) / 2)


def test_the_relative_improvement_is_the_mean_of_the_tasks_ratios() -> None:
    gsm = ([scores([1] * 60 + [0] * 40)], [scores([1] * 30 + [0] * 70)])
    arc = ([scores([1] * 75 + [0] * 25)], [scores([1] * 50 + [0] * 50)])
    found = relative_improvement([{"gsm": gsm, "arc": arc}])
    assert found is not None
    assert found.relative.value == pytest.approx((1.0 + 0.5) / 2)
    assert found.relative.low < 0.75 < found.relative.high
    assert (found.tasks, found.configurations) == (2, 1)
    assert compare_over_tasks([gsm, arc]).ratio is not None
    assert compare_over_tasks([gsm, arc]).ratio.value == pytest.approx(1.75)  # type: ignore[union-attr]


def test_a_task_that_pruned_only_fails_altogether_has_no_ratio_and_is_not_counted() -> None:
    known = ([scores([1, 1, 1, 1] * 10)], [scores([1, 1, 0, 1] * 10)])
    hopeless = ([scores([1, 0] * 10)], [scores([0, 0] * 10)])
    found = relative_improvement([{"a": known, "b": hopeless}])
    assert found is not None
    assert found.relative.value == pytest.approx(1 / 3)
    assert (found.tasks, found.configurations) == (1, 1)
    assert relative_improvement([{"b": hopeless}]) is None
    assert relative_improvement([]) is None


def test_configurations_with_other_numbers_of_seeds_are_averaged_together() -> None:
    one = ([scores([1, 1, 1, 0] * 20)], [scores([1, 1, 0, 0] * 20)])
    two = ([scores([1, 1, 1, 0] * 20)] * 2, [scores([1, 0, 0, 0] * 20), scores([1, 1, 0, 0] * 20)])
    found = relative_improvement([{"t": one}, {"t": two}])
    assert found is not None
    assert found.relative.value == pytest.approx((0.5 + 1.0) / 2)
    assert found.configurations == 2
