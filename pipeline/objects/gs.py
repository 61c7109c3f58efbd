"""gs://: Google Cloud Storage.

Credentials come from where Google's own tools take them: GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth`, or the
machine's own account; STORAGE_EMULATOR_HOST names another endpoint. gcsfs's plain file system is used, not the one
that asks for each bucket's kind through gRPC first, and the protocol itself where `s3.py` does so, too."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from aiohttp import ClientError
from gcsfs.core import GCSFileSystem
from gcsfs.retry import HttpError, NonRetryableError
from google.auth.exceptions import GoogleAuthError
from requests import RequestException

from pipeline.objects import remote
from pipeline.objects.protocol import Conflict, Entry

logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback of every error that it raises
_CHECK_S = 5.0
"""For the request that checks a place; gcsfs's own six tries take half a minute."""
_CONFLICT, _TOO_MANY = 409, 429


class GS(remote.Remote):
    """The objects below `bucket/prefix`. gcsfs's own six tries of a request cannot be changed."""

    failures: tuple[type[Exception], ...] = (
        *(HttpError, NonRetryableError, ClientError, RequestException, GoogleAuthError),
        *(ValueError, RuntimeError),  # of an answer that gcsfs does not know
    )

    def _open(self) -> Any:
        return GCSFileSystem(skip_instance_cache=True, use_listings_cache=False)

    def check(self) -> None:
        """One listing of one object."""
        question = {"prefix": self._prefix, "maxResults": 1}
        try:
            self._fs.call("GET", "b/{}/o", self._bucket, json_out=True, timeout=_CHECK_S, **question)
        except TimeoutError:
            raise TimeoutError(f"no answer within {_CHECK_S:.0f} s") from None

    def advice(self, error: Exception) -> str:
        """In the words of Google's tools."""
        if isinstance(error, FileNotFoundError):
            return "create the bucket, or correct its name"
        if isinstance(error, ClientError | TimeoutError | RequestException):
            return "Google cannot be reached; STORAGE_EMULATOR_HOST names another address"
        return "set GOOGLE_APPLICATION_CREDENTIALS, or run: gcloud auth application-default login"

    def walk(self, prefix: str) -> Iterator[tuple[str, Entry]]:
        """From pages of a thousand."""
        for page in self._pages(prefix):
            for found in page.get("items", ()):
                yield found["name"].removeprefix(self._prefix), _entry(found)

    def children(self, prefix: str) -> Iterator[str]:
        """From pages of a thousand names."""
        for page in self._pages(prefix, delimiter="/"):
            found = [*page.get("prefixes", ()), *(item["name"] for item in page.get("items", ()))]
            yield from (key.removeprefix(self._prefix + prefix).rstrip("/") for key in found)

    def _pages(self, prefix: str, **arguments: str) -> Iterator[dict[str, Any]]:
        while True:
            page = self._fs.call(
                "GET", "b/{}/o", self._bucket, prefix=self._prefix + prefix, json_out=True, **arguments
            )
            yield page
            if "nextPageToken" not in page:
                return
            arguments["pageToken"] = page["nextPageToken"]

    def create(self, key: str, data: bytes) -> None:
        """An upload with `ifGenerationMatch=0`; FileExistsError is gcsfs's own."""
        try:
            self._fs.pipe_file(self._path(key), data, mode="create")
        except HttpError as error:
            if error.code in (_CONFLICT, _TOO_MANY):
                raise Conflict(str(error)) from error
            raise

    def upload(self, path: Path, key: str) -> None:
        """In one session, whose object appears with the last byte; one that fails is deleted."""
        self._fs.put_file(str(path), self._path(key))

    def _content(self, key: str) -> bytes:
        return self._fs.cat_file(self._path(key))

    def _fetch(self, key: str, path: Path) -> None:
        self._fs.get_file(self._path(key), str(path))

    def _entry(self, key: str) -> Entry:
        return _entry(self._fs.call("GET", "b/{}/o/{}", self._bucket, self._prefix + key, json_out=True))

    def remove(self, keys: Sequence[str]) -> None:
        """Several at once; Google has no deletion of many."""

        def remove(key: str) -> None:
            with suppress(FileNotFoundError):
                self._fs.rm_file(self._path(key))

        with ThreadPoolExecutor(2 * remote.PARALLEL) as pool:
            list(pool.map(remove, keys))


def _entry(found: dict[str, Any]) -> Entry:
    written = datetime.fromisoformat(found["updated"]).timestamp()
    return Entry(int(found["size"]), str(found["generation"]), written)
