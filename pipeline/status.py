"""Where a stage stands, in one value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.record import Record
from pipeline.stage import Stage

State = Literal["done", "running", "failed", "waiting", "stopped", "interrupted", "altered", "missing"]


@dataclass(frozen=True)
class Status:
    """Where a stage stands."""

    state: State
    """`waiting`: nothing is built and an input is being built. `interrupted`: its last attempt ended without a word."""
    detail: str
    """One line: metrics of the finished, the error of the failed, the holder of the running."""
    stage: Stage
    folder: Path
    """Its folder in the store, there or not."""
    attempt: int = 0
    """Number of the newest attempt."""
    where: str = ""
    """Who builds it, of a running stage: `process 12 on host`."""
    silent: bool = False
    """Of a running stage: whether whoever builds it seems to be dead."""
    error: str = ""
    """Cause of a failure, one line."""
    log: Path | None = None
    """Log of the newest attempt."""
    checkpoint: int | None = None
    """Step of the newest whole step checkpoint, of a stage that is neither finished nor running."""
    torn: str = ""
    """Newer step checkpoints that are not whole, and why."""
    record: Record | None = None
    """Of a finished stage."""
