"""Leases: one builder per artifact, on one machine or on several that share a file system.

An attempt's number is its lease. To build, a process prepares a folder with its `lease.json` inside and renames it to
`attempts/<last + 1>`: a rename onto a folder that is not empty fails, so of any number of processes exactly one gets
the number, and the folder is whole from its first moment. Nothing is ever taken out of `attempts/`, so a slow process
that decided on old news finds its number taken and looks again; deleting and re-creating one lock file has no such
guarantee. The holder is the newest attempt; an older one has lost its lease and sees that before it publishes.

A holder rewrites a counter in its `lease.json` every few seconds (in place, through the descriptor it created it with,
so a loser can never write over its successor). A waiter takes a lease over when

- the holder's process is gone, which is known at once on the same host (same boot, same process namespace, same pid
  with the same start time), or
- the counter has not *moved* for `TTL` seconds of the waiter's own monotonic clock. No two clocks are compared, so
  neither skew nor a jump can end a live lease; and a gap between two looks counts for at most a quarter of `TTL`, so
  that a waiter that was itself suspended together with the holder does not wake up and shoot it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import socket
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pipeline.paths import require_regular

log = logging.getLogger(__name__)

BEAT = 5.0
"""Seconds between two heartbeats."""
TTL = 90.0
"""Seconds without a moving heartbeat after which a lease is dead."""
LEASE_FILE = "lease.json"
_NUMBER = re.compile(r"[0-9]{4,9}")
"""Name of an attempt's folder."""
_NO_LEASE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, None)
"""Errors of a look at a lease that say that there is none; None: something else than a file is in its place."""
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)
"""Errors of a rename that came too late: the number is taken, or its winner has cleared this contender away."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lease."""

    host: str
    """Host name, boot and process namespace: where a pid means something."""
    pid: int
    started: int | None
    """Start of the process in clock ticks since boot: a pid is reused, the pair is not. None where unknown."""
    token: str
    """Unique to this lease."""

    @classmethod
    def here(cls) -> Owner:
        """This process, with a new token."""
        return cls(host_key(), os.getpid(), process_start(os.getpid()), uuid.uuid4().hex)

    def is_gone(self) -> bool:
        """Whether the process is known to have ended; False where it cannot be known from here."""
        if self.host != host_key():
            return False
        if not process_exists(self.pid):
            return True
        start = process_start(self.pid)
        return None not in (start, self.started) and start != self.started

    def is_of_another_start(self) -> bool:
        """Whether it is of a machine of this one's name, started at another time: this one, or one that is called alike."""
        there, here = self.host.split("/"), host_key().split("/")
        return there[0] == here[0] and len(there) == len(here) == 3 and there[1] != here[1]

    @property
    def name(self) -> str:
        """Name of the machine, for people."""
        return self.host.partition("/")[0]

    def __str__(self) -> str:
        return f"process {self.pid} on {self.name}"


@lru_cache(maxsize=1)
def host_key() -> str:
    """Name of this host that changes with every boot and differs between containers that cannot see each other."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # no /proc: the host name alone has to do
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8])
        parts.append(str(Path("/proc/self/ns/pid").readlink()).strip("pid:[]"))
    return "/".join(parts)


def process_start(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; 0 for a zombie, None where it cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


def process_exists(pid: int) -> bool:
    """Whether there is a process (or an unreaped one) of this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class LeaseLost(Exception):
    """Another process has taken the artifact over; what was built here must not be published."""


class Heartbeat(ABC):
    """A held lease, whose counter a daemon thread moves. Use as a context manager, or call `release`."""

    def __init__(self, folder: Path, number: int, owner: Owner, beat: float) -> None:
        self.folder = folder
        """The attempt's folder."""
        self.number = number
        """The attempt's number, from 1."""
        self.owner = owner
        self._count = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(beat,), name=f"lease {folder}", daemon=True)
        self._thread.start()

    @abstractmethod
    def held(self) -> bool:
        """Whether it is still this process'."""

    @abstractmethod
    def _write(self) -> None:
        """Write the counter down."""

    @abstractmethod
    def _close(self) -> None:
        """Write down that the lease is over."""

    @abstractmethod
    def require(self) -> None:
        """Raise LeaseLost unless it is still held."""

    def release(self) -> None:
        """Stop the heartbeat and mark the lease as over. A second call does nothing."""
        if self._end.is_set():
            return
        self._end.set()
        self._thread.join()
        self._close()

    def __enter__(self) -> Heartbeat:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _beat(self, interval: float) -> None:
        while not self._end.wait(interval):
            self._count += 1
            try:
                self._write()
            except OSError:
                log.warning("the heartbeat of %s could not be written", self.folder, exc_info=True)


