"""file://: objects as files below a folder, which must have links and atomic renames.

A file is written below `.writing/`, then renamed, or linked where it must not be there yet: fsspec's own file system
opens the file itself, and a reader would see half of it."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipeline.objects.protocol import Entry
from pipeline.record import sync

_WRITING = ".writing"
_PLACINGS = 100
"""Tries to put a file into its folder, which another process may remove while it is empty."""


class Folder:
    """The objects below a folder."""

    failures: tuple[type[Exception], ...] = ()

    def __init__(self, root: Path) -> None:
        self._root = root

    def check(self) -> None:
        """The folder is made, since nobody else would."""
        (self._root / _WRITING).mkdir(parents=True, exist_ok=True)
        (self._root / _WRITING / uuid.uuid4().hex).mkdir()

    def advice(self, error: Exception) -> str:
        """The same for every error."""
        return "name a folder that can be written"

    def walk(self, prefix: str) -> Iterator[tuple[str, Entry]]:
        """Files, but none that is being written or was just removed."""
        for folder, folders, files in os.walk(self._root / prefix):
            inside = Path(folder).relative_to(self._root)
            if inside == Path():
                folders[:] = [name for name in folders if name != _WRITING]
            for name in files:
                try:
                    seen = Path(folder, name).stat()
                except FileNotFoundError:
                    continue
                version = f"{seen.st_mtime_ns}-{seen.st_size}-{seen.st_ino}"
                yield (inside / name).as_posix(), Entry(seen.st_size, version, seen.st_mtime)

    def children(self, prefix: str) -> Iterator[str]:
        """Names in a folder."""
        try:
            names = os.listdir(self._root / prefix)  # noqa: PTH208 (names, not paths)
        except FileNotFoundError:
            return
        yield from (name for name in names if prefix or name != _WRITING)

    def read(self, key: str) -> bytes:
        """The file's content."""
        return (self._root / key).read_bytes()

    def write(self, key: str, data: bytes) -> None:
        """By a rename."""
        self._place(key, lambda fresh: fresh.write_bytes(data), Path.replace)

    def create(self, key: str, data: bytes) -> None:
        """By a link, which fails where there is something."""
        self._place(key, lambda fresh: fresh.write_bytes(data), lambda fresh, path: os.link(fresh, path))

    def upload(self, path: Path, key: str) -> None:
        """By a copy and a rename."""
        self._place(key, lambda fresh: shutil.copyfile(path, fresh), Path.replace)

    def download(self, key: str, path: Path) -> None:
        """By a copy."""
        shutil.copyfile(self._root / key, path)

    def remove(self, keys: Sequence[str]) -> None:
        """With the folders that are empty then, as an object store has none."""
        for key in keys:
            path = self._root / key
            path.unlink(missing_ok=True)
            for parent in list(path.parents)[: key.count("/")]:
                try:
                    parent.rmdir()
                except OSError:
                    break

    def _place(self, key: str, fill: Callable[[Path], object], put: Callable[[Path, Path], object]) -> None:
        fresh, path = self._root / _WRITING / uuid.uuid4().hex, self._root / key
        fresh.parent.mkdir(parents=True, exist_ok=True)
        try:
            fill(fresh)
            sync(fresh)
            for left in reversed(range(_PLACINGS)):
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    put(fresh, path)
                    break
                except FileNotFoundError:
                    if not left:
                        raise
            sync(path.parent)
        finally:
            fresh.unlink(missing_ok=True)
