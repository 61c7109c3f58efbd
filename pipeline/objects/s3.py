"""s3://: Amazon's S3, and what speaks its protocol and has conditional writes (`If-None-Match: *`).

Credentials, region and endpoint come from where Amazon's own tools take them: AWS_ACCESS_KEY_ID, AWS_PROFILE,
AWS_ENDPOINT_URL and so on. Listings and deletions go to the protocol itself: s3fs's own ask several times where
nothing is there, take `[` and `*` in keys for patterns, and keep silent about what could not be removed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import s3fs
from aiohttp import ClientError as BodyError
from botocore.exceptions import (
    BotoCoreError,
    ConnectionError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)

from pipeline.objects import remote
from pipeline.objects.protocol import Conflict, Entry

_DELETED_AT_ONCE = 1_000
_MOST_PARTS = 10_000
_TIMEOUT_S = 60
"""Of an answer; s3fs waits for 15 s, in which a slow line does not take a part."""
_CONNECT_TIMEOUT_S = 5


class S3(remote.Remote):
    """The objects below `bucket/prefix`."""

    failures: tuple[type[Exception], ...] = (BotoCoreError, BodyError, ValueError)
    """ValueError: an endpoint that is no URL."""

    def _open(self) -> Any:
        config = {
            "retries": {"mode": "standard", "total_max_attempts": self._attempts},
            "connect_timeout": _CONNECT_TIMEOUT_S,
            "read_timeout": _TIMEOUT_S,
            "max_pool_connections": 4 * remote.PARALLEL,
        }
        filesystem = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False, config_kwargs=config)
        filesystem.retries = 1  # botocore's own retries know which errors pass; s3fs's would multiply them
        return filesystem

    def check(self) -> None:
        """One listing of one key."""
        self._fs.call_s3("list_objects_v2", Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)

    def advice(self, error: Exception) -> str:
        """In the words of Amazon's variables."""
        if isinstance(error, NoCredentialsError | PartialCredentialsError | ProfileNotFound):
            return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        if isinstance(error, PermissionError):
            return "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, and what they may do with this bucket"
        if isinstance(error, FileNotFoundError):
            return "create it, or correct its name; AWS_ENDPOINT_URL names a store that is not Amazon's"
        if isinstance(error, ConnectionError | HTTPClientError | TimeoutError | ValueError):
            return "set AWS_ENDPOINT_URL to the store's address; without it, Amazon is asked"
        return "check its name, AWS_ENDPOINT_URL and AWS_DEFAULT_REGION"

    def walk(self, prefix: str) -> Iterator[tuple[str, Entry]]:
        """From pages of a thousand."""
        for page in self._pages(prefix):
            for found in page.get("Contents", ()):
                entry = Entry(found["Size"], found["ETag"], found["LastModified"].timestamp())
                yield found["Key"].removeprefix(self._prefix), entry

    def children(self, prefix: str) -> Iterator[str]:
        """From pages of a thousand names."""
        for page in self._pages(prefix, Delimiter="/"):
            found = [folder["Prefix"] for folder in page.get("CommonPrefixes", ())]
            found += [object_["Key"] for object_ in page.get("Contents", ())]
            yield from (key.removeprefix(self._prefix + prefix).rstrip("/") for key in found)

    def _pages(self, prefix: str, **arguments: str) -> Iterator[dict[str, Any]]:
        while True:
            page = self._fs.call_s3("list_objects_v2", Bucket=self._bucket, Prefix=self._prefix + prefix, **arguments)
            yield page
            if not page.get("IsTruncated"):
                return
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    def create(self, key: str, data: bytes) -> None:
        """A PUT, or the end of a multipart upload, with `If-None-Match: *`."""
        try:
            self._fs.pipe_file(self._path(key), data, mode="create")
        except OSError as error:
            code = _code(error)
            if code in (
                "PreconditionFailed",
                "412",
            ):  # s3fs makes FileExistsError of Amazon's answer, not of all others'
                raise FileExistsError(str(error)) from error
            if code in ("ConditionalRequestConflict", "OperationAborted", "409"):
                raise Conflict(str(error)) from error
            raise

    def upload(self, path: Path, key: str) -> None:
        """In parts where it is large; an upload that fails is aborted, so that its parts are not kept."""
        part = max(remote.PART, math.ceil(path.stat().st_size / _MOST_PARTS))
        self._fs.put_file(str(path), self._path(key), chunksize=part, max_concurrency=remote.PARALLEL)

    def _content(self, key: str) -> bytes:
        return self._fs.cat_file(self._path(key), max_concurrency=1)  # with more it asks for the size first

    def _fetch(self, key: str, path: Path) -> None:
        self._fs.get_file(self._path(key), str(path), chunksize=remote.PART, max_concurrency=remote.PARALLEL)

    def _entry(self, key: str) -> Entry:
        found = self._fs.call_s3("head_object", Bucket=self._bucket, Key=self._prefix + key)
        return Entry(found["ContentLength"], found["ETag"], found["LastModified"].timestamp())

    def remove(self, keys: Sequence[str]) -> None:
        """A thousand with one request."""
        for start in range(0, len(keys), _DELETED_AT_ONCE):
            batch = [{"Key": self._prefix + key} for key in keys[start : start + _DELETED_AT_ONCE]]
            answer = self._fs.call_s3("delete_objects", Bucket=self._bucket, Delete={"Objects": batch, "Quiet": True})
            if errors := answer.get("Errors"):
                first = errors[0]
                raise OSError(
                    f"{len(errors)} objects were not removed; {first.get('Key')}: {first.get('Code')} {first.get('Message')}"
                )


def _code(error: OSError) -> str:
    """S3's own code of an error that s3fs has translated."""
    response: Any = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))
