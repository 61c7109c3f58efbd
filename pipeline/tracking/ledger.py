"""What was told to an MLflow server about a sweep: `<store>/sweeps/<name>/mlflow.json`, a part per server.

Run ids, the last status of each run, and a fingerprint of what its end state contained.
"""

from __future__ import annotations

import uuid
from pathlib import Path

from pydantic import BaseModel

from pipeline.record import read_json, write_json
from pipeline.tracking.content import RunStatus

LEDGER_FILE = "mlflow.json"


class Entry(BaseModel):
    """What is remembered of one run."""

    run: str
    status: str = ""
    content: str = ""
    """Fingerprint of what was sent with the end state; empty until all of it has arrived."""

    def is_at_end(self, status: RunStatus, content: str) -> bool:
        """Whether this is an end state, and the server has all of it."""
        return self.status == status != "RUNNING" and self.content == content


class Ledger(BaseModel):
    """What is remembered of a sweep on one server."""

    token: str
    experiment: str = ""
    """Id of MLflow's experiment that the runs are in."""
    parent: Entry | None = None
    cells: dict[str, Entry] = {}

    @classmethod
    def read(cls, path: Path, server: str) -> Ledger:
        """The part of the file that is about `server` (a masked URI); a new one when there is none."""
        known = (read_json(path) or {}).get(server)
        return cls(token=uuid.uuid4().hex) if known is None else cls.model_validate(known)

    def write(self, path: Path, server: str) -> None:
        """Replace that part of the file, atomically; the other servers' parts stay."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, (read_json(path) or {}) | {server: self.model_dump(mode="json")})
