"""What may be removed from a store in a folder: `overfill gc`. `pipeline.objects.gc` does the same on object storage.

Everything that is not needed (`pipeline.needed`) is listed with its size and the reason. Nothing is removed on doubt: an
experiment file that cannot be read ends the whole collection, and a folder that is not named like an artifact is not
looked at.

Removing, while drivers may start at any moment: a whole artifact is removed under its own lease, so that nobody builds
it meanwhile; anything is first renamed into `.trash`, so that nobody ever sees a half of it; and a change of the
experiment files since the listing ends the removal.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from overfill.errors import UserError
from pipeline.drivers import alive, files_of
from pipeline.experiment import EXPERIMENT_FILE
from pipeline.lease import LEASE_FILE, acquire, attempt_folder
from pipeline.needed import Needed, identity_of
from pipeline.planning import size
from pipeline.record import RECORD_FILE
from pipeline.store import IDENTITY_FILE, Store
from pipeline.training.checkpoints import step_of, why_incomplete

log = logging.getLogger(__name__)

STALE_S = 3600.0
"""Least age of leftovers that no lease covers: hidden files beside an experiment, folders of Ray Tune."""
TRASH = ".trash"
_TEMPORARY = re.compile(r"\..+[.-][0-9a-f]{32}\Z")
"""What `record.write_text` and `lease` name a file before they rename it."""
NO_EXPERIMENT, ALTERED, OF_ATTEMPT, OF_RUN, OF_FINISHED, OLDER, OF_DRIVER = (
    "no experiment refers to it",
    "set aside as altered",
    "left by an attempt that has ended",
    "of a run that has ended",
    "step checkpoints of a finished stage",
    "an older step checkpoint",
    "left by a driver that has ended",
)
"""Reasons that a store on object storage has as well."""


@dataclass(frozen=True)
class Garbage:
    """Something that nothing refers to."""

    path: Path
    reason: str
    size: int
    """Bytes."""
    artifact: Path | None = None
    """Folder of the artifact whose lease must be free; None where no lease covers it."""

    @property
    def whole(self) -> bool:
        """Whether it is an artifact with everything in it."""
        return self.path == self.artifact


def collect_garbage(store: Store, delete: bool, keep_checkpoints: int, console: Console) -> None:
    """Print what can go, and remove it when told to.

    Raises UserError when it is not certain what is needed, or when something cannot be read or removed."""
    try:
        _collect_garbage(store, delete, keep_checkpoints, console)
    except OSError as error:
        raise UserError(
            f"{error.filename or store.root}: {error.strerror or error}; what is left stays, run gc again"
        ) from error


def _collect_garbage(store: Store, delete: bool, keep_checkpoints: int, console: Console) -> None:
    before = experiment_files(store)
    found = collect(store, keep_checkpoints, lambda text: console.print(text, highlight=False))
    gone = list(remove(store, found, before)) if delete else found
    rows = [(one.size, str(one.path.relative_to(store.root)), one.reason) for one in gone]
    print_garbage(rows, len(found) - len(gone), delete, console)


def print_garbage(rows: Sequence[tuple[int, str, str]], stay: int, delete: bool, console: Console) -> None:
    """Size, place and reason of what can go or has gone; `stay` items could have gone and did not."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("removed" if delete else "can be removed", overflow="fold")
    table.add_column("because", overflow="fold")
    for bytes_, place, reason in rows:
        table.add_row(size(bytes_), place, reason)
    if rows:
        console.print(table)
    total = f"{len(rows)} item{'' if len(rows) == 1 else 's'}, {size(sum(bytes_ for bytes_, _, _ in rows))}"
    in_use = f"; {stay} came into use meanwhile and stay" if stay else ""
    console.print(
        f"removed: {total}{in_use}" if delete else f"nothing was removed; --delete removes {total}", highlight=False
    )


