"""What may be removed from a store on object storage, and from this node's copy of it: `overfill gc`.

The rules are those of a store in a folder (`pipeline.gc`), but nothing can be renamed out of the way here. So whatever
goes from an artifact goes under its lease, after another look, and in an order: what makes something count goes before
what it makes count. The claim and the record of a whole artifact are first, the marker of a step checkpoint is before
its files, and the lease itself is last; a kill at any moment leaves what nobody takes for whole and the next call lists
again. The lease is that of an attempt that vanishes afterwards, so nobody reads of an attempt that built nothing.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rich.console import Console

from overfill.errors import UserError
from pipeline.drivers import alive
from pipeline.experiment import EXPERIMENT_FILE
from pipeline.gc import (
    ALTERED,
    NO_EXPERIMENT,
    OF_ATTEMPT,
    OF_DRIVER,
    OF_FINISHED,
    OF_RUN,
    OLDER,
    STALE_S,
    Garbage,
    garbage_at,
    older,
    print_garbage,
)
from pipeline.lease import LeaseLost, Sighting, attempt_name
from pipeline.needed import Needed, identity_of
from pipeline.objects.build import attempt_of, set_aside
from pipeline.objects.leases import BEAT_FILE, ObjectLease, acquire
from pipeline.objects.mirror import SEGMENTS, Listing, locked, payload_prefix
from pipeline.objects.site import WORK, dead_work, work_folder
from pipeline.objects.steps import STEPS
from pipeline.objects.store import CLAIMS, ObjectStore
from pipeline.record import RECORD_FILE
from pipeline.store import DRIVERS, IDENTITY_FILE
from pipeline.training.checkpoints import MARKER

log = logging.getLogger(__name__)

LOOKS = 8
"""Artifacts that are looked at at once."""
NO_ORIGINAL = "copy of what is not in the bucket any more"
OF_PROCESS = "left by a process that has ended"
_NO_KINDS = ("sweeps", "tune")
_DELIVERED = re.compile(r"attempts/\d+/delivered/")
_IN_PROGRESS = re.compile(r"progress/[^/]+/")


@dataclass(frozen=True)
class ObjectGarbage:
    """Objects that nothing refers to."""

    place: str
    """Key, or what the keys begin with."""
    reason: str
    size: int
    """Bytes."""
    artifact: str = ""
    """Key of the artifact's folder whose lease must be had; empty where no lease covers it."""

    @property
    def whole(self) -> bool:
        """Whether it is an artifact with everything in it."""
        return self.place == f"{self.artifact}/"


def collect_garbage(store: ObjectStore, delete: bool, keep_checkpoints: int, console: Console) -> None:
    """Print what can go, and remove it when told to.

    Raises UserError when it is not certain what is needed, or when the bucket does not answer."""
    try:
        _collect_garbage(store, delete, keep_checkpoints, console)
    except OSError as error:
        raise UserError(f"{store.location}: {error}; what is left stays, run gc again") from error


def _collect_garbage(store: ObjectStore, delete: bool, keep_checkpoints: int, console: Console) -> None:
    before = experiment_versions(store)
    found, copies = collect(store, before, keep_checkpoints, lambda text: console.print(text, highlight=False))
    gone, dropped = found, copies
    if delete:
        dropped = [copy for copy in copies if _drop(store, copy.path)]
        gone = list(remove(store, found, before, keep_checkpoints))
    rows = [(one.size, one.place, one.reason) for one in gone]
    rows += [(copy.size, str(copy.path), copy.reason) for copy in dropped]
    print_garbage(rows, len(found) + len(copies) - len(rows), delete, console)


def experiment_versions(store: ObjectStore) -> dict[str, str]:
    """Experiment file, of a sweep or of a driver, -> its version."""
    listed = store.bucket.list("sweeps/") | store.bucket.list(f"{DRIVERS}/")
    pattern = re.compile(rf"(?:sweeps|{re.escape(DRIVERS)})/[^/]+/{re.escape(EXPERIMENT_FILE)}")
    return {key: entry.version for key, entry in listed.items() if pattern.fullmatch(key)}


