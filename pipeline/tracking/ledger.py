"""What was told to an MLflow server about a sweep: `<store>/sweeps/<name>/mlflow.jsonl`, changes in the order they came.

Run ids, the last status of each run, and a fingerprint of what its end state contained. A line is about the sweep or
about one cell, on one server, and the last one of each holds: a sweep of 10,000 cells changes some 30,000 times, and a
file that is written whole at every change costs the square of that. A line that a kill has torn is left out; the run that
it was about is found on the server by its key.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, PrivateAttr, TypeAdapter, ValidationError

from pipeline.record import read_json, sync
from pipeline.tracking.content import RunStatus

log = logging.getLogger(__name__)

LEDGER_FILE = "mlflow.jsonl"
EARLIER_FILE = "mlflow.json"
"""Written whole, a part per server, by earlier versions; what it says is still known."""


class Entry(BaseModel):
    """What is remembered of one run."""

    run: str
    status: str = ""
    content: str = ""
    """Fingerprint of what was sent with the end state; empty until all of it has arrived."""

    def is_at_end(self, status: RunStatus, content: str) -> bool:
        """Whether this is an end state, and the server has all of it."""
        return self.status == status != "RUNNING" and self.content == content


class _SweepLine(BaseModel):
    server: str
    token: str
    experiment: str
    parent: Entry | None


class _CellLine(BaseModel):
    server: str
    cell: str
    entry: Entry


_LINE: TypeAdapter[_CellLine | _SweepLine] = TypeAdapter(_CellLine | _SweepLine)


class Ledger(BaseModel):
    """What is remembered of a sweep on one server."""

    token: str
    """The keys of the sweep's runs begin with it; a new one is a new beginning, without the cells there were.

    A server that is new here starts with the newest of the others, for one server may have several addresses (a store
    that was moved takes its database along): under the same keys the runs are found there."""
    experiment: str = ""
    """Id of MLflow's experiment that the runs are in."""
    parent: Entry | None = None
    cells: dict[str, Entry] = {}
    _written: dict[str, str] = PrivateAttr(default_factory=dict)
    """Identity of a cell, or "" for the sweep -> the newest line about it."""

    @classmethod
    def read(cls, folder: Path, server: str) -> Ledger:
        """What the sweep's folder says about `server` (a masked URI); a new ledger when it says nothing."""
        earlier, lines = read_json(folder / EARLIER_FILE) or {}, list(_lines(folder / LEDGER_FILE))
        tokens = [known["token"] for known in earlier.values()]
        tokens += [line.token for line in lines if isinstance(line, _SweepLine)]
        known = earlier.get(server) or {"token": tokens[-1] if tokens else uuid.uuid4().hex}
        ledger = cls.model_validate(known)
        for line in lines:
            if line.server == server:
                ledger._take(line)
        return ledger

    def _take(self, line: _CellLine | _SweepLine) -> None:
        if isinstance(line, _CellLine):
            self.cells[line.cell] = line.entry
            return
        if line.token != self.token:
            self.cells = {}
        self.token, self.experiment, self.parent = line.token, line.experiment, line.parent

    def write(self, folder: Path, server: str, cell: str) -> None:
        """Remember what is new of the cell of this identity, or with "" of the sweep itself."""
        about = (
            _CellLine(server=server, cell=cell, entry=self.cells[cell])
            if cell
            else _SweepLine(server=server, token=self.token, experiment=self.experiment, parent=self.parent)
        )
        line = about.model_dump_json()
        if line != self._written.get(cell):
            _append(folder / LEDGER_FILE, line)
            self._written[cell] = line


def _lines(path: Path) -> Iterator[_CellLine | _SweepLine]:
    """Every whole line, oldest first."""
    content = path.read_bytes() if path.exists() else b""
    for line in content.splitlines():
        try:
            yield _LINE.validate_json(line)
        except ValidationError:
            log.warning("%s: a line is damaged and left out", path)


def _append(path: Path, line: str) -> None:
    """Add a line and have it on disk; behind one that was torn it begins anew."""
    created = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            stream.write(b"" if stream.read() == b"\n" else b"\n")
        stream.write(line.encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
    if created:
        sync(path.parent)
