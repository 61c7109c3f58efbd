"""What the object stores behind fsspec have in common: bodies that break off, objects that change while they are read."""

from __future__ import annotations

import errno
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pipeline.objects.protocol import Entry

T = TypeVar("T")

ATTEMPTS = 8
"""Of each request, with growing pauses, 20 s at the most: a service that is away for half a minute ends no run."""
QUICK_ATTEMPTS = 2
"""Of the request that checks a place: somebody waits for the answer."""
BODY_ATTEMPTS = 3
"""Of reading an answer's body: the clients retry requests, not what breaks off behind them."""
PART = 16 * 2**20
"""Bytes of a part; files of two parts and more travel in parts, PARALLEL at once."""
PARALLEL = 8
_PAUSE_S = 0.2


class Remote(ABC):
    """An object store behind an fsspec file system."""

    failures: tuple[type[Exception], ...]

    def __init__(self, root: str, attempts: int = ATTEMPTS) -> None:
        self._attempts = attempts
        self._root = root
        """Bucket and prefix."""
        self._bucket, _, prefix = root.partition("/")
        self._prefix = f"{prefix}/" if prefix else ""

    @cached_property
    def _fs(self) -> Any:
        return self._open()

    @abstractmethod
    def _open(self) -> Any:
        """The file system, without any cache; at the first use, since it may look for credentials."""

    def read(self, key: str) -> bytes:
        """One object's content."""
        return self._again(lambda: self._content(key))

    @abstractmethod
    def _content(self, key: str) -> bytes:
        """In one request: between two of them the object may become another one."""

    def write(self, key: str, data: bytes) -> None:
        """Whole: an object store shows an object when its last byte is there."""
        self._fs.pipe_file(self._path(key), data)

    def download(self, key: str, path: Path) -> None:
        """In parts, which must be of one version."""
        self._again(lambda: self._download(key, path))

    def _download(self, key: str, path: Path) -> None:
        before = self._entry(key)
        self._fetch(key, path)
        if self._entry(key) != before or path.stat().st_size != before.size:
            raise OSError(errno.EBUSY, "the object changed while it was read")

    @abstractmethod
    def _entry(self, key: str) -> Entry:
        """One object, as it is now. Raises FileNotFoundError."""

    @abstractmethod
    def _fetch(self, key: str, path: Path) -> None:
        """Into a file, in as many requests as it takes."""

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _again(self, action: Callable[[], T]) -> T:
        for attempt in range(1, BODY_ATTEMPTS):
            try:
                return action()
            except (FileNotFoundError, PermissionError):
                raise
            except (OSError, *self.failures) as error:
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    raise
                pause(attempt)
        return action()


def pause(attempt: int) -> None:
    """Wait before another attempt, longer each time, and not all at once."""
    time.sleep(_PAUSE_S * 2**attempt * random.uniform(0.5, 1.0))  # noqa: S311