class Lease(Heartbeat):
    """A lease in a folder that everybody sees."""

    def __init__(self, folder: Path, descriptor: int, owner: Owner, beat: float) -> None:
        self._descriptor = descriptor
        super().__init__(folder, int(folder.name), owner, beat)

    def held(self) -> bool:
        """Whether this is still the newest attempt, and the lease on disk this one and not over, as far as can be seen.

        A look that fails (too many open files, a file server that is away for a moment) does not say that it is lost."""
        try:
            return self._looked_up()
        except OSError as error:
            log.warning("%s cannot be looked at, and is taken as still held: %s", self.folder, error)
            return True

    def require(self) -> None:
        """Raise LeaseLost unless it is still held, OSError when that cannot be seen."""
        if not self._looked_up():
            raise LeaseLost(f"{self.folder}: another process has taken over, or the folder was removed")

    def _looked_up(self) -> bool:
        """By its token, not its inode: some network file systems give a file another inode at every look."""
        try:
            owner, over = _parse((self.folder / LEASE_FILE).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return False  # the folder was removed under us
        return owner == self.owner and not over and newest_attempt(self.folder.parent) == self.number

    def _write(self) -> None:
        _write(self._descriptor, self.owner, self._count)

    def _close(self) -> None:
        try:
            _write(self._descriptor, self.owner, self._count, over=True)
        except OSError as error:  # waiters will find it dead instead
            log.warning("the end of %s could not be written: %s", self.folder, error)
        finally:
            os.close(self._descriptor)


def _write(descriptor: int, owner: Owner, count: int, over: bool = False) -> None:
    """Rewrite the file in place; the text has the same length every time, so a reader never sees a torn one."""
    body = {"owner": asdict(owner), "state": "over" if over else "held", "beat": f"{count:012d}"}
    os.pwrite(descriptor, json.dumps(body).encode() + b"\n", 0)
    os.fsync(descriptor)  # on a network file system this is what makes the beat visible to others


def newest_attempt(attempts: Path) -> int:
    """The highest attempt number; 0 when there is none."""
    if not attempts.is_dir():  # nor a link that leads round in a circle
        return 0
    try:
        return max((int(path.name) for path in attempts.iterdir() if _NUMBER.fullmatch(path.name)), default=0)
    except (FileNotFoundError, NotADirectoryError):
        return 0


def attempt_folder(attempts: Path, number: int) -> Path:
    """Folder of an attempt."""
    return attempts / attempt_name(number)


def attempt_name(number: int) -> str:
    """Name of an attempt's folder."""
    return f"{number:04d}"


def acquire(attempts: Path, after: int, beat: float = BEAT) -> Lease | None:
    """Take the lease of attempt `after + 1`; None when another process was faster.

    `after` is the attempt that was seen to be over or dead, 0 for none. `lease.json` beside `attempts/` is pointed at
    the new one, for people: nothing here reads it."""
    owner = Owner.here()
    fresh = attempts / f".new-{owner.token}"
    fresh.mkdir(parents=True)
    try:
        descriptor = os.open(fresh / LEASE_FILE, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileNotFoundError:
        return None  # a winner has cleared it away
    folder = attempt_folder(attempts, after + 1)
    try:
        _write(descriptor, owner, 0)
        fresh.rename(folder)
    except OSError as error:
        os.close(descriptor)
        shutil.rmtree(fresh, ignore_errors=True)  # a winner may be clearing it away at the same time
        if error.errno in _TAKEN:
            return None
        raise
    _clear_losers(attempts)
    try:
        _point(attempts.parent / LEASE_FILE, folder / LEASE_FILE, owner.token)
    except (
        OSError
    ) as error:  # a full disk; the lease is taken, and without a heartbeat it would block this very process
        log.warning("%s still points at an older attempt: %s", attempts.parent / LEASE_FILE, error)
    return Lease(folder, descriptor, owner, beat)


def _clear_losers(attempts: Path) -> None:
    """Remove what contenders that died before their rename left; a live one sees that and has lost anyway."""
    for leftover in attempts.glob(".new-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _point(link: Path, target: Path, token: str) -> None:
    fresh = link.with_name(f".{link.name}-{token}")
    fresh.symlink_to(target.relative_to(link.parent))
    fresh.replace(link)


@dataclass(frozen=True)
class Sighting:
    """What a waiter knows of an artifact's newest attempt."""

    state: Literal["free", "held", "dead"]
    """`free`: nobody builds; `held`: somebody does; `dead`: somebody did and ended without a word."""
    attempt: int = 0
    """Number of the newest attempt; 0 for none."""
    owner: Owner | None = None
    why: str = ""
    """Of a dead lease: how that is known."""
    silent: float = 0.0
    """Of a held lease: seconds since its last heartbeat by the file's time, for people alone, as clocks differ."""

    @property
    def seems_dead(self) -> bool:
        """Whether a held lease is silent for longer than a living holder is; for people alone, too."""
        return self.state == "held" and self.silent > TTL


class Watch:
    """A waiter's view of one artifact's lease; look again and again, and a silent holder is found dead."""

    def __init__(self, attempts: Path, ttl: float = TTL, clock: Callable[[], float] = time.monotonic) -> None:
        self.attempts = attempts
        self._ttl = ttl
        self._clock = clock
        self._seen: tuple[int, bytes] | None = None
        self._looked = 0.0
        self._unmoved = 0.0

    def look(self) -> Sighting:
        """The state now. A lease on another host is `held` at the first look: only time can tell."""
        number = newest_attempt(self.attempts)
        if number == 0:
            return Sighting("free")
        file = attempt_folder(self.attempts, number) / LEASE_FILE
        try:
            require_regular(file)
            raw, written = file.read_bytes(), file.stat().st_mtime
        except FileNotFoundError:
            return Sighting("dead", number, None, "its lease.json is gone")
        except OSError as error:
            if error.errno in _NO_LEASE:
                return Sighting("dead", number, None, f"its lease.json cannot be read: {error.strerror}")
            return self.judge(number, None, b"")  # no sign of life, and none of death: the clock decides
        owner, over = _parse(raw)
        return Sighting("free", number, owner) if over else self.judge(number, owner, raw, time.time() - written)

    def judge(self, number: int, owner: Owner | None, raw: bytes, silent: float = 0.0) -> Sighting:
        """What an attempt that is not over is, given what its heartbeat has written last."""
        if owner is not None and owner.is_gone():
            return Sighting("dead", number, owner, f"{owner} is gone")
        if self._silent_for(number, raw) >= self._ttl:
            return Sighting("dead", number, owner, f"{owner or 'its owner'} gave no sign of life for {self._ttl:.0f} s")
        return Sighting("held", number, owner, silent=max(silent, 0.0))

    def _silent_for(self, number: int, raw: bytes) -> float:
        now = self._clock()
        if self._seen == (number, raw):
            self._unmoved += min(max(now - self._looked, 0.0), self._ttl / 4)
        else:
            self._seen, self._unmoved = (number, raw), 0.0
        self._looked = now
        return self._unmoved


def _parse(raw: bytes) -> tuple[Owner | None, bool]:
    """(owner, over) of a lease file; (None, False) when it cannot be read, which leaves it to the heartbeat's clock."""
    try:
        body = json.loads(raw)
        owner = parse_owner(body["owner"])
        return owner, owner is not None and body["state"] == "over"
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, False


def parse_owner(fields: Any) -> Owner | None:
    """An owner from the fields that it was written as; None when they are none."""
    try:
        owner = Owner(**fields)
    except TypeError:
        return None
    kinds = (owner.host, str), (owner.pid, int), (owner.started, int | None), (owner.token, str)
    sound = all(isinstance(value, kind) for value, kind in kinds) and 0 < owner.pid < 2**31
    return owner if sound else None