def collect(store: Store, keep_checkpoints: int = 1, say: Callable[[str], object] = log.info) -> list[Garbage]:
    """Everything that can go, largest first; `say` is told of a wait.

    Raises UserError for an experiment file that cannot be read."""
    drivers = {folder: store.sighting(folder) for folder in store.drivers()}
    held_by = {folder: seen for folder, seen in drivers.items() if seen.state == "held"}
    living = alive(held_by, store.sighting, _beat, say)
    folders = list(_artifact_folders(store))
    held = {folder for folder in folders if store.sighting(folder).state == "held"}
    needed = Needed.of([*_sweeps(store), *files_of(living)], held)
    found: list[Garbage] = []
    for folder in folders:
        if folder in held:
            continue
        if needed.covers(folder):
            found += _leftovers(folder, keep_checkpoints)
        else:
            found.append(garbage_at(folder, NO_EXPERIMENT, folder))
    for folder, seen in drivers.items():
        # One without a lease begins at this moment, or was killed there.
        if folder not in living and (seen.attempt or _age(folder) > STALE_S):
            found.append(garbage_at(folder, OF_DRIVER))
    found += _outside_of_artifacts(store, busy=bool(held or living))
    return sorted(found, key=lambda one: -one.size)


def remove(store: Store, found: list[Garbage], seen: Mapping[Path, int]) -> Iterator[Garbage]:
    """Remove what `collect` found, and yield what has gone; what somebody has begun to use since stays.

    `seen` are the experiment files at the time of collecting. Raises UserError when one was written since."""
    trash = store.root / TRASH
    for one in found:
        if not experiment_files(store).items() <= seen.items():
            raise UserError(f"{store.root}: an experiment was started meanwhile; what is left stays, run gc again")
        if _remove(store, one, trash):
            yield one
    for emptied in {trash, *store.root.glob(f"*/{TRASH}")}:
        with suppress(OSError):  # there was nothing to remove, or another gc is at work
            emptied.rmdir()


def experiment_files(store: Store) -> dict[Path, int]:
    """Experiment file, of a sweep or of a driver, -> when it was last written."""
    found: dict[Path, int] = {}
    for path in (*_sweeps(store), *files_of(set(store.drivers()))):
        with suppress(FileNotFoundError):  # a driver has just ended
            found[path] = path.stat().st_mtime_ns
    return found


def _sweeps(store: Store) -> list[Path]:
    return sorted((store.root / "sweeps").glob(f"*/{EXPERIMENT_FILE}"))


def _beat(folder: Path) -> bytes:
    """Changes with every heartbeat of a driver."""
    try:
        return (attempt_folder(folder / "attempts", 1) / LEASE_FILE).read_bytes()
    except OSError:
        return b""


# --- what there is


def _artifact_folders(store: Store) -> Iterator[Path]:
    """Every folder of the store that is named and filled like an artifact."""
    for path in sorted(store.root.glob("[a-z]*/*")):
        if identity_of(path) and any((path / name).exists() for name in (IDENTITY_FILE, "attempts")):
            yield path


# --- leftovers


def _leftovers(folder: Path, keep_checkpoints: int) -> list[Garbage]:
    """What can go from an artifact that is needed and that nobody is building."""
    progress, finished = folder / "progress", (folder / "payload" / RECORD_FILE).exists()
    found = [garbage_at(path, OF_ATTEMPT, folder) for path in folder.glob("staging-*")]
    found += [garbage_at(path, ALTERED, folder) for path in folder.glob("altered-*")]
    found += [garbage_at(path, "left by a contender for a lease", folder) for path in folder.glob("attempts/.new-*")]
    temporary = [path for inside in (".*", "attempts/*/.*", "progress/.*") for path in folder.glob(inside)]
    found += [garbage_at(path, "half a file of a killed writer", folder) for path in temporary if _is_temporary(path)]
    for root in sorted(path for path in progress.glob("*") if path.is_dir()):
        if finished:
            found.append(garbage_at(root, OF_FINISHED, folder))
        else:
            found += [garbage_at(old, OLDER, folder) for old in older(root, keep_checkpoints)]
    return found


