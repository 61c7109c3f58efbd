"""A store on object storage: the same artifacts, found the same way, with conditional writes in place of renames.

    <url>/<stage>/<label>_<identity>/
        identity.json               what the stage is
        attempts/0003/              lease.json, beat.json (`pipeline.objects.leases`), attempt.json, outcome.json, stop, logs;
                                    delivered/<token>.json: what one process has delivered, with digests
        progress/                   metrics/ (segments of lines), stopped.json, step checkpoints, finished shards
        payload-0003/               the files that attempt 3 has delivered
        record.json                 created by one conditional write, last: the artifact exists if and only if it does,
                                    and its files are those of the attempt that it names
        altered.json                what somebody who read it found damaged
        altered-0004/record.json    the record of a payload that was set aside when attempt 4 began
    <url>/.claims/<identity>        the folder of an identity, by conditional write
    <url>/.drivers/                 who is at work (`pipeline.drivers`)
    <url>/sweeps/<name>/            an experiment and what is remembered of it

An object store has no renames, so a payload is never moved: attempts write under names of their own, and the record
says whose files count. Whoever reads goes through the node's copy (`pipeline.objects.mirror`), which is laid out like
a store on disk: everything that reads a store reads this one.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path

from pydantic import ValidationError

from overfill.errors import UserError
from pipeline.lease import TTL, Heartbeat, Sighting
from pipeline.objects.bucket import Bucket
from pipeline.objects.flags import ObjectFlag
from pipeline.objects.leases import ObjectWatch, acquire, newest
from pipeline.objects.mirror import ALTERED_NOTE, Damaged, Mirror, payload_prefix
from pipeline.objects.site import ObjectSite
from pipeline.record import RECORD_FILE, Record
from pipeline.resume import Facts
from pipeline.stage import Stage, topological
from pipeline.stop import StopFlag
from pipeline.store import DRIVERS, IDENTITY_FILE, AlteredArtifact, Store

log = logging.getLogger(__name__)

MANY = 8
"""Stages of a kind from which on it is cheaper to list all of the kind."""
CLAIMS, PROBE = ".claims/", ".probe"


def open_at(location: str | Path, verify: bool = False) -> Store:
    """The store at a folder or a URL. Raises UserError for a URL that cannot be one."""
    return ObjectStore(str(location), verify=verify) if "://" in str(location) else Store(location, verify=verify)


class ObjectStore(Store):
    """Artifacts below a URL; `root` is this node's copy."""

    def __init__(self, url: str, ttl: float = TTL, verify: bool = False) -> None:
        self.bucket = Bucket(url)
        self.mirror = Mirror(self.bucket)
        super().__init__(self.mirror.root, ttl, verify)
        self.location = self.bucket.url

    def __reduce__(self) -> tuple[type[ObjectStore], tuple[str, float, bool]]:
        return type(self), (self.location, self._ttl, self._verify)

    @classmethod
    def reached(cls, url: str, verify: bool = False) -> ObjectStore:
        """The store at a URL that a user gave, after one request. Raises UserError when it cannot be reached."""
        store = cls(url, verify=verify)
        store.bucket.check()
        return store

    def prepare(self) -> None:
        """See that writes may be conditional here: everything rests on it. Raises UserError where they are not."""
        for _ in range(2):
            created = self.bucket.create(PROBE, uuid.uuid4().hex.encode())
        if created:
            raise UserError(
                f"{self.location}: replaces what is there though it is told not to (If-None-Match: *), so that two drivers "
                "would build the same; take a service with conditional writes"
            )

    def key(self, folder: Path) -> str:
        """An artifact's folder within the bucket, given its copy's."""
        return folder.relative_to(self.root).as_posix()

    # --- where things are

    def find(self, identity: str, name: str = "*") -> Path | None:
        """Copy's folder of an identity whatever its label, or None."""
        kinds = [name] if name != "*" else [kind for kind in self.bucket.names() if not kind.startswith(".")]
        found = [f"{kind}/{named}" for kind in kinds for named in self._names(self.root / kind).get(identity, ())]
        if len(found) > 1:  # two processes with different labels: the claim says which one
            found = [key for key in found if key == self._claimed(identity)] or found
        return self.root / found[0] if found else None

    def _claimed(self, identity: str) -> str:
        return (self.bucket.read(CLAIMS + identity) or b"").decode("utf-8", "replace")

    def _create(self, stage: Stage) -> Path:
        folder = self.find(stage.identity, stage.name)
        if folder is None:
            key = f"{stage.name}/{stage.folder_name}"
            if not self.bucket.create(CLAIMS + stage.identity, key.encode()):
                key = self._claimed(stage.identity)
                if key.rpartition("_")[2] != stage.identity:
                    raise UserError(f"{self.location}/{CLAIMS}{stage.identity}: is damaged; remove it")
            folder = self.root / key
        key = self.key(folder)
        if IDENTITY_FILE not in self.mirror.listing(key):
            content = {"identity": stage.identity, "label": stage.label, "description": stage.full_description}
            self.bucket.create(f"{key}/{IDENTITY_FILE}", json.dumps(content, indent=2).encode())
            self.mirror.forget(key)
        (folder / "progress").mkdir(parents=True, exist_ok=True)
        return folder

    def payload(self, stage: Stage) -> Path:
        """Folder of a stage's payload on this node; fetched first where the stage is finished."""
        folder = self.folder(stage)
        return self._fetched(folder) if self.record(stage) is not None else folder / "payload"

    def place(self, stage: Stage) -> str:
        """Where a stage's payload is, for people and for MLflow."""
        record, key = self.record(stage), self.key(self.folder(stage))
        return f"{self.location}/{key}/{payload_prefix(record.attempt if record else 1)}".rstrip("/")

    def progress(self, stage: Stage) -> Path:
        """Folder of what outlives attempts, as it is now."""
        folder = self.folder(stage)
        return self.mirror.refresh(self.key(folder)) / "progress"

    # --- artifacts

    def record(self, stage: Stage | str) -> Record | None:
        """Record of a finished stage, after a check of its files' sizes; None when it is not finished.

        Raises AlteredArtifact when the artifact is damaged."""
        return self.verify(stage, self._verify)

    def verify(self, stage: Stage | str, full: bool = True) -> Record | None:
        """As `record`, and with `full` with every file's SHA-256, for which it is fetched."""
        identity = stage if isinstance(stage, str) else stage.identity
        folder = self.find(identity, "*" if isinstance(stage, str) else stage.name)
        if folder is None:
            return None
        record = self._looked_at(folder, identity)
        if full and record is not None:
            self._fetched(folder)
        return record

    def ready(self, stage: Stage) -> bool:
        """Whether an input is there; its digests are compared on the node that reads it."""
        return self.record(stage) is not None

    def input_path(self, stage: Stage) -> Path:
        """Where an input will be on the node that reads it; nothing is fetched."""
        return self.folder(stage) / "payload"

    def _looked_at(self, folder: Path, identity: str) -> Record | None:
        key = self.key(folder)
        listing = self.mirror.listing(key)
        raw = self.mirror.content(key, RECORD_FILE)
        if raw is None:
            return None
        try:
            record = Record.model_validate_json(raw)
        except ValidationError:
            raise self._altered(folder, f"{RECORD_FILE} is damaged") from None
        if record.identity != identity:
            raise self._altered(folder, f"its record is that of {record.stage} {record.identity}")
        prefix = payload_prefix(record.attempt)
        there = {name.removeprefix(prefix): entry.size for name, entry in listing.items() if name.startswith(prefix)}
        problems = record.differs_from(there)
        if not problems and (note := _note_about(self.mirror.content(key, ALTERED_NOTE), record)):
            problems = [note]
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise self._altered(folder, problems[0] + more)
        return record

    def _fetched(self, folder: Path) -> Path:
        key = self.key(folder)
        try:
            return self.mirror.fetch(key)
        except Damaged as damage:
            self.mirror.report(key, damage)
            raise self._altered(folder, str(damage)) from damage

    def _altered(self, folder: Path, problem: str) -> AlteredArtifact:
        return AlteredArtifact(
            f"{self.location}/{self.key(folder)}: this artifact was altered: {problem}; run again to build it anew"
        )

    def _alike(self, stage: Stage) -> list[Path]:
        folders = super()._alike(stage)
        for folder in folders:
            self.mirror.refresh(self.key(folder))
        return folders

    def _names(self, parent: Path) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for name in sorted(self.mirror.names(parent.name)):
            names.setdefault(name.rpartition("_")[2], []).append(name)
        return names

    def _record_file(self, folder: Path) -> Path:
        return folder / RECORD_FILE

    # --- attempts

    def sighting(self, folder: Path) -> Sighting:
        """What is known of an artifact's lease; a silent holder is found dead by looking again and again."""
        watch = self._watches.setdefault(folder, ObjectWatch(folder / "attempts", self._ttl))
        self.mirror.refresh(self.key(folder))
        return watch.look()

    def ended_attempts(self, stages: Iterable[Stage]) -> dict[str, int]:
        """Identity -> number of the newest attempt that has ended and said how; 0 for none."""
        stages = list(stages)
        with self.look_once(stages):
            for stage in stages:
                if (folder := self.find(stage.identity, stage.name)) is not None:
                    self.mirror.refresh(self.key(folder))
            return super().ended_attempts(stages)

    def gather(self, targets: Sequence[Stage], explain: bool = True) -> dict[str, Facts]:
        """Facts of the targets and of what they need, by identity: what `resume.plan` takes."""
        with self.look_once(topological(targets)):
            return super().gather(targets, explain)

    def look_once(self, stages: Iterable[Stage]) -> AbstractContextManager[None]:
        """Around many looks at these stages: kinds of which there are many are listed at once."""
        kinds = Counter(stage.name for stage in stages)
        return self.mirror.one_look(sorted(kind for kind, count in kinds.items() if count >= MANY))

    def look_anew(self) -> None:
        """Others have just finished something, and a listing is believed for a second."""
        self.mirror.forget_all()

    # --- what moves

    def site(self, stage: Stage, attempt: int) -> ObjectSite:
        """How files come to where an attempt works, and go back."""
        inputs = {
            name: self.key(self.folder(source)) for name, source in stage.inputs.items() if isinstance(source, Stage)
        }
        return ObjectSite(self.bucket, self.key(self.folder(stage)), attempt, inputs)

    def stop_flag(self, stage: Stage) -> StopFlag | None:
        """Raised, it asks the newest attempt at a stage to save its position and end; None without any."""
        number = newest(self.bucket, f"{self.key(self.folder(stage))}/attempts/")
        return self.site(stage, number).stop_flag() if number else None

    def interrupt_flag(self) -> StopFlag:
        """A new flag, for a run to ask all its trials to end."""
        return ObjectFlag(self.bucket, f"tune/interrupt-{uuid.uuid4().hex[:12]}")

    def alone(self, folder: Path) -> ExitStack | None:
        """As on disk among this node's processes, and among nodes by a lease."""
        with ExitStack() as stack:
            lock = super().alone(folder)
            if lock is None:
                return None
            stack.enter_context(lock)
            place = folder / "tracker"
            self.mirror.forget(self.key(place))
            seen = self.sighting(place)
            attempts = f"{self.key(place)}/attempts/"
            lease = None if seen.state == "held" else acquire(self.bucket, attempts, seen.attempt, folder)
            if lease is None:
                return None
            stack.enter_context(lease)
            return stack.pop_all()

    def drivers(self) -> list[Path]:
        """Folders, on this node, of the drivers that say that they are at work here, or were killed."""
        return [self.root / DRIVERS / name for name in sorted(self.bucket.names(f"{DRIVERS}/"))]

    def lease(self, folder: Path, after: int) -> Heartbeat | None:
        """The lease of a folder behind its attempt `after`; None when another process was faster."""
        self.mirror.forget(self.key(folder))
        return acquire(self.bucket, f"{self.key(folder)}/attempts/", after, folder)

    def discard(self, folder: Path) -> None:
        """Remove a folder whose lease is over."""
        self.bucket.remove_below(f"{self.key(folder)}/")
        self.mirror.forget(self.key(folder))
        super().discard(folder)

    def bring(self, folder: Path, name: str) -> None:
        """Bring files called `name` of a sweep, or of all sweeps, to this node."""
        for key in self.bucket.list(f"{self.key(folder)}/"):
            if key.rpartition("/")[2] == name:
                self.bucket.download(key, _made(self.root / key))

    def kept(self, folder: Path, name: str) -> Path:
        """A copy beside this node's own file, which another process of this node may be writing."""
        copies = folder / "kept"
        with suppress(FileNotFoundError):
            self.bucket.download(self.key(folder / name), _made(copies / name))
        return copies

    def keep(self, path: Path) -> None:
        """A file of a sweep's own folder was written: take it along."""
        self.bucket.upload(path, self.key(path))


def _note_about(raw: bytes | None, record: Record) -> str:
    """What somebody found wrong with this very artifact."""
    try:
        note = json.loads(raw or b"{}")
    except ValueError:
        return ""
    return str(note.get("problem", "")) if note.get("digest") == record.digest else ""


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
