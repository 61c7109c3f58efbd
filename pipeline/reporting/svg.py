"""Charts as inline SVG: points with bars, lines, stairs. Every mark carries its text, so that a page needs no data twice.

Colours, dashes and what a click hides are the page's style sheet and script; without either a chart is whole, with the
text of a mark as its title. Coordinates are those of the view box, rounded: the same numbers give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

WIDTH, HEIGHT = 560, 360
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 44
LABEL_WIDTH, LABEL_HEIGHT = 6.2, 12
"""Of a letter, to keep labels apart."""
SHAPES = {
    "o": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0",
    "s": "M-4.6-4.6h9.2v9.2h-9.2z",
    "^": "M0-6 5.6 4.6h-11.2z",
    "v": "M0 6 5.6-4.6h-11.2z",
    "<": "M-6 0 4.6 5.6v-11.2z",
    "D": "M0-6.2 6.2 0 0 6.2-6.2 0z",
    "*": "M0-8 2-2.6 7.6-2.5 3.2 1 4.7 6.5 0 3.3-4.7 6.5-3.2 1-7.6-2.5-2-2.6z",
    "P": "M-2-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
    "X": "M-6-3.2-3.2-6 0-2.8 3.2-6 6-3.2 2.8 0 6 3.2 3.2 6 0 2.8-3.2 6-6 3.2-2.8 0z",
}
"""Paths of matplotlib's markers of these names."""


@dataclass(frozen=True)
class Mark:
    """A point with a bar, of one method and teacher."""

    x: float
    y: float
    low: float
    high: float
    method: str
    teacher: str
    shape: str
    tip: str
    """Lines of text that a pointer brings up."""
    label: str = ""
    """Beside the point, where there is room."""
    faded: bool = False


@dataclass(frozen=True)
class Line:
    """A line through points, of one method and teacher."""

    points: tuple[tuple[float, float], ...]
    method: str
    teacher: str
    kind: str = "path"
    """What the style sheet knows it by: path, curve, level, fit."""
    tip: str = ""


@dataclass(frozen=True)
class Chart:
    """What one chart shows."""

    title: str
    x_label: str
    y_label: str
    marks: tuple[Mark, ...] = ()
    lines: tuple[Line, ...] = ()
    fronts: tuple[tuple[tuple[float, float], ...], ...] = ()
    """Corners of stairs, by rising x."""
    x_format: Callable[[float], str] = field(default=lambda value: f"{value:g}")
    y_format: Callable[[float], str] = field(default=lambda value: f"{value:g}")
    log_x: bool = False
    log_y: bool = False
    note: str = ""

    def __html__(self) -> str:
        """For a template: the drawn chart."""
        return draw(self)


@dataclass(frozen=True)
class Axis:
    """Numbers to coordinates."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        """Coordinate of a value."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    @property
    def ticks(self) -> list[float]:
        """Round values inside the axis."""
        return log_ticks(self.low, self.high) if self.log else even_ticks(self.low, self.high)


def even_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in [low, high], `about` so many."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten in [low, high]; powers alone over more than three of them; even ones over few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if high / low > 1000 else (1, 2, 5)
    found = [factor * 10.0**power for power in powers for factor in factors]
    found = [value for value in found if low * 0.999 <= value <= high * 1.001]
    return found if len(found) > 2 else even_ticks(low, high)


def draw(chart: Chart) -> Markup:
    """The chart as one <svg>; nothing where it has no point."""
    xs = [mark.x for mark in chart.marks] + [x for line in chart.lines for x, _ in line.points]
    ys = [value for mark in chart.marks for value in (mark.y, mark.low, mark.high)]
    ys += [y for line in chart.lines for _, y in line.points]
    if not xs:
        return Markup()
    x = _axis(xs, LEFT, WIDTH - RIGHT, chart.log_x)
    y = _axis(ys, HEIGHT - BOTTOM, TOP, chart.log_y)
    parts = [_frame(chart, x, y), *(_stairs(corners, x, y) for corners in chart.fronts)]
    parts += [_line(line, x, y) for line in chart.lines]
    parts += [_mark(mark, x, y) for mark in sorted(chart.marks, key=lambda mark: not mark.faded)]
    parts += _labels(chart.marks, x, y)
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}" xmlns="http://www.w3.org/2000/svg">{}</svg>'
    ).format(WIDTH, HEIGHT, chart.title, Markup("").join(parts))


