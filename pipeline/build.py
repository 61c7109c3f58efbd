"""One attempt at an artifact: from taking the lease to publishing the payload by one rename.

Publishing, in this order: every file of the staging folder goes to disk and is digested; the record is written into the
same folder, to disk; the lease is checked; the folder is renamed to `payload`. Whatever instant a process is killed at,
there is either no payload or a whole one. A loser of the lease that wakes up between the check and the rename either
publishes a whole payload, which the new holder then finds in its way and uses, or finds its staging folder gone.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overfill.errors import UserError
from pipeline.fingerprint import digest_file, remember_digest
from pipeline.lease import BEAT, LEASE_FILE, Heartbeat, LeaseLost, acquire, attempt_folder
from pipeline.notes import read_note, text_of, time_of
from pipeline.record import (
    RECORD_FILE,
    FileEntry,
    Record,
    libraries,
    payload_files,
    plain_metrics,
    source_commit,
    sync,
    write_json,
    write_text,
)
from pipeline.resume import Facts, Outcome
from pipeline.stage import Stage
from pipeline.store import ATTEMPT_FILE, LOG_FILE, OUTCOME_FILE, STOPPED_FILE, AlteredArtifact, Store

log = logging.getLogger(__name__)

_OVERTAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.ENOTDIR)
"""Errors of the publishing rename that say that another process has published, or has cleared the staging folder."""


@dataclass
class Build:
    """A running attempt. End it with `publish`, `fail`, `interrupt` or `stop`, then `release`."""

    stage: Stage
    folder: Path
    """The artifact's folder."""
    lease: Heartbeat
    staging: Path
    """Where the payload is written."""
    resources: Any
    """What it runs on, for the record."""
    started: float
    """Seconds since the epoch."""
    clock: float
    """The same, of a clock that does not jump."""
    ended: bool = False
    """Whether its outcome is written down."""

    @classmethod
    def begin(cls, store: Store, stage: Stage, facts: Facts, resources: Any = None, beat: float = BEAT) -> Build | None:
        """Take the lease of the next attempt; None when another process was faster or has published meanwhile.

        What dead attempts left behind is cleared: their outcome is written down, their staging folders removed. An
        altered payload is renamed to `altered-<attempt>`, for people to look at.
        Raises UserError when the folder cannot be written."""
        try:
            return cls._begin(store, stage, facts, resources, beat)
        except OSError as error:
            raise UserError(
                f"{store.folder(stage)}: cannot be built there ({error.strerror}: {error.filename}); "
                "make room, or move away what is in its place"
            ) from error

    @classmethod
    def _begin(cls, store: Store, stage: Stage, facts: Facts, resources: Any, beat: float) -> Build | None:
        folder = store.create(stage)
        lease = acquire(folder / "attempts", facts.attempt, beat)
        if lease is None:
            return None
        try:
            if store.create(stage) != folder:  # anew: until there was a lease, it may have been removed as garbage
                lease.release()
                return None
            if facts.attempt:
                _close_dead(attempt_folder(folder / "attempts", facts.attempt), facts)
            for leftover in folder.glob("staging-*"):
                shutil.rmtree(leftover, ignore_errors=True)  # its writer may have only lost its lease, and still write
            build = cls(stage, folder, lease, folder / f"staging-{lease.folder.name}", resources, 0.0, 0.0)
            build.started, build.clock = time.time(), time.monotonic()
            content = {"started": build.started, "host": socket.gethostname(), "pid": os.getpid()}
            write_json(lease.folder / ATTEMPT_FILE, content | {"resources": plain(resources)})
            _set_altered_aside(store, stage, folder, lease)
            if os.path.lexists(folder / "payload"):
                build._end("interrupted", "an earlier attempt has published meanwhile")
                lease.release()
                return None
            build.staging.mkdir()
            (folder / "progress" / STOPPED_FILE).unlink(missing_ok=True)
        except BaseException:
            lease.release()
            raise
        return build

    @property
    def log_path(self) -> Path:
        """Log of this attempt."""
        return self.lease.folder / LOG_FILE

    @property
    def progress(self) -> Path:
        """Folder of what outlives attempts."""
        return self.folder / "progress"

    def publish(self, metrics: Mapping[str, Any] | None) -> Record:
        """Make the staging folder the artifact.

        Raises LeaseLost when another process has taken over, ValueError for a link in the payload, TypeError for a
        metric that is neither number nor string, OSError where it cannot be written; then nothing is published."""
        record = self._record(metrics)
        write_text(self.staging / RECORD_FILE, record.model_dump_json(indent=2) + "\n")
        self.lease.require()
        try:
            self.staging.rename(self.folder / "payload")
        except OSError as error:
            if error.errno not in _OVERTAKEN:
                raise
            raise LeaseLost(f"{self.folder}: its payload was published or its staging removed meanwhile") from error
        try:
            self._settle(record)
        except OSError:  # the artifact is there; gc removes what is left
            log.warning("%s is published, but not all beside it is in order", self.folder, exc_info=True)
        self._end("done")
        return record

    def _settle(self, record: Record) -> None:
        """What is left to do once the artifact is there."""
        sync(self.folder)  # before anything goes that would be needed again without it
        for name, entry in record.files.items():
            remember_digest(self.folder / "payload" / name, entry.sha256)
        for folder in self.progress.iterdir():
            if folder.is_dir():  # step checkpoints: never needed again, and several payloads large
                shutil.rmtree(folder, ignore_errors=True)

    def _files(self) -> dict[str, FileEntry]:
        """What was made, on disk and digested."""
        files: dict[str, FileEntry] = {}
        for name, path in payload_files(self.staging):
            sync(path)
            files[name] = FileEntry(size=path.stat().st_size, sha256=digest_file(path))
        for folder, _, _ in os.walk(self.staging):
            sync(Path(folder))
        return files

    def _record(self, metrics: Mapping[str, Any] | None) -> Record:
        finished, seconds = time.time(), time.monotonic() - self.clock
        files = self._files()
        return Record(
            stage=self.stage.name,
            identity=self.stage.identity,
            label=self.stage.label,
            function=self.stage.function,
            version=self.stage.version,
            inputs={name: source.identity for name, source in self.stage.inputs.items()},
            files=files,
            metrics=plain_metrics(metrics),
            commit=source_commit(),
            libraries=libraries(),
            resources=plain(self.resources),
            host=socket.gethostname(),
            attempt=self.lease.number,
            started=self.started,
            finished=finished,
            seconds=seconds,
            seconds_all_attempts=seconds + self._seconds_before(),
        ).sealed()

    def _seconds_before(self) -> float:
        notes = (read_note(path) for path in self.lease.folder.parent.glob(f"*/{OUTCOME_FILE}"))
        return sum(time_of(note, "seconds") or 0.0 for note in notes)

    def fail(self, error: str) -> None:
        """The function raised: nothing is published, progress is kept."""
        self._abandon("failed", error)

    def interrupt(self, error: str) -> None:
        """The process was told to end, or lost its lease."""
        self._abandon("interrupted", error)

    def stop(self, reason: str) -> None:
        """The scheduler stopped it: later plans leave it alone unless they are told to continue it."""
        self._note(self.progress / STOPPED_FILE, {"reason": reason, "attempt": self.lease.number, "time": time.time()})
        self._abandon("stopped", reason)

    def release(self) -> None:
        """Give the lease back; an attempt that has no outcome yet was interrupted. A second call does nothing."""
        try:
            if not self.ended:
                self.interrupt("it ended outside of its function")
        finally:
            self.lease.release()

    def _abandon(self, status: Outcome, error: str) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)  # another holder may be clearing it away at the same time
        self._end(status, error)

    def _end(self, status: Outcome, error: str = "") -> None:
        """Write down how it ended. Raises no OSError: what was published or what the function raised matters more, and
        the next attempt finds this one dead."""
        self.ended = True
        try:
            self._write_outcome(status, error)
        except OSError:
            log.warning("how attempt %d of %s ended could not be written", self.lease.number, self.stage, exc_info=True)

    def _write_outcome(self, status: Outcome, error: str) -> None:
        if not self.lease.folder.is_dir():
            log.warning("%s was removed while it was running", self.lease.folder)
            return
        content = {
            "status": status,
            "error": error,
            "log": str(self.log_path),
            "started": self.started,
            "ended": time.time(),
            "seconds": time.monotonic() - self.clock,
        }
        self._note(self.lease.folder / OUTCOME_FILE, content)

    def _note(self, path: Path, content: dict[str, Any]) -> None:
        """Write down what is not part of the artifact."""
        write_json(path, content)


