"""A flag on an object store: whether an object is there, looked up every few seconds at most."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from pipeline.objects.bucket import Bucket

log = logging.getLogger(__name__)

LOOK_S = 2.0
"""Least time between two looks: training asks after every step."""


@dataclass
class ObjectFlag:
    """A flag that processes on all machines see; it travels as what names it."""

    bucket: Bucket
    key: str
    _looked: float = field(default=float("-inf"), init=False)
    _raised: bool = field(default=False, init=False)

    def __call__(self) -> bool:
        """Whether it was raised when last looked; a look that fails ends no training."""
        if not self._raised and time.monotonic() - self._looked >= LOOK_S:
            try:
                self._raised = self.bucket.read(self.key) is not None
            except OSError as error:
                log.warning("whether %s is raised cannot be seen: %s", self.key, error)
            self._looked = time.monotonic()
        return self._raised

    def ask(self, why: str = "") -> None:
        """Raise it."""
        self.bucket.write(self.key, f"{why}\n".encode())

    def clear(self) -> None:
        """Take it down, if it is raised."""
        self.bucket.remove([self.key])
        self._raised = False

    def __reduce__(self) -> tuple[type[ObjectFlag], tuple[Bucket, str]]:
        return type(self), (self.bucket, self.key)