def older(root: Path, keep: int, digests: bool = True) -> Iterator[Path]:
    """Step checkpoints below the newest `keep` whole ones; one that is damaged does not count as one of them."""
    steps = sorted((path for path in root.iterdir() if step_of(path) is not None), reverse=True)
    whole = 0
    for folder in steps:
        if whole >= keep:
            yield folder
        elif why_incomplete(folder, digests) is None:
            whole += 1


def _outside_of_artifacts(store: Store, busy: bool) -> Iterator[Garbage]:
    """`busy`: somebody is at work in this store, so Ray Tune may be too, whatever the times of its files are."""
    for path in sorted([*store.root.glob(f"{TRASH}/*"), *store.root.glob(f"*/{TRASH}/*")]):
        yield garbage_at(path, "left by a gc that was interrupted")
    for path in sorted([*store.root.glob("sweeps/*/.*"), *store.root.glob(".claims/.*")]):
        if _is_temporary(path) and _age(path) > STALE_S:
            yield garbage_at(path, "half a file of a killed writer")
    for path in sorted((store.root / "tune").glob("[ir]*-*")):
        # A living Tune writes its state every few seconds; a request to end (`interrupt-...`) is over in a minute.
        if not busy and all(_age(part) > STALE_S for part in _within(path)):
            yield garbage_at(path, OF_RUN)


def _is_temporary(path: Path) -> bool:
    return bool(_TEMPORARY.match(path.name)) and not path.is_dir()


def _age(path: Path) -> float:
    """Seconds since it was written; none for what vanishes meanwhile, since somebody is at work there."""
    try:
        return time.time() - path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0


def _within(path: Path) -> Iterator[Path]:
    """A file or a folder, and everything in it; what vanishes meanwhile is left out."""
    yield path
    for folder, folders, names in os.walk(path):
        yield from (Path(folder, name) for name in (*folders, *names))


def garbage_at(path: Path, reason: str, artifact: Path | None = None) -> Garbage:
    """A file or a folder with everything in it."""
    return Garbage(path, reason, _size(path), artifact)


def _size(path: Path) -> int:
    """Bytes on this path, links as themselves; what vanishes meanwhile counts nothing."""
    total = 0
    for part in _within(path):
        if part.is_symlink() or part.is_file():
            try:
                total += part.lstat().st_size
            except FileNotFoundError:
                continue
    return total


# --- removing


def _remove(store: Store, one: Garbage, trash: Path) -> bool:
    """Whether it is gone; False when somebody is at work there, or has removed it."""
    lease = None
    if not os.path.lexists(one.path):
        return False  # nor may a lease be taken there, which would make the folder again
    if one.artifact is not None:
        seen = store.sighting(one.artifact)
        if seen.state == "held":
            return False
        if one.whole and (lease := acquire(one.artifact / "attempts", seen.attempt)) is None:
            return False
    with lease or nullcontext():
        if one.whole:
            # First, so that a driver that starts now finds the folder by its name, and waits for its lease.
            (store.root / ".claims" / one.path.name.rpartition("_")[2]).unlink(missing_ok=True)
        target = one.path if one.path.parent.name == TRASH else _moved(one, trash)
    if target is None:
        return False
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target, onerror=_unless_gone)
    else:
        target.unlink(missing_ok=True)
    return True


def _moved(one: Garbage, trash: Path) -> Path | None:
    """Where it is after it has left its place; None when somebody else has cleared it away."""
    try:
        return _renamed_into(trash, one.path)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    # The folder of a kind of stages may be a link to another disk.
    return _renamed_into((one.artifact or one.path).parent / TRASH, one.path)


def _renamed_into(trash: Path, path: Path) -> Path | None:
    target = trash / f"{uuid.uuid4().hex}-{path.name}"
    while os.path.lexists(path):
        trash.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # another gc has removed the empty trash, or what was to go
            return path.rename(target)
    return None


def _unless_gone(_: object, path: str, error: tuple[type[BaseException], BaseException, object]) -> None:
    if not isinstance(error[1], FileNotFoundError):  # of two that clear the trash, one comes too late
        raise error[1]