def collect(
    store: ObjectStore, experiments: Iterable[str], keep_checkpoints: int = 1, say: Callable[[str], object] = log.info
) -> tuple[list[ObjectGarbage], list[Garbage]]:
    """Everything that can go from the bucket, and from this node's copy of it, largest first.

    `experiments` are the keys of experiment files; `say` is told of a wait. Raises UserError for one that cannot be
    read."""
    store.bring(store.root / "sweeps", EXPERIMENT_FILE)
    store.bring(store.root / DRIVERS, EXPERIMENT_FILE)
    drivers = [store.key(folder) for folder in store.drivers()]
    kinds = [name for name in store.bucket.names() if re.match("[a-z]", name) and name not in _NO_KINDS]
    found: list[ObjectGarbage] = []
    with store.mirror.one_look(kinds):
        keys = list(_artifacts(store, kinds))
        with ThreadPoolExecutor(LOOKS) as pool:
            list(pool.map(store.mirror.refresh, keys))
        at_work = _held(store, [*keys, *drivers], say)
        held, ended = at_work.intersection(keys), {key for key in drivers if key not in at_work}
        of_ended = {f"{key}/{EXPERIMENT_FILE}" for key in ended}
        needed = Needed.of(
            [store.root / key for key in experiments if key not in of_ended],
            [store.root / key for key in held],
            name=lambda path: f"{store.location}/{store.key(path)}",
        )
        for key in keys:
            if key not in held and needed.covers(store.root / key):
                found += _leftovers(store, key, keep_checkpoints)
            elif key not in held:
                found.append(_garbage(store.mirror.listing(key), key, "", NO_EXPERIMENT))
        copies = sorted(_copies(store, kinds), key=lambda copy: -copy.size)
        for key in ended:
            found.append(ObjectGarbage(f"{key}/", OF_DRIVER, _garbage(store.mirror.listing(key), key, "", "").size))
    found += () if at_work else _flags(store)
    return sorted(found, key=lambda one: -one.size), copies


def remove(
    store: ObjectStore, found: Iterable[ObjectGarbage], seen: Mapping[str, str], keep_checkpoints: int = 1
) -> Iterator[ObjectGarbage]:
    """Remove what `collect` found, and yield what has gone; what somebody has begun to use since stays.

    `seen` are the experiment files before collecting. Raises UserError when they have changed."""
    by_artifact: dict[str, list[ObjectGarbage]] = {}
    for one in found:
        by_artifact.setdefault(one.artifact, []).append(one)
    for one in by_artifact.pop("", ()):
        _require_unchanged(store, seen)
        if one.reason == OF_DRIVER:
            store.discard(store.root / one.place)
        else:
            store.bucket.remove([one.place])
        yield one
    for key, those in by_artifact.items():
        yield from _removed_from(store, key, those, seen, keep_checkpoints)


# --- what there is


def _artifacts(store: ObjectStore, kinds: Iterable[str]) -> Iterator[str]:
    """Every folder of the bucket that is named and filled like an artifact."""
    for kind in kinds:
        for name in store.mirror.names(kind):
            listing = store.mirror.listing(f"{kind}/{name}")
            filled = IDENTITY_FILE in listing or any(key.startswith("attempts/") for key in listing)
            if filled and identity_of(Path(name)):
                yield f"{kind}/{name}"


def _held(store: ObjectStore, keys: Iterable[str], say: Callable[[str], object]) -> set[str]:
    """Artifacts that somebody builds, and drivers that live: whoever collects the garbage of a bucket is on another host
    than they as a rule."""

    def look(key: str) -> Sighting:
        store.mirror.forget(key)
        return store.sighting(store.mirror.local(key))

    seen = {key: store.sighting(store.mirror.local(key)) for key in keys}
    held = {key: one for key, one in seen.items() if one.state == "held"}
    return alive(held, look, lambda key: _beat(store, key), say)


def _beat(store: ObjectStore, key: str) -> dict[str, str]:
    """Changes with every heartbeat."""
    listing = store.mirror.listing(key).items()
    return {name: entry.version for name, entry in listing if name.endswith(f"/{BEAT_FILE}")}


def _leftovers(store: ObjectStore, key: str, keep_checkpoints: int) -> list[ObjectGarbage]:
    """What can go from an artifact that is needed and that nobody is building."""
    listing, local = store.mirror.listing(key), store.mirror.local(key)
    finished, record = RECORD_FILE in listing, local / RECORD_FILE
    attempt = attempt_of(record.read_bytes()) if finished and record.exists() else 0
    aside = set_aside(store.bucket, key, listing)
    reasons = dict.fromkeys(aside, ALTERED)
    if attempt or not finished:  # whose files a damaged record means is not known
        payloads = {f"{name.partition('/')[0]}/" for name in listing if name.startswith("payload-")}
        for prefix in payloads - {payload_prefix(attempt)}:
            reasons[prefix] = ALTERED if prefix in aside.values() else OF_ATTEMPT
    reasons |= {match[0]: OF_ATTEMPT for name in listing if (match := _DELIVERED.match(name))}
    for root in {match[0] for name in listing if (match := _IN_PROGRESS.match(name))} - {SEGMENTS}:
        if finished:
            reasons[root] = OF_FINISHED
        elif (local / root).is_dir():  # an outline: by names and sizes, since its content would have to be fetched
            reasons |= {f"{root}{old.name}/": OLDER for old in older(local / root, keep_checkpoints, digests=False)}
    return [_garbage(listing, key, prefix, reason) for prefix, reason in reasons.items()]