def _set_altered_aside(store: Store, stage: Stage, folder: Path, lease: Heartbeat) -> None:
    """Make room for a whole payload. Under the lease, so that nobody's good one is meant."""
    try:
        store.record(stage)
    except AlteredArtifact as error:
        aside = folder / f"altered-{lease.folder.name}"
        (folder / "payload").rename(aside)
        log.warning("%s; it is set aside as %s", error, aside)


def _close_dead(attempt: Path, facts: Facts) -> None:
    """Write down how an attempt ended that could not say so itself."""
    if attempt.is_dir() and not (attempt / OUTCOME_FILE).exists():
        write_json(attempt / OUTCOME_FILE, outcome_of_dead(attempt, facts))


def outcome_of_dead(attempt: Path, facts: Facts) -> dict[str, Any]:
    """How an attempt ended that could not say so itself, from what it left."""
    begun = time_of(read_note(attempt / ATTEMPT_FILE), "started") or 0.0
    log_file = attempt / LOG_FILE
    # Its log is the last trace of it, by clocks that may have jumped; its heartbeats were counted.
    seconds = max(log_file.stat().st_mtime - begun, 0.0) if log_file.exists() else 0.0
    beats = text_of(read_note(attempt / LEASE_FILE), "beat")
    if beats.isdecimal():
        seconds = min(max(seconds, int(beats) * BEAT), (int(beats) + 1) * BEAT)
    return {
        "status": "interrupted",
        "error": facts.error,
        "log": str(log_file),
        "started": begun,
        "ended": begun + seconds,
        "seconds": seconds,
    }


def plain(resources: Any) -> Any:
    """Resources as JSON."""
    return resources.model_dump(mode="json") if hasattr(resources, "model_dump") else resources
