"""Objects below a URL: the lowest layer of a store that is no folder.

An object store has no rename, no link and no folder; it has whole writes, and writes that only succeed where nothing
is there. Everything above is built from those two. What is promised here for every protocol:

- An object is whole or not there, for a reader at any moment and after a crash at any moment.
- Of any number of `create` of one key at once exactly one returns True. A client repeats a request whose answer was
  lost, and is told then that the key is there already: by itself. So the content decides, which must be the caller's
  alone (a token in it).
- Every look is a new request: nothing is remembered between two calls.
- Requests are repeated a few times (`pipeline.objects.remote`); what still fails is an OSError of one line.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from overfill.errors import UserError
from pipeline.masking import mask_text, mask_uri
from pipeline.objects.protocol import Conflict, Entry
from pipeline.record import sync

if TYPE_CHECKING:
    from pipeline.objects.protocol import Objects

__all__ = ["Bucket", "Entry"]

_LIBRARIES = {"s3": "s3fs", "gs": "gcsfs"}
"""Scheme -> what it needs beside this package; the extra is called as the scheme is."""
_SCHEMES = ("s3", "gs", "file", "memory")
_LONGEST = 300
"""Characters of another's message."""
_CONFLICTS = 5
"""Tries of a conditional write that met another request."""
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


