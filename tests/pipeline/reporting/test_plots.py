"""Figures say what the groups say: read back from the SVG, whose text is text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.reporting.groups import Group
from pipeline.reporting.plots import pareto_figure, quality_figure, write_plots
from pipeline.statistics import wilson


def group(teacher: str, ratio: float, method: str, right: int, tpot: float | None = 0.001, variant: str = "") -> Group:
    member = {"seed": 0, "tpot_s": tpot, "perplexity": 1.5 + ratio, "ratio_effective": ratio, "identity": "i"}
    return Group(teacher, ratio, variant, method, (member,), wilson(right, 200))


SWEEP = [
    group("small", 0.0, "full", 150, 0.004),
    group("small", 0.25, "overfill", 148, 0.003),
    group("small", 0.25, "pruned", 130, 0.0029),
    group("small", 0.5, "overfill", 140, 0.002),
    group("small", 0.5, "pruned", 90, 0.0019),
]


def test_every_figure_is_written_as_png_and_svg_and_two_runs_agree_to_the_byte(tmp_path: Path) -> None:
    first, second = write_plots(SWEEP, tmp_path / "a"), write_plots(SWEEP, tmp_path / "b")
    assert [path.name for path in first] == ["pareto.png", "pareto.svg", "quality.png", "quality.svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_the_pareto_figure_names_axes_teacher_methods_and_ratios(tmp_path: Path) -> None:
    write_plots(SWEEP, tmp_path)
    texts = re.findall(r">([^<>]+)</text>", (tmp_path / "pareto.svg").read_text())
    for text in ("time per output token (ms)", "exact match (%)", "small", "OverFill", "pruned only", "Pareto front"):
        assert text in texts
    assert {"0.25", "0.5"} <= set(texts)
    assert "from scratch" not in texts


def test_points_lie_where_the_numbers_are_and_the_front_leaves_out_the_beaten() -> None:
    figure = pareto_figure([*SWEEP, group("small", 0.5, "scratch", 40, 0.0021)])
    axes = figure.axes[0]
    points = [tuple(line.get_xydata()[0]) for line in axes.lines if len(line.get_xydata()) == 1]
    assert (2.0, 70.0) in [tuple(map(float, point)) for point in points]
    stairs = next(line for line in axes.lines if line.get_drawstyle() == "steps-post")
    assert [float(x) for x in stairs.get_xdata()] == [1.9, 2.0, 3.0, 4.0]
    assert [float(y) for y in stairs.get_ydata()] == [45.0, 70.0, 74.0, 75.0]


def test_teachers_are_told_apart_by_colour_and_methods_by_marker() -> None:
    figure = pareto_figure([*SWEEP, group("large", 0.5, "overfill", 180, 0.005)])
    points = [line for line in figure.axes[0].lines if len(line.get_xydata()) == 1]
    by_teacher = {(float(p.get_xydata()[0][0]), p.get_marker()): p.get_color() for p in points}
    assert by_teacher[2.0, "o"] == by_teacher[1.9, "s"] == by_teacher[4.0, "*"]
    assert by_teacher[5.0, "o"] != by_teacher[2.0, "o"]


def test_the_quality_figure_has_a_line_per_method_by_rising_ratio() -> None:
    left, right = quality_figure(list(reversed(SWEEP))).axes
    lines = [list(map(float, line.get_ydata())) for line in left.lines if line.get_marker() == "o"]
    assert lines == [[74.0, 70.0]]
    levels = [line for line in right.lines if line.get_linestyle() == ":"]
    assert [float(line.get_ydata()[0]) for line in levels] == [1.5]


def test_what_has_no_numbers_is_not_drawn(tmp_path: Path) -> None:
    unmeasured = Group("small", 0.5, "", "overfill", ({"seed": 0, "tpot_s": None},), None)
    assert write_plots([unmeasured], tmp_path) == []
    untimed = [path.name for path in write_plots([group("small", 0.5, "overfill", 9, tpot=None)], tmp_path)]
    assert untimed == ["quality.png", "quality.svg"]


@pytest.mark.filterwarnings("error")
def test_a_sweep_of_one_cell_draws_without_a_warning(tmp_path: Path) -> None:
    assert len(write_plots([group("small", 0.5, "overfill", 200)], tmp_path)) == 4
