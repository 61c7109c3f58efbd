"""What `pipeline.tracking.sync` asks of an MLflow server, so that a test can be one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipeline.tracking.content import RunStatus, Value
from pipeline.tracking.models import DatasetUse, LoggedStudent

KEY_TAG = "overfill.key"
"""The tag by which a run is found whose id was never written down."""


class Refused(Exception):
    """The server answers, and does not take what it was sent: a name that it has no place for, say."""


@dataclass
class Known:
    """What a run has on the server."""

    steps: dict[str, int] = field(default_factory=dict)
    """Metric -> its highest step."""
    parameters: set[str] = field(default_factory=set)
    values: dict[str, float] = field(default_factory=dict)
    """Metric -> its value at that step."""
    tags: set[str] = field(default_factory=set)


class Server(Protocol):
    """The calls that MLflow has to answer. Any of them may raise; nothing is lost then."""

    def find(self, run: str | None, key: str) -> str | None:
        """Id of a run that is there and not deleted: `run`, else the one with this key tag, else None."""
        ...

    def start(self, name: str, tags: dict[str, str], parent: str | None, started: float | None) -> str:
        """Begin a run; returns its id."""
        ...

    def known(self, run: str) -> Known:
        """What the run has already."""
        ...

    def send(self, run: str, values: Sequence[Value], parameters: dict[str, Any], tags: dict[str, str]) -> None:
        """Log to a run. Raises `Refused` for what the server takes from nobody."""
        ...

    def set_status(self, run: str, status: RunStatus, ended: float | None) -> None:
        """Set where a run is; `ended` in seconds since the epoch."""
        ...

    def upload(self, run: str, files: dict[str, str | Path]) -> None:
        """Store artifacts: name -> text, or a file to copy."""
        ...

    def describe(self, tags: dict[str, str]) -> str:
        """Tag the experiment that the runs are in; returns its id."""
        ...

    def link(self, run: str, datasets: Sequence[DatasetUse], student: LoggedStudent | None) -> None:
        """Say what data a run has read and which model came out of it; what was said already is left as it is."""
        ...
