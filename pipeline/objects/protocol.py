"""What a place for objects must be able to do: `pipeline.objects.bucket` is built on it, one module per protocol.

Keys are relative here; a prefix ends with a slash or is empty."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Entry:
    """One object, as a listing shows it."""

    size: int
    """Bytes."""
    version: str
    """Changes whenever the content does."""
    written: float = field(compare=False)
    """When, in seconds since the epoch, by the store's clock."""


class Conflict(Exception):
    """Another request for the same key was under way: neither written nor there; to be tried again."""


class Objects(Protocol):
    """The objects of one place."""

    failures: tuple[type[Exception], ...]
    """What its library raises, beside OSError, when a request fails."""

    def check(self) -> None:
        """One request that only succeeds where listing is allowed."""
        ...

    def advice(self, error: Exception) -> str:
        """The way out of a failed `check`."""
        ...

    def walk(self, prefix: str) -> Iterator[tuple[str, Entry]]:
        """Every object below a prefix."""
        ...

    def children(self, prefix: str) -> Iterator[str]:
        """Names directly below a prefix; one that is both an object and a folder may come twice."""
        ...

    def read(self, key: str) -> bytes:
        """Raises FileNotFoundError."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Whole or not at all."""
        ...

    def create(self, key: str, data: bytes) -> None:
        """As `write`; of any number at once one succeeds. Raises FileExistsError, Conflict."""
        ...

    def upload(self, path: Path, key: str) -> None:
        """Whole or not at all."""
        ...

    def download(self, key: str, path: Path) -> None:
        """Into a file that nobody reads yet; on an error anything may be in it. Raises FileNotFoundError."""
        ...

    def remove(self, keys: Sequence[str]) -> None:
        """Those that are there."""
        ...
