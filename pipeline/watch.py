"""What is going on in a store, read from its files alone: status, progress bars and MLflow see the same.

A `Watch` looks at the stages of a sweep's cells again and again. What is finished is read once; of what runs only the
new lines of its curve are read. Nothing here writes, and nothing here needs ray, torch or mlflow.

Time left is an estimate with two sources: a running stage's own speed, and for stages that have not begun the mean
duration of those of the same kind. Cells run side by side, so the sum of the work is divided by what runs at once.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.curves import Curve
from pipeline.lease import attempt_folder
from pipeline.notes import read_note, time_of
from pipeline.status import Status
from pipeline.store import ATTEMPT_FILE, OUTCOME_FILE, Store

if TYPE_CHECKING:
    from pipeline.stage import Stage
    from pipeline.sweep import Cell

State = Literal["done", "running", "failed", "waiting", "stopped", "interrupted", "missing"]
"""As the store has them; an altered artifact counts as failed, for it says why."""
ORDER: tuple[State, ...] = ("running", "failed", "stopped", "interrupted", "waiting")
REASONED = ("failed", "altered", "stopped", "interrupted", "waiting")
METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class StageView:
    """One stage at one moment. Times in seconds since the epoch, durations in seconds."""

    identity: str
    name: str
    label: str
    folder: Path
    state: State
    since: float | None = None
    """When this state began, as far as the store knows."""
    started: float | None = None
    """When the newest attempt began."""
    where: str = ""
    """Who builds it, of a running stage: `process 12 on host`."""
    silent: bool = False
    """Of a running stage: whether whoever builds it seems to be dead."""
    step: int = 0
    steps: int = 0
    """Steps of the whole stage; 0 for a stage that counts none, or has not logged one yet."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Newest value of every logged metric."""
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    """By the stage's own speed; None while that is not known."""
    seconds: float | None = None
    """Duration of a finished stage, all attempts together."""
    finished: float | None = None
    failure: str | None = None
    """Why it failed, was stopped or waits, in one line."""
    log: Path | None = None
    """The newest attempt's log."""

    @property
    def open(self) -> bool:
        """Whether work is left."""
        return self.state != "done"


@dataclass(frozen=True)
class CellView:
    """One cell at one moment."""

    cell: Cell
    stages: tuple[StageView, ...]
    """In topological order."""
    own: tuple[StageView, ...]
    """Those that no other cell of the sweep shares."""

    @property
    def state(self) -> State:
        """`done` with its accuracy and latency, whatever became of what they were made from; else `running` while any
        stage is; else what keeps it from going on."""
        leaves = {stage.identity for stage in self.cell.leaves}
        if all(stage.state == "done" for stage in self.stages if stage.identity in leaves):
            return "done"
        states = {stage.state for stage in self.stages}
        for state in ORDER:
            if state in states:
                return state
        return "waiting" if "done" in states else "missing"

    @property
    def current(self) -> StageView | None:
        """The stage that the cell's state comes from; for a waiting cell the first that is not done."""
        matching = [stage for stage in self.stages if stage.state == self.state]
        if self.state == "done":
            return self.stages[-1]
        return next(iter(matching), next((stage for stage in self.stages if stage.open), None))

    @property
    def failure(self) -> str | None:
        """Why the cell's current stage failed, was stopped or waits."""
        return None if self.current is None else self.current.failure


@dataclass(frozen=True)
class Snapshot:
    """All cells of a sweep at one moment."""

    time: float
    cells: tuple[CellView, ...]

    @cached_property
    def stages(self) -> dict[str, StageView]:
        """Every stage once, by identity, in the order of the cells."""
        return {stage.identity: stage for view in self.cells for stage in view.stages}

    @cached_property
    def owners(self) -> dict[str, Cell]:
        """Identity of a stage that only one cell has -> that cell."""
        return {stage.identity: view.cell for view in self.cells for stage in view.own}

    @cached_property
    def counts(self) -> Counter[str]:
        """Cells in each state."""
        return Counter(view.state for view in self.cells)

    @property
    def seconds_left(self) -> float | None:
        """Estimate of the time until every cell is done; None until every kind of open stage has a known duration."""
        stages = list(self.stages.values())
        alike = _durations(stages)
        work = [
            alike.get(stage.name) if stage.seconds_left is None else stage.seconds_left
            for stage in stages
            if stage.state not in ("done", "failed", "stopped")
        ]
        known = [seconds for seconds in work if seconds is not None]
        at_once = max(1, sum(stage.state == "running" for stage in stages))
        return sum(known) / at_once if len(known) == len(work) else None


