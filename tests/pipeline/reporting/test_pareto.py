"""The front, budgets, and what they recommend."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overfill.errors import UserError
from pipeline.reporting.advice import within_budget
from pipeline.reporting.groups import Group
from pipeline.reporting.pareto import Budget, dominator, front, key, read_budget, standings
from pipeline.statistics import wilson

POINTS = st.lists(st.tuples(st.integers(0, 20).map(float), st.integers(0, 20).map(float)), max_size=40)


def dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] >= other[1]


def group(method: str, right: int, tpot: float, memory: float | None = None, device: str = "cpu") -> Group:
    member = {"seed": 0, "tpot_s": tpot, "peak_bytes": memory, "benchmark": {"device": device}, "identity": method}
    outcomes = {sample: float(sample < right) for sample in range(100)}
    return Group("t", 0.5, "", method, (member,), wilson(right, 100), scores={"exact_match": {0: outcomes}})


def test_the_front_keeps_only_what_nothing_else_beats() -> None:
    points = [(4.0, 0.9), (1.0, 0.5), (2.0, 0.4), (2.0, 0.8), (3.0, 0.8)]
    assert front(points) == [1, 3, 0]
    assert front([]) == []


@given(POINTS)
def test_no_point_of_the_front_is_dominated_and_every_other_one_has_a_dominator_on_it(points) -> None:
    kept = front(points)
    on_front = {points[index] for index in kept}
    assert not any(dominates(other, points[index]) for index in kept for other in points)
    for index, point in enumerate(points):
        found = dominator(point, points)
        assert (found is None) == (point in on_front), (index, kept)
        if found is not None:
            assert dominates(points[found], point)
            assert points[found] in on_front


@given(POINTS)
def test_the_front_rises_in_cost_and_in_quality(points) -> None:
    kept = [points[index] for index in front(points)]
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(kept))


def test_latencies_of_another_device_dominate_nothing() -> None:
    slow, fast = group("overfill", 50, 0.010), group("pruned", 90, 0.001, device="cuda")
    assert standings([slow, fast], "tpot_s")[key(slow)].dominated_by is None
    same = group("pruned", 90, 0.001)
    assert standings([slow, same], "tpot_s")[key(slow)].dominated_by is same


@pytest.mark.parametrize(
    ("text", "expected"),
    [("20ms", 0.020), (" 1.5 s ", 1.5), ("800us", 8e-4), ("800 µs", 8e-4), ("2e1MS", 0.020), (".5s", 0.5)],
)
def test_times_are_read_with_their_units(text: str, expected: float) -> None:
    assert read_budget(text, None).tpot_s == pytest.approx(expected)


@pytest.mark.parametrize(("text", "expected"), [("6GB", 6e9), ("6 GiB", 6 * 2**30), ("512mb", 512e6)])
def test_sizes_are_read_with_their_units(text: str, expected: float) -> None:
    assert read_budget(None, text).memory_bytes == pytest.approx(expected)


@pytest.mark.parametrize("text", ["20", "ms", "", "twenty ms", "20 minutes", "-3ms", "0ms", "1e999s", "20ms!"])
def test_what_is_no_time_is_refused_in_one_line_that_says_how(text: str) -> None:
    with pytest.raises(UserError, match=r"--max-tpot .*such as 20ms") as caught:
        read_budget(text, None)
    assert "\n" not in str(caught.value)


def test_no_limit_is_no_budget() -> None:
    assert not read_budget(None, None)
    assert read_budget("1s", None)


def test_within_a_budget_the_most_accurate_is_shipped_and_its_lead_is_tested() -> None:
    full, good, poor = group("full", 95, 0.004, 4e6), group("overfill", 90, 0.002, 5e6), group("pruned", 60, 0.001, 1e6)
    found = within_budget([full, good, poor], Budget(tpot_s=0.003))
    assert found.best is good
    assert found.runner_up is poor
    assert found.lead is not None
    assert found.lead.difference.value == pytest.approx(0.3)
    assert within_budget([full, good, poor], Budget(tpot_s=0.003, memory_bytes=2e6)).best is poor


def test_where_nothing_fits_the_closest_is_named() -> None:
    full, good = group("full", 95, 0.004, 4e6), group("overfill", 90, 0.002, 5e6)
    found = within_budget([full, good], Budget(tpot_s=0.001))
    assert (found.best, found.cheapest) == (None, good)
    assert within_budget([], Budget(tpot_s=0.001)).cheapest is None


def test_a_configuration_whose_cost_is_unknown_fits_no_budget() -> None:
    unknown = group("overfill", 90, 0.002, None)
    assert within_budget([unknown], Budget(memory_bytes=1e12)).best is None
