"""Asking somebody in another process to end: a flag that is raised in a place that both see. Imports next to nothing."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

log = logging.getLogger(__name__)

STOP_FILE = "stop"
"""In the folder of an attempt that shall save its position and end. Of its attempt alone: who has lost its lease, and
ends what works for it, must not end its successor."""


class StopFlag(Protocol):
    """`stop_requested` for processes on any machine; it travels to them."""

    def __call__(self) -> bool:
        """Whether it is raised."""
        ...

    def ask(self, why: str = "") -> None:
        """Raise it."""
        ...

    def clear(self) -> None:
        """Take it down, if it is raised."""
        ...


@dataclass(frozen=True)
class StopFile:
    """A flag on a file system that everybody sees: whether a file is there."""

    path: Path

    def __call__(self) -> bool:
        """Whether it is raised; a look that fails ends no training."""
        try:
            return self.path.exists()
        except OSError as error:
            log.warning("whether %s is there cannot be seen: %s", self.path, error)
            return False

    def ask(self, why: str = "") -> None:
        """Raise it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(f"{why}\n" if why else "", encoding="utf-8")

    def clear(self) -> None:
        """Take it down, if it is raised."""
        self.path.unlink(missing_ok=True)
