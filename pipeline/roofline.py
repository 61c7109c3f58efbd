"""The roofline of decoding: tokens per second over bytes per token, under the line that memory allows.

Every point is a system at a grid point; a point on the line reads memory as fast as this machine can. Systems whose
steps have no fixed number of bytes are levels. Matplotlib is imported when the figure is drawn, without a display.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from overfill.workload import SYSTEMS
from pipeline.reporting.plots import COLOURS, GREY, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""One per grid point, in turn."""
SYSTEM_COLOURS: dict[str, str] = dict(zip(SYSTEMS, (*COLOURS, "#000000"), strict=True))


def write_roofline(rows: Sequence[Row], path: Path) -> Path:
    """Draw the figure into `path`; its ending says the format."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = roofline_figure(rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        # No date in the file: the same numbers give the same bytes.
        figure.savefig(path, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def bandwidth(rows: Sequence[Row]) -> float | None:
    """Bytes per second that were measured beside the systems, the median; None where no step had a bound."""
    speeds = [row["bound_bytes_per_s"] for row in rows if row["bound_bytes_per_s"]]
    return median(speeds) if speeds else None


def roofline_figure(rows: Sequence[Row]) -> Figure:
    """Steps per second (1 / TPOT: tokens per second of one row) over bytes per step, both logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as NewFigure
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

    figure = NewFigure(figsize=(6.8, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    timed = [row for row in rows if row["tpot_s"]]
    points = list(dict.fromkeys(_point(row) for row in timed))
    _draw_bound(axes, timed)
    for row in timed:
        colour = SYSTEM_COLOURS[row["system"]]
        if row["bytes_per_token"] is None:
            axes.axhline(1 / row["tpot_s"], color=colour, linestyle=":", linewidth=1.4, zorder=2)
            continue
        marker = MARKERS[points.index(_point(row)) % len(MARKERS)]
        axes.plot(row["bytes_per_token"], 1 / row["tpot_s"], marker=marker, color=colour, markersize=8, zorder=3)
    for axis, form in ((axes.xaxis, EngFormatter("B")), (axes.yaxis, StrMethodFormatter("{x:g}"))):
        # 1, 2 and 5 of every decade: the labels of all nine would run into one another.
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(form)
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("bytes that a decode step must read")
    axes.set_ylabel("tokens per second and row (1 / TPOT)")
    _legend(figure, timed, points)
    return figure


def _draw_bound(axes: Axes, rows: Sequence[Row]) -> None:
    speed = bandwidth(rows)
    if speed is None:
        return
    sizes = [row["bytes_per_token"] for row in rows if row["bytes_per_token"]]
    ends = [min(sizes) / 1.6, max(sizes) * 1.6]
    axes.plot(ends, [speed / size for size in ends], color=GREY, linewidth=1.4, zorder=1)
    axes.annotate(
        f"memory, {speed / 1e9:.3g} GB/s",
        (ends[0], speed / ends[0]),
        xytext=(6, 0),
        textcoords="offset points",
        fontsize=8,
        color=GREY,
    )


def _legend(figure: Figure, rows: Sequence[Row], points: Sequence[tuple[int, int, int]]) -> None:
    from matplotlib.lines import Line2D

    levels = {row["system"] for row in rows if row["bytes_per_token"] is None}
    names = [name for name in SYSTEMS if any(row["system"] == name for row in rows)]
    handles = [
        Line2D([], [], color=SYSTEM_COLOURS[name], label=name, linestyle=":")
        if name in levels
        else Line2D([], [], color=SYSTEM_COLOURS[name], label=name, linestyle="", marker="o", markersize=7)
        for name in names
    ]
    handles += [
        Line2D([], [], color=GREY, linestyle="", marker=MARKERS[index % len(MARKERS)], label=f"{b} x {p} + {o} tokens")
        for index, (b, p, o) in enumerate(points)
        if len(points) > 1
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)


def _point(row: Row) -> tuple[int, int, int]:
    return row["batch"], row["prompt"], row["output"]
