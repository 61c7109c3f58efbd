"""Bringing MLflow's runs in line with the store: decides what to say, leaves the saying to a `Server`.

What was said is remembered (`pipeline.tracking.ledger`), but the memory is not the truth: for a run that is not at its
end the server is asked which steps it has, because a kill can fall between a message and the memory of it. Every run
carries a tag that is derived from a token in the ledger, so that even a run whose id was never written down is found.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overfill.errors import UserError
from pipeline.fingerprint import fingerprint
from pipeline.tracking.calls import KEY_TAG, Known, Refused, Server
from pipeline.tracking.content import (
    CELL_STAGE,
    SUPERSEDED_TAG,
    TEXT_LIMIT,
    RunStatus,
    Value,
    curve_values,
    end_time,
    final_values,
    parameters,
    parent_status,
    report_note,
    result_note,
    shared_prefix,
    start_time,
    superseded,
    tags,
    wanted_status,
)
from pipeline.tracking.ledger import Entry, Ledger
from pipeline.tracking.models import datasets, student
from pipeline.tracking.samples import sample_tables, tables_tag, task_values
from pipeline.tracking.view import KIND_TAGS, view_tag
from pipeline.watch import CellView, Snapshot, Watch

if TYPE_CHECKING:
    from pipeline.store import Store
    from pipeline.sweep import Cell

FORMAT = 2
"""Raised when runs that are at their end should be written once more."""
REPORT_INTERVAL_S = 300.0
"""Least time between two reports on the parent run while cells are still being worked on."""


@dataclass
class Sweep:
    """What is tracked."""

    name: str
    description: str
    yaml: str
    """The experiment with every default, as text."""
    cells: Sequence[Cell]
    store: Store
    commit: str | None

    @property
    def folder(self) -> Path:
        """The sweep's own folder in the store."""
        return self.store.root / "sweeps" / self.name