def _axis(values: Sequence[float], start: float, end: float, log: bool) -> Axis:
    """From the smallest to the largest value and a little further."""
    low, high = min(values), max(values)
    if log:
        margin = max((high / low) ** 0.06, 1.05)
        return Axis(low / margin, high * margin, start, end, log)
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return Axis(low - margin, high + margin, start, end, log)


def _frame(chart: Chart, x: Axis, y: Axis) -> Markup:
    line = Markup('<line class="grid" x1="{}" y1="{}" x2="{}" y2="{}"/>')
    text = Markup('<text class="tick" x="{}" y="{}" text-anchor="{}">{}</text>')
    parts = [line.format(LEFT, y(tick), WIDTH - RIGHT, y(tick)) for tick in y.ticks]
    parts += [text.format(LEFT - 7, y(tick) + 4, "end", chart.y_format(tick)) for tick in y.ticks]
    parts += [line.format(x(tick), HEIGHT - BOTTOM, x(tick), HEIGHT - BOTTOM + 4) for tick in x.ticks]
    parts += [text.format(x(tick), HEIGHT - BOTTOM + 17, "middle", chart.x_format(tick)) for tick in x.ticks]
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(Markup('<line class="base" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(
        LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM))  # fmt: skip
    parts.append(Markup('<text class="name" x="{}" y="{}" text-anchor="middle">{}</text>').format(
        (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, chart.x_label))  # fmt: skip
    parts.append(Markup('<text class="name" transform="translate(13 {}) rotate(-90)" text-anchor="middle">{}</text>').format(
        middle, chart.y_label))  # fmt: skip
    return Markup("").join(parts)


def _stairs(corners: Sequence[tuple[float, float]], x: Axis, y: Axis) -> Markup:
    """Flat to the right of each corner, up at the next: what is below and to the right is dominated."""
    path = f"M{x(corners[0][0])} {y(corners[0][1])}" + "".join(f"H{x(a)}V{y(b)}" for a, b in corners[1:])
    return Markup('<path class="front" d="{}H{}"/>').format(path, WIDTH - RIGHT)


def _of(method: str, teacher: str) -> Markup:
    return Markup('data-method="{}" data-teacher="{}"').format(method, teacher)


def _line(line: Line, x: Axis, y: Axis) -> Markup:
    path = "M" + "L".join(f"{x(a)} {y(b)}" for a, b in line.points)
    title = Markup("<title>{}</title>").format(line.tip) if line.tip else Markup()
    return Markup('<path class="line {} m-{}" {} d="{}"{}>{}</path>').format(
        line.kind, line.method, _of(line.method, line.teacher), path, _tip(line.tip), title
    )


def _tip(text: str) -> Markup:
    return Markup(' data-tip="{}" tabindex="0"').format(text) if text else Markup()


def _mark(mark: Mark, x: Axis, y: Axis) -> Markup:
    across, up = x(mark.x), y(mark.y)
    bar = Markup('<path class="bar" d="M{} {}V{}"/>').format(across, y(mark.low), y(mark.high))
    return Markup(
        '<g class="mark m-{}{}" {}{}><title>{}</title>{}<path class="dot" transform="translate({} {})" d="{}"/></g>'
    ).format(
        mark.method, " faded" if mark.faded else "", _of(mark.method, mark.teacher), _tip(mark.tip), mark.tip,
        bar if mark.high > mark.low else Markup(), across, up, SHAPES[mark.shape],
    )  # fmt: skip


def _labels(marks: Sequence[Mark], x: Axis, y: Axis) -> list[Markup]:
    """Labels to the right of points, or to the left; one that would cover another label or point is left to its tip."""
    taken = [(x(mark.x) - 6, y(mark.y) - 6, x(mark.x) + 6, y(mark.y) + 6) for mark in marks]
    placed: list[Markup] = []
    for mark in marks:
        wide = LABEL_WIDTH * len(mark.label)
        for left, anchor in ((x(mark.x) + 9, "start"), (x(mark.x) - 9 - wide, "end")):
            box = (left, y(mark.y) - LABEL_HEIGHT - 1, left + wide, y(mark.y) - 1)
            if (
                mark.label
                and box[0] > LEFT
                and box[2] < WIDTH - RIGHT / 2
                and not any(_overlap(box, other) for other in taken)
            ):
                taken.append(box)
                placed.append(
                    Markup('<text class="label" {} x="{}" y="{}" text-anchor="{}">{}</text>').format(
                        _of(mark.method, mark.teacher),
                        round(left if anchor == "start" else left + wide, 1),
                        round(box[3] - 1, 1),
                        anchor,
                        mark.label,
                    )
                )
                break
    return placed


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
