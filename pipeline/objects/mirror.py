"""A node's copy of what it reads of an object store: notes as they change, payloads as they are needed.

    $OVERFILL_CACHE (~/.cache/overfill)/<digest of the URL>/
        <stage>/<label>_<identity>/     laid out as a store on disk, so that whoever reads one reads this
            payload/                    fetched whole, each file compared with the record's SHA-256, then renamed
            progress/metrics.jsonl      the lines of all segments, appended in the order in which they were found
            progress/…                  of step checkpoints and shards outlines: files of the right size without content
            .versions.json              which version of which object each note is
        .work/<token>/                  where one process writes what it will deliver (`pipeline.objects.site`)
        tune/, sweeps/                  of the driver

All of it may be removed while nothing runs. Processes of a node share it under locks. A listing is believed for a
second: what a decision rests on is looked at again where it is taken, by a conditional write.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from overfill.errors import UserError
from pipeline.fingerprint import digest_file, remember_digest
from pipeline.lease import host_key
from pipeline.objects.bucket import Bucket, Entry
from pipeline.record import RECORD_FILE, Record, read_json, write_json, write_text

CACHE_VARIABLE = "OVERFILL_CACHE"
LISTING_S = 1.0
"""How long a listing is believed."""
DOWNLOADS = 8
"""Files that are fetched at once."""
METRICS, SEGMENTS = "progress/metrics.jsonl", "progress/metrics/"
ALTERED_NOTE = "altered.json"
_VERSIONS, _VERIFIED = ".versions.json", ".verified.json"
_NOTE = re.compile(
    r"(record|identity|altered)\.json|attempts/\d+/(lease|beat|attempt|outcome)\.json|progress/stopped\.json"
    r"|progress/[^/]+/[^/]+/(complete|rank-\d+)\.json"
)
_OUTLINE = re.compile(r"progress/(?:shards/[^/]+/[^/]+\.json|[^/]+/step-[^/]+/.+)")
"""What a look needs the name and size of, and nobody reads here."""
_ATTEMPT = re.compile(r"attempts/(\d+)/")
_LOG = re.compile(r"attempts/(\d+)/[^/]+\.(?:txt|log)")

Listing = Mapping[str, Entry]
"""Keys within an artifact's folder."""


class Damaged(Exception):
    """What came from the bucket is not what the record says; `str` is one line."""


def cache_root() -> Path:
    """Where this node keeps copies."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "overfill").expanduser().absolute()


def payload_prefix(attempt: int) -> str:
    """Where an attempt delivers, within its artifact's folder."""
    return f"payload-{attempt:04d}/"


