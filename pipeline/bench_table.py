"""What `overfill bench` prints for people: one table per grid point, and what was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from overfill.workload import SYSTEMS, Point, Refresh, unfit
from pipeline.planning import size

NOTHING = "–"
COLUMNS = ("system", "TTFT", "TPOT", "tok/s", "peak", "of bound", "vs full")


def print_point(rows: Sequence[Mapping[str, Any]], systems: Sequence[str], refresh: Refresh, console: Console) -> None:
    """Print the rows of one grid point; `systems` are those of the whole grid."""
    first = rows[0]
    point = Point(first["batch"], first["prompt"], first["output"], first["dtype"])
    console.print(f"batch {point.batch}, prompt {point.prompt}, output {point.output}", style="bold", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "system" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)
    for line in notes(rows, systems, point, refresh):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print()


def print_conditions(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print what holds for every table."""
    for line in conditions(rows):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One row as text, by `COLUMNS`."""
    return (
        row["system"],
        milliseconds(row["ttft_s"]),
        f"{milliseconds(row['tpot_s'])} {_spread(row['tpot_spread_s'])}",
        f"{row['tokens_per_s']:.1f}",
        NOTHING if row["peak_bytes"] is None else size(row["peak_bytes"]),
        NOTHING if row["bound_share"] is None else _share(row["bound_share"], row["bound_share_spread"]),
        NOTHING if row["speed_up"] is None else f"{row['speed_up']:.2f}x",
    )


def notes(rows: Sequence[Mapping[str, Any]], systems: Sequence[str], point: Point, refresh: Refresh) -> list[str]:
    """What the table does not hold: acceptance, speeds, compilation, and what was left out here and why."""
    lines = [
        f"{row['system']}: accepted {row['acceptance_rate']:.0%} of the drafts"
        for row in rows
        if row["acceptance_rate"] is not None
    ]
    speeds = [
        f"{row['system']} {row['step_bytes_per_s'] / 1e9:.3g} of {row['bound_bytes_per_s'] / 1e9:.3g}"
        for row in rows
        if row["bound_share"] is not None
    ]
    lines += [f"GB/s of the steps, of reading alone: {', '.join(speeds)}"] if speeds else []
    compiled = [f"{row['system']} {row['compile_s']:.1f} s" for row in rows if row["compile_s"]]
    lines += [f"compiled first: {', '.join(compiled)}"] if compiled else []
    reasons = [(name, unfit(name, point, refresh)) for name in SYSTEMS if name in systems]
    return lines + [f"{name} left out: {reason}" for name, reason in reasons if reason]


def conditions(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where all rows were measured, and what the columns mean."""
    first = rows[0]
    decoders = dict.fromkeys(row["decoder"] for row in rows if not row["system"].startswith("transformers-"))
    lines = [
        f"{first['model']}, {first['dtype']}, {first['device']} ({first['machine']}), threads: {first['threads']}"
        + (f", decoder: {', '.join(decoders)}" if decoders else ""),
        f"TTFT and TPOT: medians of {first['repeats']} repetitions, [lowest, highest]",
        "of bound: time to read from memory what a decode step must read, over that of the steps right beside the read;",
        "          median, [lowest, highest]",
        "vs full: TPOT of transformers-full over the system's",
    ]
    return lines + (
        ["peak: without copies of the weights that a compiled decoder packs"] if "compiled" in decoders else []
    )


def milliseconds(seconds: float) -> str:
    """Three digits: `1.23 ms`, `45.6 ms`, `1234 ms`."""
    value = 1000 * seconds
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} ms"


def _share(share: float, spread: Sequence[float]) -> str:
    low, high = (f"{100 * value:.0f}" for value in spread)
    return f"{share:.0%} [{low}, {high}]"


def _spread(spread: Sequence[float]) -> str:
    low, high = (milliseconds(value).removesuffix(" ms") for value in spread)
    return f"[{low}, {high}]"
