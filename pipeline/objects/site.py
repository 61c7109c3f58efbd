"""A process on some node works on a stage: what it reads comes to the node, what it makes goes to the bucket.

A visit has folders of its own below `.work/` in the node's copy. Inputs are fetched into the copy once per node. While
it lasts, a courier takes lines of metrics and logs away every few seconds. At its end, if it went well, what lies in the
staging folder is delivered: files first, then a list of them with digests, without which nothing counts.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from overfill.errors import UserError
from pipeline.fingerprint import digest_file
from pipeline.lease import Owner, attempt_name, parse_owner
from pipeline.notes import read_note
from pipeline.objects.bucket import Bucket
from pipeline.objects.flags import ObjectFlag
from pipeline.objects.mirror import SEGMENTS, Damaged, Mirror, payload_prefix
from pipeline.record import RECORD_FILE, FileEntry, Record, payload_files, write_json
from pipeline.stage import StageRun
from pipeline.stop import STOP_FILE

log = logging.getLogger(__name__)

WORK, OWNER_FILE = ".work", "owner.json"
COURIER_S = 3.0
SEGMENT_BYTES = 256 * 1024
"""A segment of metrics is rewritten until it is as large as this."""
UPLOADS = 8
SHARDS = "progress/shards/"
LOGS = (".txt", ".log")


@dataclass(frozen=True)
class ObjectSite:
    """Where an attempt's files are. It travels to workers, and compares as what it names."""

    bucket: Bucket = field(compare=False)
    folder: str
    """Key of the artifact's folder."""
    attempt: int
    inputs: dict[str, str] = field(hash=False)
    """Input name -> key of the folder of the artifact that it is."""

    @contextmanager
    def visit(self, run: StageRun) -> Iterator[StageRun]:
        """The run with folders of this node. Raises UserError for an input that is not what its record says."""
        mirror = Mirror(self.bucket)
        inputs = {name: self.fetch(name) if name in self.inputs else path for name, path in run.inputs.items()}
        with work_folder(mirror.root) as work:
            local = replace(
                run, inputs=inputs, staging=work / "staging", progress=work / "progress", attempt=work / "attempt"
            )
            self._bring_shards(local)
            with Courier(self, local) as courier:
                yield local
                courier.flush()
            self._deliver(local)

    def fetch(self, name: str) -> Path:
        """The payload of an input, on this node. Raises UserError when it is not what its record says."""
        key, mirror = self.inputs[name], Mirror(self.bucket)
        try:
            return mirror.fetch(key)
        except Damaged as damage:
            mirror.report(key, damage)
            raise UserError(f"{self.bucket.url}/{key}: this artifact was altered: {damage}; run again") from damage

    def place(self, name: str) -> str:
        """The URL of the payload of an input, which is here."""
        record = Record.model_validate_json((self.fetch(name) / RECORD_FILE).read_bytes())
        return f"{self.bucket.url}/{self.inputs[name]}/{payload_prefix(record.attempt)}".rstrip("/")

    def send(self, run: StageRun, path: Path) -> None:
        """Take a file of the visit's progress folder away now."""
        self.bucket.upload(path, f"{self.folder}/progress/{path.relative_to(run.progress).as_posix()}")

    def clear_staging(self) -> None:
        """Forget what visits of this attempt have delivered."""
        self.bucket.remove_below(self.delivered)
        self.bucket.remove_below(self.payload)

    def stop_flag(self) -> ObjectFlag:
        """What is raised when the attempt shall save its position and end."""
        return ObjectFlag(self.bucket, f"{self.folder}/attempts/{attempt_name(self.attempt)}/{STOP_FILE}")

    @property
    def logs(self) -> str:
        """The URL of the attempt's logs."""
        return f"{self.bucket.url}/{self.folder}/attempts/{attempt_name(self.attempt)}"

    @property
    def payload(self) -> str:
        """Where the attempt's files go."""
        return f"{self.folder}/{payload_prefix(self.attempt)}"

    @property
    def delivered(self) -> str:
        """Where the lists of them go."""
        return f"{self.folder}/attempts/{attempt_name(self.attempt)}/delivered/"

    def _bring_shards(self, run: StageRun) -> None:
        prefix = f"{self.folder}/"
        for key in self.bucket.list(prefix + SHARDS):
            path = run.progress.parent / key.removeprefix(prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.bucket.download(key, path)

    def _deliver(self, run: StageRun) -> None:
        files = payload_files(run.staging)
        if not files:
            return
        listed = {name: FileEntry(size=path.stat().st_size, sha256=digest_file(path)) for name, path in files}
        with ThreadPoolExecutor(UPLOADS) as pool:
            list(pool.map(lambda file: self.bucket.upload(file[1], self.payload + file[0]), files))
        content = {name: entry.model_dump() for name, entry in listed.items()}
        self.bucket.write(f"{self.delivered}{uuid.uuid4().hex}.json", json.dumps(content).encode())


_COURIERS: dict[Path, Courier] = {}
"""Progress folder of a visit of this process -> its courier."""


class Courier:
    """While it is entered, a thread takes metrics and logs to the bucket; it never raises into the work."""

    def __init__(self, site: ObjectSite, run: StageRun) -> None:
        self._site, self._run = site, run
        self._segments: str | None = None
        self._segment, self._start, self._sent = 0, 0, 0
        self._logs: dict[Path, int] = {}
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._loop, name="courier", daemon=True)

    @staticmethod
    def flush_of(progress: Path) -> None:
        """Take everything along of the visit of this process that has this progress folder."""
        _COURIERS[progress].flush()

    def __enter__(self) -> Courier:
        _COURIERS[self._run.progress] = self
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        del _COURIERS[self._run.progress]
        self._end.set()
        self._thread.join()
        try:
            self.flush()  # for the log of what went wrong
        except OSError:
            log.warning("the last lines of %s could not be taken to the bucket", self._run.attempt, exc_info=True)

    def flush(self) -> None:
        """Take everything along that is new. Raises OSError when lines of metrics do not arrive."""
        with self._lock:
            self._send_metrics()
            try:
                self._send_logs()
            except OSError:  # they are for people, and end no training
                log.warning("logs are on their way later", exc_info=True)

    def _loop(self) -> None:
        while not self._end.wait(COURIER_S):
            try:
                self.flush()
            except OSError:
                log.warning("metrics and logs are on their way later", exc_info=True)

    def _send_metrics(self) -> None:
        path = self._run.metrics_path
        if not path.exists():
            return
        with path.open("rb") as stream:
            stream.seek(self._start)
            content = stream.read()
        content = content[: content.rfind(b"\n") + 1]
        if len(content) <= self._sent:
            return
        self._site.bucket.write(f"{self._segment_name()}-{self._segment:06d}.jsonl", content)
        self._sent = len(content)
        if len(content) >= SEGMENT_BYTES:
            self._segment, self._start, self._sent = self._segment + 1, self._start + len(content), 0

    def _segment_name(self) -> str:
        """In the order of their names, segments are in the order of their writers: a later one's lines win."""
        if self._segments is None:
            prefix = f"{self._site.folder}/{SEGMENTS}"
            before = len({key.rpartition("-")[0] for key in self._site.bucket.list(prefix)})
            attempt = attempt_name(self._site.attempt)
            self._segments = f"{prefix}{attempt}-{before:04d}-{uuid.uuid4().hex[:8]}"
        return self._segments

    def _send_logs(self) -> None:
        for path in sorted(self._run.attempt.iterdir()):
            size = path.stat().st_size
            if path.suffix in LOGS and self._logs.get(path) != size:
                key = f"{self._site.folder}/attempts/{attempt_name(self._site.attempt)}/{path.name}"
                self._site.bucket.write(key, path.read_bytes())
                self._logs[path] = size


@contextmanager
def work_folder(root: Path) -> Iterator[Path]:
    """A folder of this process' own with `staging`, `progress` and `attempt` in it; what dead ones left is removed."""
    parent = root / WORK
    work = parent / uuid.uuid4().hex
    for name in ("staging", "progress", "attempt"):
        (work / name).mkdir(parents=True)
    write_json(work / OWNER_FILE, asdict(Owner.here()))
    for other in dead_work(root):
        shutil.rmtree(other, ignore_errors=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def dead_work(root: Path) -> list[Path]:
    """Folders of processes that have ended without removing them."""
    owners = {path: parse_owner(read_note(path / OWNER_FILE)) for path in sorted((root / WORK).glob("*"))}
    return [path for path, owner in owners.items() if owner is not None and owner.is_gone()]


def delivered_files(site: ObjectSite) -> dict[str, FileEntry]:
    """Everything that visits of an attempt have delivered."""
    found: dict[str, FileEntry] = {}
    for key in site.bucket.list(site.delivered):
        raw = site.bucket.read(key)
        for name, entry in json.loads(raw or b"{}").items():
            found[name] = FileEntry.model_validate(entry)
    return found
