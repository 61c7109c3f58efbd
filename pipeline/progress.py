"""Progress of a run on the terminal, from snapshots of the store: a thread in the driver looks once a second.

On a terminal: one line per running stage (steps, loss, tokens per second, time left) above a bar over all cells; what
ends scrolls away above them. Elsewhere (a log file, CI): plain lines, one when a stage starts or ends, and one per
running stage every half minute.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from overfill.errors import UserError
from pipeline.watch import CellView, Snapshot, StageView, Watch

if TYPE_CHECKING:
    from pipeline.store import Store
    from pipeline.sweep import Cell

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
QUIET_INTERVAL_S = 30.0
SHARE = 20
"""A look takes at most about one part in so many of the driver's time: with thousands of cells it takes a while."""
STYLES = {
    "done": "green",
    "running": "cyan",
    "failed": "bold red",
    "stopped": "yellow",
    "interrupted": "yellow",
    "waiting": "dim",
    "missing": "dim",
}
SILENT = "silent"
"""In place of `running`, where whoever builds a stage seems to be dead."""
NOTHING = "–"


class Progress:
    """Shows the cells' progress while it is entered; never raises into the run that it watches."""

    def __init__(self, store: Store, cells: Sequence[Cell], console: Console | None = None) -> None:
        self._watch = Watch(store, cells)
        self._console = console or Console(stderr=True)
        self._looked, self._end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._before: Snapshot | None = None
        self._spoken = time.monotonic()

    def __enter__(self) -> Progress:
        self._thread.start()
        self._looked.wait(timeout=10)  # what is there now is not news
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join(timeout=10)

    def waiting(self) -> int:
        """Cells that had not begun, or waited, when it last looked."""
        counts = self._before.counts if self._before is not None else {}
        return counts.get("waiting", 0) + counts.get("missing", 0)

    def _run(self) -> None:
        try:
            if self._console.is_terminal:
                with Live(console=self._console, refresh_per_second=2, transient=True) as live:
                    self._loop(live)
            else:
                self._loop(None)
        except Exception:  # a display that breaks must not take the run with it
            log.warning("the progress display ended early; `overfill status` still works", exc_info=True)
        finally:
            self._looked.set()

    def _loop(self, live: Live | None) -> None:
        last, pause = False, 0.0
        while not last:
            last = self._end.wait(pause)
            begun = time.monotonic()
            try:
                now = self._watch.snapshot()
            except (OSError, UserError) as error:  # a file server, or one artifact, that cannot be read at the moment
                log.debug("the store cannot be looked at: %s", error)
                self._looked.set()
                pause = INTERVAL_S
                continue
            for line in events(self._before, now):
                self._console.print(line, soft_wrap=True)
            if live is not None:
                live.update(live_view(now))
            elif time.monotonic() - self._spoken >= QUIET_INTERVAL_S:
                self._spoken = time.monotonic()
                for line in quiet_lines(now):
                    self._console.print(line, soft_wrap=True)
            self._before = now
            self._looked.set()
            pause = max(INTERVAL_S, SHARE * (time.monotonic() - begun))


def events(before: Snapshot | None, now: Snapshot) -> list[Text]:
    """What happened between two snapshots, one line each: stages that started, ended, failed or were stopped."""
    if before is None:
        done = sum(not stage.open for stage in now.stages.values())
        return [_line(now, "reused", f"{done} of {len(now.stages)} stages are in the store already")] if done else []
    lines: list[Text] = []
    known = before.stages
    for identity, stage in now.stages.items():
        state = known[identity].state
        if stage.state == state or stage.state in ("waiting", "missing"):
            continue
        lines.append(_line(now, stage.state, _event(stage, now)))
    return lines


def _line(now: Snapshot, state: str, text: str) -> Text:
    clock = time.strftime("%H:%M:%S", time.localtime(now.time))
    word = "started" if state == "running" else state
    return Text.assemble((f"{clock} ", "dim"), (f"{word:<11} ", STYLES.get(state, "")), text)


def _event(stage: StageView, now: Snapshot) -> str:
    parts = [stage.name, title(stage, now)]
    if stage.state == "done":
        parts += [f"in {duration(stage.seconds)}"] if stage.seconds is not None else []
        parts += [f"loss {stage.metrics['train/loss']:.4f}"] if "train/loss" in stage.metrics else []
    if stage.state in ("failed", "stopped", "interrupted") and stage.failure:
        parts.append(f"- {stage.failure}")
    if stage.state == "failed" and stage.log is not None:
        parts.append(f"(log: {stage.log})")
    return " ".join(parts)


def title(stage: StageView, now: Snapshot) -> str:
    """The cell that a stage belongs to, or the stage's own label where several cells share it."""
    owner = now.owners.get(stage.identity)
    return stage.label if owner is None else owner.label


def running_stages(now: Snapshot) -> list[str]:
    """What runs, in words: `distill small · 0.5 · overfill · seed 0 (step 40/600)`."""
    running = [stage for stage in now.stages.values() if stage.state == "running"]
    steps = [f" (step {stage.step}/{stage.steps})" if stage.steps else "" for stage in running]
    return [f"{stage.name} {title(stage, now)}{step}" for stage, step in zip(running, steps, strict=True)]


