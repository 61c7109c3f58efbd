"""Axes and labels of the page's charts."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.reporting.methods import LOOKS
from pipeline.reporting.svg import HEIGHT, SHAPES, WIDTH, Axis, Chart, Line, Mark, draw, even_ticks, log_ticks


def mark(x: float, y: float, label: str = "") -> Mark:
    return Mark(x, y, y - 1, y + 1, "overfill", "t", "o", "tip", label)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 100, [0, 20, 40, 60, 80, 100]), (0.13, 0.61, [0.2, 0.3, 0.4, 0.5, 0.6]), (-3, 4, [-2, 0, 2, 4])],
)
def test_even_ticks_are_round_and_inside(low: float, high: float, expected: list[float]) -> None:
    assert even_ticks(low, high) == pytest.approx(expected)


def test_ticks_of_a_logarithmic_axis_are_ones_twos_and_fives() -> None:
    assert log_ticks(0.9, 11) == pytest.approx([1, 2, 5, 10])
    assert log_ticks(1, 1e5) == pytest.approx([1, 10, 100, 1e3, 1e4, 1e5])


@given(st.floats(1e-9, 1e9), st.floats(1.001, 1e6))
def test_every_axis_has_ticks_and_all_lie_inside(low: float, factor: float) -> None:
    for log in (False, True):
        axis = Axis(low, low * factor, 0, 100, log)
        assert axis.ticks
        assert all(-1 <= axis(tick) <= 101 for tick in axis.ticks)


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), min_size=1, max_size=20))
def test_whatever_is_drawn_lies_inside_the_chart(points: list[tuple[float, float]]) -> None:
    svg = ElementTree.fromstring(draw(Chart("c", "x", "y", tuple(mark(x, y) for x, y in points))))
    places = [node.get("transform", "")[10:-1].split() for node in svg.iter() if node.get("class") == "dot"]
    assert len(places) == len(points)
    assert all(0 <= float(x) <= WIDTH and 0 <= float(y) <= HEIGHT for x, y in places)


def test_labels_that_would_cover_each_other_are_left_to_their_tips() -> None:
    crowd = (*(mark(1 + place * 1e-4, 5, f"label {place}") for place in range(6)), mark(9, 9, "alone"))
    svg = draw(Chart("c", "x", "y", crowd))
    assert "alone" in svg
    assert 1 <= svg.count('class="label"') < 7


def test_a_chart_without_points_is_nothing() -> None:
    assert draw(Chart("c", "x", "y")) == ""


def test_names_are_escaped() -> None:
    line = Line(((0, 0), (1, 1)), "overfill", 'a"b<c', tip="<i>")
    svg = draw(Chart("<c>", "x", "y", lines=(line,)))
    assert (
        next(node for node in ElementTree.fromstring(svg).iter() if node.get("data-teacher")).get("data-teacher")
        == 'a"b<c'
    )


def test_every_method_has_a_shape_and_a_colour_of_its_own() -> None:
    assert {look.marker for look in LOOKS.values()} <= set(SHAPES)
    assert len({(look.marker, look.colour) for look in LOOKS.values()}) == len(LOOKS)
    assert len({look.colour for look in LOOKS.values()}) == len(LOOKS)