class Bucket:
    """Objects below a URL: `s3://bucket/prefix`, `gs://bucket/prefix`, `file:///folder`, and `memory://name` for tests.

    Keys are relative, with `/`. Safe between threads, and pickles as its URL. Raises UserError for a URL that cannot be
    one, or whose library is missing; no request is made."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        """As given, without a slash at the end."""
        self._scheme, separator, self._place = self.url.partition("://")
        if not separator or self._scheme not in _SCHEMES:
            raise UserError(f"{mask_uri(url)}: not a place for objects; give s3://BUCKET/PREFIX or gs://BUCKET/PREFIX")
        if "@" in self._place.partition("/")[0] or mask_uri(url) != url:
            raise UserError(f"{mask_uri(url)}: credentials in a URL would reach logs; set them in the environment")
        if not self._place or (self._scheme == "file") != self._place.startswith("/"):
            wanted = "file:///FOLDER" if self._scheme == "file" else f"{self._scheme}://BUCKET/PREFIX"
            raise UserError(f"{url}: not a place for objects; give {wanted}")
        library = _LIBRARIES.get(self._scheme)
        if library and find_spec(library) is None:
            raise UserError(f"{url}: {library} is not installed; run: pip install 'overfill[{self._scheme}]'")
        self._connections: dict[int, Objects] = {}
        """By process: a parent's do not outlive a fork, and to drop them there would write to the parent's sockets."""

    def __reduce__(self) -> tuple[type[Bucket], tuple[str]]:
        return Bucket, (self.url,)

    def __repr__(self) -> str:
        return f"Bucket({self.url!r})"

    def check(self) -> None:
        """One request. Raises UserError, with the way out, when the bucket cannot be reached, is not there, or is closed
        to us."""
        objects = self._connect(quick=True)
        try:
            objects.check()
        except (OSError, *objects.failures) as error:
            raise UserError(f"{self.url}: {self._reason(error)}; {objects.advice(error)}") from None

    def list(self, prefix: str = "") -> dict[str, Entry]:
        """All objects below `prefix`, which ends with a slash or is empty; sorted by key."""
        with self._errors(prefix):
            found = dict(self._objects.walk(_prefix(prefix)))
        # Consoles leave `folder/` behind, and a key may hold `..`, which would be a place outside of any copy.
        return {key: found[key] for key in sorted(found) if not key.endswith("/") and _is_key(key)}

    def names(self, prefix: str = "") -> list[str]:
        """Names directly below `prefix`, of objects and of folders alike; sorted."""
        with self._errors(prefix):
            return sorted(set(self._objects.children(_prefix(prefix))) - {""})

    def read(self, key: str) -> bytes | None:
        """An object's content; None when it is not there."""
        try:
            with self._errors(key):
                return self._objects.read(_key(key))
        except FileNotFoundError:
            return None

    def write(self, key: str, data: bytes) -> None:
        """Write an object, in place of what is there."""
        with self._errors(key):
            self._objects.write(_key(key), data)

    def create(self, key: str, data: bytes) -> bool:
        """Write an object unless there is one; whether it was written. `data` is the caller's alone: see above."""
        from pipeline.objects.remote import pause

        for attempt in range(_CONFLICTS):
            with self._errors(key):
                try:
                    self._objects.create(_key(key), data)
                    return True
                except FileExistsError:
                    return self.read(key) == data
                except Conflict:
                    pause(attempt)
        raise OSError(errno.EBUSY, "others write and remove it all the time", f"{self.url}/{key}")

    def upload(self, path: Path, key: str) -> None:
        """A file of any size, whole or not at all."""
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, "no such file", os.fspath(path))
        with self._errors(key):
            self._objects.upload(path, _key(key))

    def download(self, key: str, path: Path) -> None:
        """Into a hidden file beside `path`, to disk, then renamed. Raises FileNotFoundError when the key is not there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with self._errors(key, fresh):
                self._objects.download(_key(key), fresh)
            sync(fresh)
            fresh.replace(path)
            sync(path.parent)
        finally:
            fresh.unlink(missing_ok=True)

    def remove(self, keys: Iterable[str]) -> None:
        """Remove those that are there."""
        with self._errors():
            self._objects.remove([_key(key) for key in keys])

    def remove_below(self, prefix: str) -> None:
        """Remove all objects below `prefix`."""
        with self._errors(prefix):
            self._objects.remove([key for key, _ in self._objects.walk(_prefix(prefix))])

    @property
    def _objects(self) -> Objects:
        process = os.getpid()
        if process not in self._connections:
            self._connections.setdefault(process, self._connect())  # of two threads the first one's is kept
        return self._connections[process]

    def _connect(self, quick: bool = False) -> Objects:
        if self._scheme == "file":
            from pipeline.objects.folder import Folder

            return Folder(Path(self._place))
        if self._scheme == "memory":
            from pipeline.objects.memory import Memory

            return Memory(self._place)
        from pipeline.objects.remote import ATTEMPTS, QUICK_ATTEMPTS

        if self._scheme == "s3":
            from pipeline.objects.s3 import S3

            return S3(self._place, QUICK_ATTEMPTS if quick else ATTEMPTS)
        from pipeline.objects.gs import GS

        return GS(self._place, QUICK_ATTEMPTS if quick else ATTEMPTS)

    @contextmanager
    def _errors(self, key: str = "", path: Path | None = None) -> Iterator[None]:
        """Whatever a library raises, as an OSError of one line about `key`; what is wrong with a local file stays so."""
        objects = self._objects
        try:
            yield
        except (OSError, *objects.failures) as error:
            if getattr(error, "filename", None) is not None:
                raise
            number = getattr(error, "errno", None) or _number(error)
            where = f"{self.url}/{key}"
            if path is not None and number in (errno.ENOSPC, errno.EDQUOT):
                where = os.fspath(path)
            # Not chained: the library's own message may hold what was masked.
            raise OSError(number, self._reason(error), where) from None

    def _reason(self, error: Exception) -> str:
        """A library's message in one line, without what must not be seen."""
        text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        text = mask_text(" ".join(text.split()), self.url)
        for name in _SECRETS:
            if secret := os.environ.get(name):
                text = text.replace(secret, "***")
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _number(error: Exception) -> int:
    """The number that Python makes the same class of error of."""
    for kind, number in (
        (FileNotFoundError, errno.ENOENT),
        (PermissionError, errno.EACCES),
        (TimeoutError, errno.ETIMEDOUT),
    ):
        if isinstance(error, kind):
            return number
    return errno.EIO


def _key(key: str) -> str:
    """The key itself. Raises ValueError for one that a file system would read as another."""
    if not _is_key(key):
        raise ValueError(f"not a key: {key!r}")
    return key


def _is_key(key: str) -> bool:
    return bool(key) and not key.startswith("/") and str(PurePosixPath(key)) == key and ".." not in key.split("/")


def _prefix(prefix: str) -> str:
    """The prefix itself, empty or a key and a slash."""
    if prefix and (not prefix.endswith("/") or not _key(prefix[:-1])):
        raise ValueError(f"not a prefix: {prefix!r}")
    return prefix