class Sync:
    """Says what is new. One instance per driver and server; not safe for several threads."""

    def __init__(self, sweep: Sweep, ledger: Ledger, save: Callable[[Ledger, str], None]) -> None:
        """`save` remembers what the ledger says of the cell of an identity, or with "" of the sweep itself."""
        self._sweep = sweep
        self.ledger = ledger
        """What was said; to be read anew as long as another driver is the one that writes it."""
        self._save = save
        self._watch = Watch(sweep.store, sweep.cells)
        self._known: dict[str, Known] = {}
        self._tags: dict[str, dict[str, str]] = {}
        self._reported: tuple[float, int] = (0.0, 0)
        self.problems: list[str] = []
        """What of the last `push` did not arrive although the server answers: artifacts, what it refuses."""

    def snapshot(self) -> Snapshot:
        """The cells now."""
        return self._watch.snapshot()

    def up_to_date(self, now: Snapshot) -> bool:
        """Whether every run is at the end state that the store says, so that the server need not be asked."""
        parent = self.ledger.parent
        if parent is None or parent.content != self._parent_content(now) or parent.status != parent_status(now):
            return False
        return not self._left_behind(now) and all(self._settled(view) for view in now.cells)

    def _left_behind(self, now: Snapshot) -> dict[str, Entry]:
        """Identity -> run of a cell that the experiment has no more, and that nobody has brought to an end."""
        there = {view.cell.identity for view in now.cells}
        cells = self.ledger.cells.items()
        return {name: entry for name, entry in cells if name not in there and entry.status in ("", "RUNNING")}

    def ends_told(self, now: Snapshot) -> bool:
        """Whether every cell that has come to its end has been told of. A driver that was looking before the last did
        may still be at work, or on its way out: only what it has told is known to be more than it saw."""
        return all(self._settled(view) for view in now.cells if view.state in ("done", "failed", "stopped"))

    def _settled(self, view: CellView) -> bool:
        entry, status = self.ledger.cells.get(view.cell.identity), wanted_status(view)
        if entry is None:
            return status is None
        return entry.is_at_end(status or "KILLED", _content(view))

    def _parent_content(self, now: Snapshot) -> str:
        cells = {view.cell.identity: _content(view) for view in now.cells}
        return fingerprint([FORMAT, self._sweep.yaml, self._sweep.description, cells])

    def push(self, server: Server, now: Snapshot, final: bool) -> None:
        """Send everything that the server has not got. `final`: nobody goes on working on the cells after this."""
        self.problems = []
        parent = self._parent(server, now)
        for view in now.cells:
            self._push_cell(server, parent.run, view, final)
        self._push_shared_curves(server, parent.run, now)
        self._push_report(server, parent, now, final)
        if final:
            self._end_left_behind(server, now)
            self._upload(server, parent.run, {"experiment.yaml": self._sweep.yaml})
            ends = [time for time in map(end_time, now.cells) if time is not None]
            self._set_status(server, parent, parent_status(now), max(ends, default=now.time))
            parent.content = "" if self.problems else self._parent_content(now)
        self._save(self.ledger, "")

    # --- runs

    def _parent(self, server: Server, now: Snapshot) -> Entry:
        entry = self.ledger.parent
        if entry is not None and entry.run in self._known:
            return entry
        if entry is not None and server.find(entry.run, "") is None:
            # Deleted on the server: the sweep begins anew there, for children cannot move to another parent.
            self.ledger.token, self.ledger.cells, entry = uuid.uuid4().hex, {}, None
        if entry is None:
            self._save(self.ledger, "")  # the token first: by it a run is found whose id never came back
        key = f"{self.ledger.token}/parent"
        described = {"sweep": self._sweep.name, "role": "sweep", "store": self._sweep.store.location, KEY_TAG: key}
        described |= {"mlflow.source.name": "overfill", "mlflow.source.type": "LOCAL"}
        described |= {"commit": self._sweep.commit} if self._sweep.commit else {}
        # A sweep that ran before there was a server began with its first cell; any other begins now.
        begun = [start_time(view) for view in now.cells if now.counts["done"] == len(now.cells)]
        run = self._run(server, entry, key, self._sweep.name, described, None, min(filter(None, begun), default=None))
        self.ledger.parent = entry = entry if entry is not None and entry.run == run else Entry(run=run)
        self.ledger.experiment = server.describe(KIND_TAGS | dict([view_tag(self._sweep.name, now.time)]))
        self._save(self.ledger, "")
        self._set_status(server, entry, "RUNNING", None)
        self._upload(server, run, {"experiment.yaml": self._sweep.yaml})
        return entry

    def _run(
        self,
        server: Server,
        entry: Entry | None,
        key: str,
        name: str,
        described: dict[str, str],
        parent: str | None,
        started: float | None,
    ) -> str:
        """Id of the run to go on in, begun now if there is none; afterwards it is known what it has."""
        found = server.find(None if entry is None else entry.run, key)
        run = found or server.start(name, described, parent, started)
        self._known[run] = server.known(run) if found else Known()
        return run

    def _set_status(self, server: Server, entry: Entry, status: RunStatus, ended: float | None) -> None:
        if entry.status != status:
            server.set_status(entry.run, status, ended)
            entry.status = status

    # --- cells

    def _push_cell(self, server: Server, parent: str, view: CellView, final: bool) -> None:
        identity = view.cell.identity
        entry, status = self.ledger.cells.get(identity), self._status(view, final)
        if status is None or (entry is not None and entry.is_at_end(status, _content(view))):
            return
        entry = self._cell_entry(server, parent, view)
        known, curve = self._known[entry.run], self._watch.curve(_curve_stage(view))
        values = [] if curve is None else curve_values(curve, known.steps)
        files: dict[str, str | Path] = {}
        described = self._cell_tags(view, status)
        if status != "RUNNING":
            files["config.yaml"] = _config_yaml(view)  # again, in case it did not arrive at the start
        if status == "FINISHED":
            finals, results = self._results(view)
            behind = superseded(finals, known.steps, known.values)
            described |= {"mlflow.note.content": result_note(view, finals, behind)}
            if behind or SUPERSEDED_TAG in known.tags:
                described |= {SUPERSEDED_TAG: ", ".join(behind)[:TEXT_LIMIT]}
            files |= results
            values += [value for value in finals if value.step > known.steps.get(value.key, -1)]
        told = {name: value for name, value in parameters(view.cell).items() if name not in known.parameters}
        arrived = self._send(server, entry.run, values, told, described)
        self._set_status(server, entry, status, end_time(view))
        arrived = self._upload(server, entry.run, files) and arrived
        if status == "FINISHED":
            arrived = self._link(server, entry.run, view) and arrived
        entry.content = _content(view) if arrived and status != "RUNNING" else ""
        self._save(self.ledger, identity)

    def _status(self, view: CellView, final: bool) -> RunStatus | None:
        """Where the cell's run should be; None for a cell that has none and needs none."""
        entry, status = self.ledger.cells.get(view.cell.identity), wanted_status(view)
        if status is None and entry is not None:
            # Between two stages if this driver has seen it run, else left over from a driver that was killed.
            between = entry.status == "RUNNING" and entry.run in self._known
            status = "RUNNING" if between else "KILLED"
        return "KILLED" if final and status == "RUNNING" else status

    def _cell_entry(self, server: Server, parent: str, view: CellView) -> Entry:
        identity = view.cell.identity
        entry = self.ledger.cells.get(identity)
        if entry is not None and entry.run in self._known:
            return entry
        key = f"{self.ledger.token}/{identity}"
        begun = start_time(view)
        described = tags(view, self._sweep.commit) | tables_tag(view.cell)
        described |= {KEY_TAG: key, "sweep": self._sweep.name, "role": "cell"}
        run = self._run(server, entry, key, view.cell.label, described, parent, begun)
        entry = entry if entry is not None and entry.run == run else Entry(run=run)
        self.ledger.cells[identity] = entry
        self._save(self.ledger, identity)
        self._upload(server, run, {"config.yaml": _config_yaml(view)})
        return entry

    def _end_left_behind(self, server: Server, now: Snapshot) -> None:
        for identity, entry in self._left_behind(now).items():
            if server.find(entry.run, "") is None:
                entry.status = "KILLED"  # deleted on the server
            else:
                self._send(server, entry.run, [], {}, {"state": "interrupted"})
                self._set_status(server, entry, "KILLED", now.time)
            self._save(self.ledger, identity)

    def _cell_tags(self, view: CellView, status: RunStatus) -> dict[str, str]:
        found = tags(view, self._sweep.commit)
        return found | {"state": "interrupted"} if status == "KILLED" and view.state == "running" else found

    def _results(self, view: CellView) -> tuple[list[Value], dict[str, str | Path]]:
        from pipeline.reporting.exports import rows_to_json
        from pipeline.reporting.rows import row

        found = row(view.cell, self._sweep.store)
        return final_values(view, found) + task_values(view.cell, self._sweep.store), {
            "result.json": rows_to_json([found]),
            "artifacts.json": rows_to_json([self._places(view)]),
            **sample_tables(view.cell, self._sweep.store),
        }

    def _link(self, server: Server, run: str, view: CellView) -> bool:
        """Whether data sets and student were told; like artifacts, they must not keep the metrics from a server."""
        store = self._sweep.store
        try:
            server.link(run, datasets(view.cell, store), student(view.cell, store))
        except Exception as error:  # a server of another version may know neither
            self.problems.append(f"data sets and models: {error}")
            return False
        return True

    def _places(self, view: CellView) -> dict[str, Any]:
        """Where the cell's artifacts lie, with the digests of their files: large files stay in the store."""
        records = {stage.name: (stage, self._sweep.store.record(stage)) for stage in view.cell.stages}
        return {
            name: {
                "folder": self._sweep.store.place(stage),
                "identity": stage.identity,
                "sha256": {file: entry.sha256 for file, entry in record.files.items()},
            }
            for name, (stage, record) in records.items()
            if record is not None
        }

    # --- the parent's own content

    def _push_shared_curves(self, server: Server, parent: str, now: Snapshot) -> None:
        for stage in now.stages.values():
            curve, known = self._watch.curve(stage.identity), self._known.get(parent)
            if stage.name != CELL_STAGE and curve is not None and known is not None:
                values = curve_values(curve, known.steps, shared_prefix(stage, now))
                self._send(server, parent, values, {}, {})

    def _push_report(self, server: Server, parent: Entry, now: Snapshot, final: bool) -> None:
        done, (when, before) = now.counts["done"], self._reported
        if not final and (done == before or time.monotonic() - when < REPORT_INTERVAL_S):
            return
        from pipeline.reporting.exports import write_report
        from pipeline.reporting.report import make_report
        from pipeline.reporting.tables import markdown

        try:
            report = make_report(self._sweep.name, self._sweep.description, self._sweep.cells, self._sweep.store)
        except UserError as error:  # a damaged artifact: the runs still get their end states
            self.problems.append(f"report: {error}")
            return
        counts = {f"cells_{state}": str(now.counts[state]) for state in ("done", "failed", "stopped")}
        note = report_note(parent.run, markdown(report))
        self._send(server, parent.run, [], {}, {"mlflow.note.content": note, "cells": str(len(now.cells)), **counts})
        files = write_report(report, self._sweep.folder)
        self._upload(server, parent.run, {f"report/{path.name}": path for path in files})
        self._reported = (time.monotonic(), done)

    # --- sending

    def _send(
        self, server: Server, run: str, values: list[Value], told: dict[str, Any], described: dict[str, str]
    ) -> bool:
        """Whether it arrived; what the server refuses must not keep reports and end states from it."""
        sent = self._tags.setdefault(run, {})
        described = {name: text for name, text in described.items() if sent.get(name) != text}
        if not (values or told or described):
            return True
        try:
            server.send(run, values, told, described)
        except BaseException as error:
            self._known.pop(run, None)  # the answer may be lost, not the message: the next look asks what arrived
            self._tags.pop(run, None)
            if not isinstance(error, Refused):
                raise
            self.problems.append(f"refused: {error}")
            return False
        sent |= described
        if known := self._known.get(run):
            known.parameters |= told.keys()
            known.tags |= described.keys()
            for value in values:
                if value.step >= known.steps.get(value.key, -1):
                    known.steps[value.key], known.values[value.key] = value.step, value.value
        return True

    def _upload(self, server: Server, run: str, files: dict[str, str | Path]) -> bool:
        """Whether the artifacts arrived; a server without a place for them must not keep the metrics from it."""
        if not files:
            return True
        try:
            server.upload(run, files)
        except Exception as error:  # each artifact store has errors of its own
            self.problems.append(f"artifacts {', '.join(files)}: {error}")
            return False
        return True


def _config_yaml(view: CellView) -> str:
    from pipeline.config_io import dump_yaml  # yaml is needed only here

    return dump_yaml(view.cell.config.model_dump(mode="json"))


def _curve_stage(view: CellView) -> str:
    return next((stage.identity for stage in view.stages if stage.name == CELL_STAGE), "")


def _content(view: CellView) -> str:
    """Changes whenever the end state has something new to say."""
    finished = [stage.finished for stage in view.stages]
    return fingerprint([FORMAT, view.cell.identity, view.state, view.failure, finished])
