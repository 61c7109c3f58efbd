"""Leases on an object store: an attempt's number is its lease, and who creates `lease.json` under it has it.

    attempts/0003/lease.json    created by a conditional write, never changed: of any number of processes exactly one
                                gets the number
    attempts/0003/beat.json     rewritten by the holder: a counter, how long it has worked, and at the end that it is over

As on disk (`pipeline.lease`), nothing is ever taken out of `attempts/` but by a collection of garbage under its lease, a
holder is dead when its process is known to be gone or its counter has not moved for `TTL` seconds of the waiter's own
clock, and no two clocks are compared. A holder learns that it was taken over, or removed, at its next heartbeat, and
looks once more before it publishes.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path

from pipeline.lease import BEAT, Heartbeat, LeaseLost, Owner, Sighting, Watch, attempt_name, parse_owner
from pipeline.notes import read_note
from pipeline.objects.bucket import Bucket

log = logging.getLogger(__name__)

LEASE, BEAT_FILE = "lease.json", "beat.json"


class ObjectLease(Heartbeat):
    """A held lease, with its heartbeat in a daemon thread."""

    def __init__(self, bucket: Bucket, attempts: str, number: int, owner: Owner, folder: Path, beat: float) -> None:
        self._bucket, self._attempts = bucket, attempts
        self._place = f"{attempts}{attempt_name(number)}/"
        self._body = _body(owner)
        self._lost = False
        self._began = time.monotonic()
        super().__init__(folder, number, owner, beat)

    def held(self) -> bool:
        """Whether it was still held at the last heartbeat."""
        return not self._lost

    def require(self) -> None:
        """Raise LeaseLost unless it is still held, which is looked up."""
        self._look()
        if self._lost:
            raise LeaseLost(f"{self._bucket.url}/{self._attempts}: another process has taken over")

    def _look(self) -> None:
        """Whether there is a newer attempt, or a collection of garbage has removed this one."""
        if not self._lost:
            there = newest(self._bucket, self._attempts) == self.number
            self._lost = not there or self._bucket.read(self._place + LEASE) != self._body

    def _write(self) -> None:
        self._look()
        if not self._lost:  # whose attempt was removed must not leave a half of it
            self._put("held")

    def _close(self) -> None:
        try:
            self._look()
            if not self._lost:
                self._put("over")
        except OSError:  # waiters will find it dead instead
            log.warning("the end of %s could not be written", self._attempts, exc_info=True)

    def vanish(self) -> None:
        """In place of `release`, for who has built nothing: the attempt is removed, as if it had never been."""
        self._end.set()
        self._thread.join()
        self._look()
        if not self._lost:
            self._bucket.remove([self._place + BEAT_FILE])
            self._bucket.remove([self._place + LEASE])  # last: without it the beat would be of nobody

    def _put(self, state: str) -> None:
        body = {"count": self._count, "seconds": time.monotonic() - self._began, "state": state}
        self._bucket.write(self._place + BEAT_FILE, json.dumps(body).encode())


def newest(bucket: Bucket, attempts: str) -> int:
    """The highest attempt number below `attempts/`; 0 when there is none."""
    return max((int(name) for name in bucket.names(attempts) if name.isdigit()), default=0)


def acquire(bucket: Bucket, attempts: str, after: int, folder: Path, beat: float = BEAT) -> ObjectLease | None:
    """Take the lease of attempt `after + 1` below `attempts/`; None when another process was faster.

    `folder`: of this node, for what the attempt writes down."""
    owner, number = Owner.here(), after + 1
    if not bucket.create(f"{attempts}{attempt_name(number)}/{LEASE}", _body(owner)):
        return None
    return ObjectLease(bucket, attempts, number, owner, folder, beat)


def _body(owner: Owner) -> bytes:
    return json.dumps({"owner": asdict(owner)}).encode()


class ObjectWatch(Watch):
    """A waiter's view of a lease, from the notes that `Mirror.refresh` has brought to `attempts`."""

    def look(self) -> Sighting:
        """The state now. A lease on another host is `held` at the first look: only time can tell."""
        numbers = [int(path.name) for path in self.attempts.glob("[0-9]*") if (path / LEASE).exists()]
        if not numbers:
            return Sighting("free")
        number = max(numbers)
        folder = self.attempts / attempt_name(number)
        owner = parse_owner(read_note(folder / LEASE).get("owner", {}))
        beat = read_note(folder / BEAT_FILE)
        if beat.get("state") == "over":
            return Sighting("free", number, owner)
        return self.judge(number, owner, json.dumps(beat).encode())
