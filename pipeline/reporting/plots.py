"""Two figures of a sweep: accuracy over time per output token with its Pareto front; quality over the pruning ratio.

One colour per full model (teacher), one marker per method, the ratio as label; bars are 95 % intervals. Matplotlib is
imported when a figure is drawn, with the Agg backend, so that no display is needed. PNG for reading, SVG for papers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.reporting.advice import value_of
from pipeline.reporting.groups import Group
from pipeline.reporting.methods import LOOKS
from pipeline.reporting.pareto import front, key, standings
from pipeline.reporting.wording import quality_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURES = ("pareto", "quality")
"""Names of the files."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
"""Okabe and Ito's palette, told apart also by colour-blind readers."""
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "axes.edgecolor": "#666666",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "svg.fonttype": "none",
    "svg.hashsalt": "overfill",
}
GREY = "#555555"
FRONT = "#B8B8B8"
LEGEND: dict[str, Any] = {"ncols": 5, "frameon": False, "fontsize": 9, "columnspacing": 1.4, "handletextpad": 0.5}


def write_plots(found: Sequence[Group], folder: Path) -> list[Path]:
    """Draw every figure that the groups have numbers for; returns the files, each figure as .png and .svg."""
    figures: dict[str, Callable[[Sequence[Group]], Figure]] = {}
    if any(group.quality and group.mean("tpot_s") for group in found):
        figures["pareto"] = pareto_figure
    if any(group.quality and group.method != "full" for group in found):
        figures["quality"] = quality_figure
    written: list[Path] = []
    folder.mkdir(parents=True, exist_ok=True)
    with _style():
        for name, draw in figures.items():
            figure = draw(found)
            for suffix in (".png", ".svg"):
                path = folder / (name + suffix)
                # No date in the file: the same numbers give the same bytes.
                figure.savefig(path, dpi=200, metadata={"Date": None} if suffix == ".svg" else None)
                written.append(path)
    return written


def pareto_figure(found: Sequence[Group]) -> Figure:
    """Quality over TPOT; up and to the left is better. The front runs over all teachers and methods; what it leaves
    behind is faded."""
    figure, axes = _canvas(6.4, 4.4)
    points = [(tpot * 1000, group) for group in found if group.quality and (tpot := group.mean("tpot_s"))]
    colours = _colours(found)
    places = standings(found, "tpot_s")
    for tpot, group in points:
        _draw_point(axes, tpot, group, colours[group.teacher], faded=places[key(group)].dominated_by is not None)
    for conditions in dict.fromkeys(group.conditions for _, group in points):
        _draw_front(axes, [(tpot, value_of(group)) for tpot, group in points if group.conditions == conditions])
    _label_points(axes, points)
    axes.text(0.995, 0.02, "numbers: pruning ratio", transform=axes.transAxes, ha="right", fontsize=8, color=GREY)
    axes.set_xlabel("time per output token (ms)")
    axes.set_ylabel(f"{quality_name(found[0])} (%)")
    axes.margins(x=0.08, y=0.1)
    _legends(figure, found, colours, lines=False)
    return figure