def _durations(stages: Sequence[StageView]) -> dict[str, float]:
    """Kind of stage -> how long one takes: the mean of the finished, else the longest of what runs at its own speed."""
    finished: dict[str, list[float]] = {}
    going: dict[str, list[float]] = {}
    for stage in stages:
        if stage.seconds is not None:
            finished.setdefault(stage.name, []).append(stage.seconds)
        elif stage.seconds_left is not None and stage.step < stage.steps:
            whole = stage.seconds_left * stage.steps / (stage.steps - stage.step)
            going.setdefault(stage.name, []).append(whole)
    means = {name: sum(seconds) / len(seconds) for name, seconds in finished.items()}
    return {name: max(seconds) for name, seconds in going.items()} | means


class Watch:
    """Looks at the stages of some cells; keeps what cannot change any more, and a cursor in every curve."""

    def __init__(self, store: Store, cells: Sequence[Cell]) -> None:
        self._store = store
        self._cells = list(cells)
        self._curves: dict[str, Curve] = {}
        self._done: dict[str, StageView] = {}
        uses = Counter(stage.identity for cell in self._cells for stage in cell.stages)
        self._shared = {identity for identity, count in uses.items() if count > 1}

    def snapshot(self) -> Snapshot:
        """The cells now."""
        views: dict[str, StageView] = {}
        stages = {stage.identity: stage for cell in self._cells for stage in cell.stages}
        with self._store.look_once(stage for identity, stage in stages.items() if identity not in self._done):
            for identity, stage in stages.items():
                views[identity] = self._done.get(identity) or self._look(stage, views)
        return Snapshot(time.time(), tuple(self._cell_view(cell, views) for cell in self._cells))

    def curve(self, identity: str) -> Curve | None:
        """The curve of a stage, as far as it was read at the last snapshot."""
        return self._curves.get(identity)

    def _cell_view(self, cell: Cell, views: dict[str, StageView]) -> CellView:
        stages = tuple(views[stage.identity] for stage in cell.stages)
        return CellView(cell, stages, tuple(stage for stage in stages if stage.identity not in self._shared))

    def _look(self, stage: Stage, views: dict[str, StageView]) -> StageView:
        status = self._status(stage)
        if status is None:
            folder = self._store.root / stage.name / stage.folder_name
            return StageView(stage.identity, stage.name, stage.label, folder, _unbegun(stage, views))
        curve = self._curves.setdefault(stage.identity, Curve(status.folder / "progress" / METRICS_FILE))
        curve.update()
        view = _view(status, curve)
        if view.state == "done":
            self._done[stage.identity] = view
        return view

    def _status(self, stage: Stage) -> Status | None:
        """The store's word; None, without asking, for a stage that has no folder, as most of a large sweep have not."""
        return None if self._store.find(stage.identity, stage.name) is None else self._store.status(stage)


def _unbegun(stage: Stage, views: dict[str, StageView]) -> State:
    below = {views[source.identity].state for source in stage.input_stages if source.identity in views}
    return "waiting" if below & {"running", "waiting"} else "missing"


def _view(status: Status, curve: Curve) -> StageView:
    stage, record, last = status.stage, status.record, curve.last
    step, steps = (last.step, last.steps) if last is not None else (0, 0)
    running = status.state == "running"
    speed = curve.seconds_per_step if running else None
    started, since = _times(status)
    return StageView(
        identity=stage.identity,
        name=stage.name,
        label=stage.label,
        folder=status.folder,
        state="failed" if status.state == "altered" else status.state,
        since=since,
        started=started,
        where=status.where,
        silent=status.silent,
        step=step,
        steps=steps,
        metrics=dict(curve.latest_metrics),
        tokens_per_second=curve.tokens_per_second if running else None,
        seconds_left=None if speed is None else speed * max(0, steps - step),
        seconds=None if record is None else record.seconds_all_attempts,
        finished=None if record is None else record.finished,
        failure=_reason(status) if status.state in REASONED else None,
        log=status.log,
    )


def _reason(status: Status) -> str:
    """Why it is not done; with a torn step checkpoint also from where it goes on, for that is not from the newest."""
    why = status.error or status.detail
    if not status.torn:
        return why
    goes_on = "begins anew" if status.checkpoint is None else f"goes on from step {status.checkpoint}"
    return f"{why}; it {goes_on}, for this is not whole: {status.torn}"


def _times(status: Status) -> tuple[float | None, float | None]:
    """(start of the newest attempt, when the state began)."""
    if status.record is not None:
        return status.record.started, status.record.finished
    if not status.attempt:
        return None, None
    attempt = attempt_folder(status.folder / "attempts", status.attempt)
    started = time_of(read_note(attempt / ATTEMPT_FILE), "started")
    return started, started if status.state == "running" else time_of(read_note(attempt / OUTCOME_FILE), "ended")


def snapshot(store: Store, cells: Sequence[Cell]) -> Snapshot:
    """The cells as they are now."""
    return Watch(store, cells).snapshot()
