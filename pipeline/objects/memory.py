"""memory://: objects of this process alone, for tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

from pipeline.objects.protocol import Entry

_STORE: dict[str, tuple[bytes, int, float]] = {}
"""Place and key -> content, number of the write, time of it."""
_LOCK = threading.Lock()
_NUMBERS = count()


class Memory:
    """The objects whose keys begin with `root`."""

    failures: tuple[type[Exception], ...] = ()

    def __init__(self, root: str) -> None:
        self._root = f"{root}/"

    def check(self) -> None:
        """Memory is always there."""

    def advice(self, error: Exception) -> str:
        """Never asked for."""
        return ""

    def walk(self, prefix: str) -> Iterator[tuple[str, Entry]]:
        """From a copy, so that others may write meanwhile."""
        with _LOCK:
            there = [item for item in _STORE.items() if item[0].startswith(self._root + prefix)]
        for key, (data, number, written) in there:
            yield key.removeprefix(self._root), Entry(len(data), str(number), written)

    def children(self, prefix: str) -> Iterator[str]:
        """First parts of what is below."""
        return (key.removeprefix(prefix).partition("/")[0] for key, _ in self.walk(prefix))

    def read(self, key: str) -> bytes:
        """The content."""
        try:
            return _STORE[self._root + key][0]
        except KeyError:
            raise FileNotFoundError("not there") from None

    def write(self, key: str, data: bytes) -> None:
        """Replaces."""
        with _LOCK:
            _STORE[self._root + key] = (bytes(data), next(_NUMBERS), time.time())

    def create(self, key: str, data: bytes) -> None:
        """Under the lock."""
        with _LOCK:
            if self._root + key in _STORE:
                raise FileExistsError("there already")
            _STORE[self._root + key] = (bytes(data), next(_NUMBERS), time.time())

    def upload(self, path: Path, key: str) -> None:
        """A copy."""
        self.write(key, path.read_bytes())

    def download(self, key: str, path: Path) -> None:
        """A copy."""
        path.write_bytes(self.read(key))

    def remove(self, keys: Sequence[str]) -> None:
        """Those that are there."""
        with _LOCK:
            for key in keys:
                _STORE.pop(self._root + key, None)
