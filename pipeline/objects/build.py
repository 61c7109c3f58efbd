"""One attempt at an artifact on object storage: from the lease, by a conditional write, to the record, by another.

Publishing, in this order: every process has delivered its files and then a list of them with digests
(`pipeline.objects.site`); the bucket's own list of names and sizes is compared; the lease is looked at; the record is
created where none is. A process that dies anywhere before leaves files that no record names, which the next one to
publish removes. A loser of the lease that wakes up between the last two steps either creates the record, of whole files under
its own attempt's name, or finds that there is one.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overfill.errors import UserError
from pipeline.build import Build, outcome_of_dead, plain
from pipeline.lease import BEAT, LeaseLost, attempt_folder, attempt_name
from pipeline.notes import read_note, time_of
from pipeline.objects.bucket import Bucket
from pipeline.objects.leases import BEAT_FILE, acquire
from pipeline.objects.mirror import ALTERED_NOTE, Listing, payload_prefix
from pipeline.objects.site import Courier, ObjectSite, delivered_files, work_folder
from pipeline.objects.store import ObjectStore
from pipeline.record import RECORD_FILE, FileEntry, Record
from pipeline.resume import Facts, Outcome
from pipeline.stage import Stage, StageRun
from pipeline.store import ATTEMPT_FILE, LOG_FILE, OUTCOME_FILE, STOPPED_FILE, AlteredArtifact

log = logging.getLogger(__name__)

_KEPT = "progress/metrics/"
"""Of the progress folder, what outlives publishing: the curve."""


@dataclass
class ObjectBuild(Build):
    """A running attempt. `folder` is the artifact's copy on this node; what is written goes to the bucket."""

    store: ObjectStore = None  # type: ignore[assignment]  # a base class with defaults leaves no other place
    key: str = ""
    """Key of the artifact's folder."""
    work: ExitStack = None  # type: ignore[assignment]
    """The folder of this process, and the courier of its log; closed at the end."""

    @classmethod
    def start(cls, store: ObjectStore, stage: Stage, facts: Facts, resources: Any, beat: float = BEAT) -> Build | None:
        """Take the lease of the next attempt; None when another process was faster or has published meanwhile.

        As `Build.begin`; raises UserError when the bucket cannot be written."""
        try:
            return cls._start(store, stage, facts, resources, beat)
        except OSError as error:
            raise UserError(
                f"{store.location}: cannot be written ({error}); choose another place with --store"
            ) from error

    @classmethod
    def _start(cls, store: ObjectStore, stage: Stage, facts: Facts, resources: Any, beat: float) -> Build | None:
        folder = store.create(stage)
        key = store.key(folder)
        with ExitStack() as stack:
            work = stack.enter_context(work_folder(store.root))
            lease = acquire(store.bucket, f"{key}/attempts/", facts.attempt, work / "attempt", beat)
            if lease is None:
                return None
            build = cls(stage, folder, lease, work / "staging", resources, time.time(), time.monotonic())
            build.store, build.key = store, key
            try:
                if not build._prepared(facts):
                    build._end("interrupted", "an earlier attempt has published meanwhile")
                    lease.release()
                    return None
                paths = StageRun(stage, {}, build.staging, build.progress, lease.folder)
                stack.enter_context(Courier(build.site, paths))
            except BaseException:
                lease.release()
                raise
            build.work = stack.pop_all()
        return build

    @property
    def site(self) -> ObjectSite:
        """How files come to where this attempt works, and go back."""
        return self.store.site(self.stage, self.lease.number)

    @property
    def log_path(self) -> Path:
        """Log of this attempt: while it runs, where it is written; later, where this node's copy of it is."""
        attempts = attempt_folder(self.folder / "attempts", self.lease.number)
        return (attempts if self.ended else self.lease.folder) / LOG_FILE

    @property
    def progress(self) -> Path:
        """The folder of this process for what outlives it: taken to the bucket by visits."""
        return self.lease.folder.parent / "progress"

    def publish(self, metrics: Mapping[str, Any] | None) -> Record:
        """Make what was delivered the artifact.

        Raises LeaseLost when another process has taken over, RuntimeError when the bucket has not what was delivered,
        TypeError for a metric that is neither number nor string; then nothing is published."""
        self.lease.require()  # whose successor has removed what was delivered
        record = self._record(metrics)
        self.store.mirror.forget(self.key)
        listing, prefix = self.store.mirror.listing(self.key), payload_prefix(self.lease.number)
        there = {name.removeprefix(prefix): entry.size for name, entry in listing.items() if name.startswith(prefix)}
        if problems := record.differs_from(there):
            raise RuntimeError(f"{self.store.location}/{self.key}: what was delivered is not there: {problems[0]}")
        self.lease.require()
        if not self.store.bucket.create(
            f"{self.key}/{RECORD_FILE}", (record.model_dump_json(indent=2) + "\n").encode()
        ):
            raise LeaseLost(f"{self.key}: was published meanwhile")
        self._end("done")
        try:
            self._clear()
        except OSError:  # the artifact is there; gc removes what is left
            log.warning("what %s does not need any more could not be removed", self.key, exc_info=True)
        return record

    def _clear(self) -> None:
        """What nobody needs once the record is there: step checkpoints, shards, lists of what was delivered, and files of
        attempts that never published. Not before: who has lost its lease may publish until then. Files of a record that
        was set aside stay, for people."""
        listing = self.store.mirror.listing(self.key)
        kept = {payload_prefix(self.lease.number), *set_aside(self.store.bucket, self.key, listing).values()}
        used_up = [key for key in listing if key.startswith("payload-") and f"{key.partition('/')[0]}/" not in kept]
        used_up += [key for key in listing if key.startswith("progress/") and key.count("/") > 1]
        used_up += [key for key in listing if "/delivered/" in key]
        self.store.bucket.remove(f"{self.key}/{key}" for key in used_up if not key.startswith(_KEPT))

    def _files(self) -> dict[str, FileEntry]:
        return delivered_files(self.site)

    def _seconds_before(self) -> float:
        attempts = self.store.mirror.refresh(self.key) / "attempts"
        return sum(time_of(read_note(path), "seconds") or 0.0 for path in attempts.glob(f"*/{OUTCOME_FILE}"))

    def release(self) -> None:
        """Give the lease back; an attempt that has no outcome yet was interrupted. A second call does nothing."""
        try:
            super().release()
        finally:
            self.lease.release()
            self.work.close()
            self.store.mirror.forget(self.key)
        try:
            self.store.mirror.refresh(self.key)
        except OSError:  # only the copy of the log is missing
            log.warning("%s cannot be looked at", self.key, exc_info=True)

    def _abandon(self, status: Outcome, error: str) -> None:
        """An error or a signal may come when the record is there already, or its answer was lost: then files stay."""
        try:
            raw = self.store.bucket.read(f"{self.key}/{RECORD_FILE}")
            if raw is None or attempt_of(raw) != self.lease.number:
                self.site.clear_staging()
        except OSError:  # nothing names these files, and the next one to publish removes them
            log.warning("what %s has delivered could not be removed", self.key, exc_info=True)
        self._end(status, error)

    def _note(self, path: Path, content: dict[str, Any]) -> None:
        of_attempt = path.parent == self.lease.folder
        place = f"attempts/{attempt_name(self.lease.number)}" if of_attempt else path.parent.name
        self.store.bucket.write(f"{self.key}/{place}/{path.name}", json.dumps(content, indent=2).encode())
        self.store.mirror.forget(self.key)

    # --- the beginning

    def _prepared(self, facts: Facts) -> bool:
        """Clear what dead attempts left, and make room; False when there is an artifact after all."""
        self._close_dead(facts)
        self._note(
            self.lease.folder / ATTEMPT_FILE,
            {
                "started": self.started,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "resources": plain(self.resources),
            },
        )
        self.store.create(self.stage)  # anew: until there was a lease, it may have been removed as garbage
        try:
            if self.store.record(self.stage) is not None:
                return False
        except AlteredArtifact as error:
            self._set_aside(error)
        self.store.bucket.remove([f"{self.key}/progress/{STOPPED_FILE}"])
        return True

    def _close_dead(self, facts: Facts) -> None:
        """Write down how the last attempt ended, if it could not say so itself."""
        listing = self.store.mirror.listing(self.key)
        outcome = f"attempts/{attempt_name(facts.attempt)}/{OUTCOME_FILE}"
        if facts.attempt and outcome not in listing:
            attempt = attempt_folder(self.store.mirror.refresh(self.key) / "attempts", facts.attempt)
            content = outcome_of_dead(attempt, facts)
            seconds = time_of(read_note(attempt / BEAT_FILE), "seconds") or 0.0
            content |= {"seconds": seconds, "ended": content["started"] + seconds}
            self.store.bucket.write(f"{self.key}/{outcome}", json.dumps(content, indent=2).encode())

    def _set_aside(self, error: AlteredArtifact) -> None:
        """Make room for a whole artifact. Under the lease, so that nobody's good one is meant."""
        bucket, aside = self.store.bucket, f"{self.key}/altered-{attempt_name(self.lease.number)}/{RECORD_FILE}"
        bucket.write(aside, bucket.read(f"{self.key}/{RECORD_FILE}") or b"")
        bucket.remove([f"{self.key}/{RECORD_FILE}", f"{self.key}/{ALTERED_NOTE}"])
        self.store.mirror.forget(self.key)
        log.warning("%s; its record is set aside as %s", error, aside)


def set_aside(bucket: Bucket, folder: str, listing: Listing) -> dict[str, str]:
    """`altered-0004/` -> `payload-0003/`: the altered records of an artifact, and whose files they name."""
    records = [key for key in listing if key.startswith("altered-") and key.endswith(f"/{RECORD_FILE}")]
    return {
        key.removesuffix(RECORD_FILE): payload_prefix(attempt_of(bucket.read(f"{folder}/{key}") or b""))
        for key in records
    }


def attempt_of(raw: bytes) -> int:
    """The attempt that a record names; 0, which no attempt has, when it is damaged."""
    try:
        return int(json.loads(raw)["attempt"])
    except (ValueError, KeyError, TypeError):
        return 0