def _flags(store: ObjectStore) -> Iterator[ObjectGarbage]:
    """Requests to end, which are over in a minute, while nobody builds anything."""
    for key, entry in store.bucket.list("tune/").items():
        if key.startswith("tune/interrupt-") and time.time() - entry.written > STALE_S:
            yield ObjectGarbage(key, OF_RUN, entry.size)


def _copies(store: ObjectStore, kinds: Iterable[str]) -> Iterator[Garbage]:
    """What this node keeps of artifacts and step checkpoints that are gone, and of processes that have ended."""
    there = {f"{kind}/{name}" for kind in kinds for name in store.mirror.names(kind)}
    steps = {
        f"{STEPS}/{name.removeprefix('progress/').rpartition('/')[0]}"
        for key in there
        for name in store.mirror.listing(key)
        if name.startswith("progress/")
    }
    local = [path for path in store.root.glob("[a-z]*/*") if path.parent.name not in _NO_KINDS and identity_of(path)]
    local += store.root.glob(f"{STEPS}/*/step-*")
    for path in sorted(local):
        copy = garbage_at(path, NO_ORIGINAL)
        if store.key(path) not in there | steps and copy.size:  # status leaves folders of what is not there yet
            yield copy
    for path in dead_work(store.root):
        yield garbage_at(path, OF_PROCESS)


def _garbage(listing: Listing, key: str, prefix: str, reason: str) -> ObjectGarbage:
    size = sum(entry.size for name, entry in listing.items() if name.startswith(prefix))
    return ObjectGarbage(f"{key}/{prefix}", reason, size, key)


# --- removing


def _require_unchanged(store: ObjectStore, seen: Mapping[str, str]) -> None:
    if not experiment_versions(store).items() <= seen.items():
        raise UserError(f"{store.location}: an experiment was started meanwhile; what is left stays, run gc again")


def _removed_from(
    store: ObjectStore, key: str, those: Sequence[ObjectGarbage], seen: Mapping[str, str], keep_checkpoints: int
) -> list[ObjectGarbage]:
    """What has gone of an artifact; nothing when somebody is at work there, and not what is of use since."""
    gone: list[ObjectGarbage] = []
    folder = store.mirror.local(key)
    store.mirror.forget(key)
    sighting = store.sighting(folder)
    lease = acquire(store.bucket, f"{key}/attempts/", sighting.attempt, folder) if sighting.state != "held" else None
    if lease is None:
        return gone
    try:
        _require_unchanged(store, seen)
        store.mirror.forget(key)
        store.mirror.refresh(key)
        for one in those if those[0].whole else _still(store, key, those, keep_checkpoints):
            _remove(store, one, lease)
            gone.append(one)
    except LeaseLost:  # this process slept for long, and somebody has begun
        return gone
    finally:
        lease.vanish()
        store.mirror.forget(key)
    if those[0].whole:
        _drop(store, folder)
    return gone


def _still(
    store: ObjectStore, key: str, those: Sequence[ObjectGarbage], keep_checkpoints: int
) -> Iterator[ObjectGarbage]:
    """Those that the artifact has no use for now either."""
    places = {one.place for one in _leftovers(store, key, keep_checkpoints)}
    return (one for one in those if one.place in places)


def _remove(store: ObjectStore, one: ObjectGarbage, lease: ObjectLease) -> None:
    """Remove it, but for the lease under which it goes. Raises LeaseLost."""
    lease.require()
    if one.whole:
        # First, so that a driver that starts now finds the folder by its name, and waits for its lease.
        store.bucket.remove([CLAIMS + str(identity_of(Path(one.artifact)))])
    prefix, own = one.place.removeprefix(f"{one.artifact}/"), f"attempts/{attempt_name(lease.number)}/"
    names = [name for name in store.mirror.listing(one.artifact) if name.startswith(prefix)]
    for _, step in groupby(sorted((name for name in names if not name.startswith(own)), key=_turn), key=_turn):
        lease.require()
        store.bucket.remove(f"{one.artifact}/{name}" for name in step)


def _turn(name: str) -> int:
    """What makes something count goes before what it makes count; what says of what the rest is goes last."""
    if name == RECORD_FILE:
        return 0
    return 3 if name == IDENTITY_FILE else 1 if name.endswith(f"/{MARKER}") else 2


def _drop(store: ObjectStore, path: Path) -> bool:
    """Remove something from this node; False for the copy of an artifact that is there again."""
    key = store.key(path)
    if path.parent.name == WORK:
        shutil.rmtree(path, ignore_errors=True)  # whoever begins to work here clears it away, too
        return True
    of_artifact = not key.startswith(STEPS)
    if of_artifact and store.bucket.list(f"{key}/"):
        return False
    with work_folder(store.root) as work, locked(path / ".lock") if of_artifact else nullcontext():
        path.rename(work / "gone")  # so that nobody sees a half of it
    return True