class Mirror:
    """The copy of one bucket on this node. Thread-safe."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.root = cache_root() / hashlib.sha256(bucket.url.encode()).hexdigest()[:12]
        self._listings: dict[str, tuple[float, Listing]] = {}
        self._names: dict[str, tuple[float, list[str]]] = {}
        self._seen: dict[str, Listing] = {}
        self._whole: dict[str, float] = {}
        self._contents: dict[str, tuple[str, bytes | None]] = {}
        self._look = threading.local()
        self._anew = -math.inf

    # --- looking

    def names(self, kind: str) -> list[str]:
        """Names of the artifacts' folders of one kind of stage."""
        known = self._names.get(kind)
        if known is None or not self._believed(known[0]):
            began = time.monotonic()
            self._names[kind] = known = (began, self.bucket.names(f"{kind}/"))
        return known[1]

    def listing(self, folder: str) -> Listing:
        """What is in an artifact's folder."""
        known = self._listings.get(folder)
        if known is None or not self._believed(known[0]):
            began = time.monotonic()
            found = self.bucket.list(f"{folder}/")
            self._listings[folder] = known = (began, _within(found, folder))
        return known[1]

    def _believed(self, looked: float) -> bool:
        """Whether a listing is recent, or no older than the look that this thread is in."""
        began: float | None = getattr(self._look, "began", None)
        if looked < self._anew:
            return False
        return time.monotonic() - looked < LISTING_S or (began is not None and looked >= began)

    def content(self, folder: str, key: str) -> bytes | None:
        """What is in an object of an artifact's folder, read again only when its version is another one."""
        entry = self.listing(folder).get(key)
        if entry is None:
            return None
        known = self._contents.get(f"{folder}/{key}")
        if known is None or known[0] != entry.version:
            known = (entry.version, self.bucket.read(f"{folder}/{key}"))
            self._contents[f"{folder}/{key}"] = known
        return known[1]

    def forget_all(self) -> None:
        """Believe no listing of before: others say that they have finished."""
        self._anew = time.monotonic()

    def forget(self, folder: str) -> None:
        """Look again the next time: something was written here."""
        self._listings.pop(folder, None)
        self._names.pop(folder.partition("/")[0], None)

    @contextmanager
    def one_look(self, kinds: Iterable[str] = ()) -> Iterator[None]:
        """Inside, this thread looks at everything once; of these kinds at all artifacts, with few requests."""
        outer: float | None = getattr(self._look, "began", None)
        self._look.began = began = time.monotonic() if outer is None else outer
        try:
            for kind in kinds:
                if self._whole.get(kind, -math.inf) < max(began, self._anew):
                    self._list_whole(kind)
            yield
        finally:
            self._look.began = outer

    def _list_whole(self, kind: str) -> None:
        looked = time.monotonic()
        by_folder: dict[str, dict[str, Entry]] = {}
        for key, entry in self.bucket.list(f"{kind}/").items():
            folder, _, rest = key.removeprefix(f"{kind}/").partition("/")
            by_folder.setdefault(folder, {})[rest] = entry
        self._names[kind] = (looked, sorted(by_folder))
        self._listings |= {f"{kind}/{name}": (looked, found) for name, found in by_folder.items()}
        self._whole[kind] = looked

    # --- notes

    def local(self, folder: str) -> Path:
        """Where the copy of an artifact's folder is."""
        return self.root / folder

    def refresh(self, folder: str) -> Path:
        """Bring the notes of an artifact's folder up to date; returns their place."""
        local, listing = self.local(folder), self.listing(folder)
        looked = self._listings[folder][0]
        attempts = (_ATTEMPT.match(key) for key in listing)
        newest = max((int(match[1]) for match in attempts if match), default=0)
        wanted = {key: entry for key, entry in listing.items() if _wanted(key, newest)}
        if self._seen.get(folder) == wanted and local.is_dir():
            return local
        local.mkdir(parents=True, exist_ok=True)
        with locked(local / ".lock"):
            if self._update(folder, local, wanted, looked):
                self._seen[folder] = wanted
        return local

    def _update(self, folder: str, local: Path, wanted: Listing, looked: float) -> bool:
        """Whether it was done: another process of this node may have looked later, and its look stays."""
        versions: dict[str, Any] = readable(local / _VERSIONS)
        host, last = versions.pop("", [None, 0.0])
        if host == host_key() and last > looked:
            return False
        before = dict(versions)
        if not (local / METRICS).exists():
            versions = {key: value for key, value in versions.items() if not key.startswith(SEGMENTS)}
        try:
            for key, entry in sorted(wanted.items()):
                self._bring(folder, local, key, entry, versions)
            for key in [key for key in versions if key not in wanted and not key.startswith(SEGMENTS)]:
                if not _LOG.fullmatch(key):  # logs of earlier attempts stay
                    _remove(local / key, local)
                    del versions[key]
        finally:  # what was appended is not to be appended again
            if versions != before:
                write_json(local / _VERSIONS, versions | {"": [host_key(), looked]})
        return True

    def _bring(self, folder: str, local: Path, key: str, entry: Entry, versions: dict[str, Any]) -> None:
        segment, known = key.startswith(SEGMENTS), versions.get(key)
        if known is not None and known[0] == entry.version and (segment or (local / key).exists()):
            return
        (local / key).parent.mkdir(parents=True, exist_ok=True)
        if _is_outline(key):
            os.truncate(_touched(local / key), entry.size)
            versions[key] = [entry.version, 0]
            return
        content = self.bucket.read(f"{folder}/{key}")
        if content is None:
            return
        if segment:
            _append(local / METRICS, content[known[1] if known else 0 :])
        else:
            write_text(local / key, content.decode("utf-8", "replace"))
        versions[key] = [entry.version, len(content)]

    # --- payloads

    def fetch(self, folder: str) -> Path:
        """The payload of a finished artifact on this node, whole and verified.

        Raises UserError when there is none, Damaged when it is not what its record says."""
        raw = self.bucket.read(f"{folder}/{RECORD_FILE}")
        if raw is None:
            raise UserError(f"{self.bucket.url}/{folder}: this artifact was removed while it was in use; run again")
        try:
            record = Record.model_validate_json(raw)
        except ValidationError:
            raise Damaged(f"{RECORD_FILE} is damaged") from None
        local = self.local(folder)
        local.mkdir(parents=True, exist_ok=True)
        with locked(local / ".fetch.lock"):
            payload = local / "payload"
            if not _is_copy(payload, raw, record):
                self._fetch(folder, raw, record, payload)
        return payload

    def report(self, folder: str, damage: Damaged) -> None:
        """Leave a note that the artifact that is there now was found damaged, so that the next run builds it anew."""
        raw = self.bucket.read(f"{folder}/{RECORD_FILE}")
        try:
            digest = None if raw is None else Record.model_validate_json(raw).digest
        except ValidationError:
            digest = None  # every look sees that by itself
        if digest is not None:
            note = {"problem": str(damage), "digest": digest}
            self.bucket.write(f"{folder}/{ALTERED_NOTE}", json.dumps(note).encode())
        self.forget(folder)

    def _fetch(self, folder: str, raw: bytes, record: Record, payload: Path) -> None:
        fresh = payload.with_name("payload.fetching")
        for leftover in (payload, fresh):
            shutil.rmtree(leftover, ignore_errors=True)
        fresh.mkdir()
        prefix = f"{folder}/{payload_prefix(record.attempt)}"

        def get(name: str) -> None:
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            for last in (False, True):
                try:
                    self.bucket.download(prefix + name, fresh / name)
                except FileNotFoundError as error:
                    raise Damaged(f"{name} is missing") from error
                if digest_file(fresh / name) == record.files[name].sha256:
                    return
                if last:  # twice the same: it was not the way here
                    raise Damaged(f"{name} has another SHA-256 than its record")

        try:
            with ThreadPoolExecutor(DOWNLOADS) as pool:
                list(pool.map(get, record.files))
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        (fresh / RECORD_FILE).write_bytes(raw)
        fresh.rename(payload)
        verified = {name: stamp(payload / name) for name in record.files}
        write_json(payload.with_name(_VERIFIED), verified)
        _is_copy(payload, raw, record)