def _draw_front(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    corners = [points[index] for index in front(points)]
    steps: dict[str, Any] = {"where": "post", "color": FRONT, "linewidth": 1.4, "zorder": 1}
    axes.step([tpot for tpot, _ in corners], [100 * share for _, share in corners], **steps)


def quality_figure(found: Sequence[Group]) -> Figure:
    """Quality and response perplexity over the share of parameters removed, one panel each."""
    figure, (left, right) = _canvas(8.6, 3.8, columns=2)
    colours = _colours(found)
    for group in (group for group in found if group.method == "full"):
        _draw_level(left, right, group, colours[group.teacher])
    for teacher, method, line in _lines(found):
        style: dict[str, Any] = {
            "color": colours[teacher],
            "marker": LOOKS[method].marker,
            "linestyle": LOOKS[method].line,
        }
        _draw_line(left, right, line, style)
    for axes in (left, right):
        axes.set_xlabel("parameters removed (%)")
        axes.margins(x=0.06, y=0.1)
    left.set_ylabel(f"{quality_name(found[0])} (%)")
    right.set_ylabel("perplexity of the response")
    _legends(figure, found, colours, lines=True)
    return figure


def _canvas(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def _colours(found: Sequence[Group]) -> dict[str, str]:
    teachers = list(dict.fromkeys(group.teacher for group in found))
    return {teacher: COLOURS[index % len(COLOURS)] for index, teacher in enumerate(teachers)}


def _draw_point(axes: Axes, tpot: float, group: Group, colour: str, faded: bool) -> None:
    share = group.quality
    assert share is not None
    value = 100 * share.value
    axes.errorbar(
        tpot,
        value,
        yerr=[[value - 100 * share.low], [100 * share.high - value]],
        linestyle="",
        marker=LOOKS[group.method].marker,
        markersize=13 if group.method == "full" else 7.5,
        color=colour,
        alpha=0.45 if faded else 1.0,
        markeredgecolor="white",
        markeredgewidth=0.8,
        elinewidth=1,
        ecolor=colour + "80",
        capsize=2,
        zorder=3,
    )


def _label_points(axes: Axes, points: Sequence[tuple[float, Group]]) -> None:
    for tpot, group in points:
        if group.method == "full" or group.quality is None or _has_labelled_twin(tpot, group, points):
            continue
        axes.annotate(
            " ".join(filter(None, [f"{group.ratio:g}" if group.is_pruned else "", group.variant])),
            (tpot, 100 * group.quality.value),
            xytext=(7, 4),
            textcoords="offset points",
            fontsize=8,
            color=GREY,
        )


def _has_labelled_twin(tpot: float, group: Group, points: Sequence[tuple[float, Group]]) -> bool:
    """Whether another method has the same label straight above: two would only cover each other."""
    return any(
        (other.teacher, other.ratio, other.variant) == (group.teacher, group.ratio, group.variant)
        and abs(place / tpot - 1) < 0.1
        and value_of(other) > value_of(group)
        for place, other in points
    )


def _lines(found: Sequence[Group]) -> Iterator[tuple[str, str, list[Group]]]:
    """(teacher, method, groups by rising share removed) for every line; variants are lines of their own."""
    lines: dict[tuple[str, str, str], list[Group]] = {}
    for group in found:
        if group.method != "full":
            lines.setdefault((group.teacher, group.method, group.variant), []).append(group)
    for (teacher, method, _), line in lines.items():
        yield teacher, method, sorted(line, key=lambda group: group.mean("ratio_effective") or group.ratio)


def _removed(group: Group) -> float:
    effective = group.mean("ratio_effective")
    return 100 * (group.ratio if effective is None else effective) + LOOKS[group.method].dodge


def _draw_line(left: Axes, right: Axes, line: Sequence[Group], style: dict[str, Any]) -> None:
    edge = {"markersize": 6.5, "markeredgecolor": "white", "markeredgewidth": 0.8, "linewidth": 1.6}
    known = [(group, group.quality) for group in line if group.quality is not None]
    values = [100 * share.value for _, share in known]
    bars = [[100 * (s.value - s.low) for _, s in known], [100 * (s.high - s.value) for _, s in known]]
    thin = {"capsize": 2, "elinewidth": 1, "ecolor": style["color"] + "80"}
    left.errorbar([_removed(group) for group, _ in known], values, yerr=bars, **thin, **style, **edge)
    rated = [(group, perplexity) for group in line if (perplexity := group.mean("perplexity")) is not None]
    right.plot([_removed(group) for group, _ in rated], [value for _, value in rated], **style, **edge)


def _draw_level(left: Axes, right: Axes, full: Group, colour: str) -> None:
    if full.quality is not None:
        left.axhline(100 * full.quality.value, color=colour, linestyle=LOOKS["full"].line, linewidth=1.4)
    if (perplexity := full.mean("perplexity")) is not None:
        right.axhline(perplexity, color=colour, linestyle=LOOKS["full"].line, linewidth=1.4)


def _legends(figure: Figure, found: Sequence[Group], colours: dict[str, str], lines: bool) -> None:
    """Full models on top, as the figure's title; methods below. `lines` shows each method's line too."""
    from matplotlib.lines import Line2D

    if len(colours) == 1:
        figure.suptitle(next(iter(colours)), x=0.015, ha="left", fontsize=11, fontweight="bold")
    else:
        names = [Line2D([], [], marker="o", linestyle="", color=colour) for colour in colours.values()]
        figure.legend(names, list(colours), loc="outside upper left", **LEGEND)
    single = next(iter(colours.values())) if len(colours) == 1 else GREY
    methods = [method for method in LOOKS if any(group.method == method for group in found)]
    handles = [_method_handle(method, single, lines) for method in methods]
    if not lines:
        handles.append(Line2D([], [], color=FRONT, linewidth=1.4, label="Pareto front"))
    figure.legend(handles=handles, loc="outside lower center", **LEGEND)


def _method_handle(method: str, colour: str, lines: bool) -> Any:
    from matplotlib.lines import Line2D

    return Line2D(
        [],
        [],
        color=colour,
        marker="" if lines and method == "full" else LOOKS[method].marker,
        linestyle=LOOKS[method].line if lines else "",
        markersize=11 if method == "full" else 7,
        markeredgecolor="white",
        markeredgewidth=0.5,
        label=LOOKS[method].name,
    )