def live_view(now: Snapshot) -> Group:
    """The lines at the bottom of the terminal."""
    table = Table.grid(padding=(0, 1))
    for justify in ("left", "left", "left", "right", "right", "right", "right"):
        table.add_column(justify=justify, no_wrap=True)
    for stage in now.stages.values():
        if stage.state == "running":
            table.add_row(*_running_row(stage, now))
    return Group(table, _overall(now))


def _running_row(stage: StageView, now: Snapshot) -> list[Text | ProgressBar | str]:
    bar = ProgressBar(total=stage.steps or None, completed=stage.step, width=20, pulse=not stage.steps)
    return [
        Text(stage.name, style="cyan"),
        Text(_short(title(stage, now), 48)),
        bar,
        f"{stage.step}/{stage.steps}" if stage.steps else "",
        *_numbers(stage),
        f"{duration(stage.seconds_left)} left" if stage.seconds_left is not None else since(stage, now),
    ]


def _numbers(stage: StageView) -> list[str]:
    loss, speed = stage.metrics.get("train/loss"), stage.tokens_per_second
    return ["" if loss is None else f"loss {loss:.3f}", "" if speed is None else f"{count(speed)} tok/s"]


def _overall(now: Snapshot) -> Table:
    table = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=len(now.cells), completed=now.counts["done"], width=30)
    table.add_row("cells", bar, _overall_words(now))
    return table


def _overall_words(now: Snapshot) -> str:
    counts, left = now.counts, now.seconds_left
    words = [f"{counts['done']}/{len(now.cells)} done"]
    words += [f"{counts[state]} {state}" for state in ("running", "failed", "stopped", "interrupted") if counts[state]]
    if counts["done"] < len(now.cells) and left is not None and left > 0:
        words.append(f"about {duration(left)} left")
    return " · ".join(words)


def quiet_lines(now: Snapshot) -> list[Text]:
    """One plain line per running stage, and one over all cells."""
    lines: list[Text] = []
    for stage in now.stages.values():
        if stage.state == "running":
            parts = [stage.name, title(stage, now)]
            parts += [f"step {stage.step}/{stage.steps}"] if stage.steps else []
            parts += [word for word in _numbers(stage) if word]
            parts += [f"{duration(stage.seconds_left)} left"] if stage.seconds_left is not None else []
            lines.append(_line(now, "", "  ".join(parts)))
    return [*lines, _line(now, "", f"cells    {_overall_words(now)}")] if lines else []


def print_status(name: str, now: Snapshot, console: Console) -> None:
    """What `overfill status NAME` shows: a row per cell, one per stage that has begun and is not done, and a line for
    each that failed, was stopped or interrupted, with the reason and where the log is."""
    console.print(f"{name}: {_overall_words(now)}", style="bold", markup=False, highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for column in ("cell", "state", "stage", "step", "loss", "since"):
        table.add_column(column, justify="right" if column in ("step", "loss", "since") else "left")
    for view in now.cells:
        table.add_row(*_status_row(view, now))
    console.print(table)
    begun = [stage for stage in now.stages.values() if stage.state not in ("done", "waiting", "missing")]
    if begun:
        console.print(_stage_table(begun, now))
    for line in reason_lines(now):
        console.print(line, soft_wrap=True)


def _status_row(view: CellView, now: Snapshot) -> list[Text | str]:
    stage = view.current
    state = Text(view.state, style=STYLES[view.state])
    if stage is not None and stage.silent:
        state = Text(SILENT, style=STYLES["interrupted"])
    if stage is None or view.state == "done":
        return [Text(view.cell.label), state, "", "", "", ""]
    loss = stage.metrics.get("train/loss")
    steps = f"{stage.step}/{stage.steps}" if stage.steps else ""
    return [Text(view.cell.label), state, stage.name, steps, "" if loss is None else f"{loss:.3f}", since(stage, now)]


def _stage_table(stages: Sequence[StageView], now: Snapshot) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "of", "state", "step", "since", "where"):
        table.add_column(column, justify="right" if column in ("step", "since") else "left")
    for stage in stages:
        steps = f"{stage.step}/{stage.steps}" if stage.steps else ""
        state = (
            Text(SILENT, style=STYLES["interrupted"]) if stage.silent else Text(stage.state, style=STYLES[stage.state])
        )
        table.add_row(stage.name, Text(title(stage, now)), state, steps, since(stage, now), stage.where)
    return table


def reason_lines(now: Snapshot) -> list[Text]:
    """One line per stage that ended without a result, the failed ones last: what, why, and of a failure its log."""
    ends = ("stopped", "interrupted", "failed")
    stages = sorted((s for s in now.stages.values() if s.state in ends), key=lambda stage: ends.index(stage.state))
    return [Text.assemble((f"{stage.state:<12}", STYLES[stage.state]), _event(stage, now)) for stage in stages]


def since(stage: StageView, now: Snapshot) -> str:
    """How long a stage has been in its state."""
    return NOTHING if stage.since is None else duration(max(0.0, now.time - stage.since))


def duration(seconds: float | None) -> str:
    """`42 s`, `3:05 min`, `2:10 h`, `4.1 d`."""
    if seconds is None:
        return NOTHING
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if 0.05 <= seconds < 0.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h" if whole < 86400 else f"{seconds / 86400:.1f} d"


def count(value: float) -> str:
    """`950`, `12.3k`, `4.5M`."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