def _within(found: Mapping[str, Entry], folder: str) -> dict[str, Entry]:
    return {key.removeprefix(f"{folder}/"): entry for key, entry in found.items()}


def _wanted(key: str, newest: int) -> bool:
    if _NOTE.fullmatch(key) or key.startswith(SEGMENTS) or _is_outline(key):
        return True
    log = _LOG.fullmatch(key)
    return log is not None and int(log[1]) == newest


def _is_outline(key: str) -> bool:
    return _OUTLINE.fullmatch(key) is not None and not _NOTE.fullmatch(key)


def _touched(path: Path) -> Path:
    path.touch()
    return path


def _remove(path: Path, top: Path) -> None:
    """Remove a file and the folders that it leaves empty."""
    path.unlink(missing_ok=True)
    for folder in path.parents:
        if folder == top or any(folder.iterdir()):
            return
        folder.rmdir()


def readable(path: Path) -> dict[str, Any]:
    """A note of this node's own; empty when it is not there or damaged."""
    try:
        return read_json(path) or {}
    except ValueError:
        return {}  # then everything is fetched again


def _append(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as stream:
        stream.write(content)


def _is_copy(payload: Path, raw: bytes, record: Record) -> bool:
    """Whether the payload is that of this record and not written to since it was verified; its digests are then known."""
    try:
        if (payload / RECORD_FILE).read_bytes() != raw:
            return False
        verified = readable(payload.with_name(_VERIFIED))
        if any(stamp(payload / name) != verified.get(name) for name in record.files):
            return False
    except OSError:
        return False
    for name, entry in record.files.items():
        remember_digest(payload / name, entry.sha256)
    return True


def stamp(path: Path) -> list[int]:
    """What changes when somebody writes to a file."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def fetch_all(bucket: Bucket, prefix: str, folder: Path) -> None:
    """Everything below a prefix into a folder. Raises FileNotFoundError for what is removed meanwhile."""
    folder.mkdir(parents=True)
    with ThreadPoolExecutor(DOWNLOADS) as pool:
        list(pool.map(lambda key: bucket.download(key, folder / key.removeprefix(prefix)), bucket.list(prefix)))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone on this node; the system releases the lock of a process that dies."""
    with path.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
