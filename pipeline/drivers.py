"""Which drivers are at work on a store: each holds a lease of its own, beside the experiment that it was given.

    <store>/.drivers/<name>-<token>/attempts/0001/lease.json    as of an artifact (`pipeline.lease`)
                                    experiment.yaml             what this driver makes

`sweeps/<name>/experiment.yaml` is the latest experiment of that name. A driver that was started before, of the same file
with other values, may be between two stages, where no artifact's lease says that what it has finished is needed.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from overfill.errors import UserError
from pipeline.experiment import EXPERIMENT_FILE, Experiment
from pipeline.lease import BEAT, TTL, Sighting, host_key
from pipeline.record import write_text
from pipeline.store import DRIVERS, Store

log = logging.getLogger(__name__)

Key = TypeVar("Key")

WATCH_S = BEAT
"""Between two looks at who lives."""


@contextmanager
def at_work(experiment: Experiment, store: Store) -> Iterator[None]:
    """Tell everybody that this process makes what the experiment comes to, for as long as it does and lives.

    Raises UserError when the store cannot be written."""
    folder = store.root / DRIVERS / f"{experiment.name}-{uuid.uuid4().hex[:12]}"
    try:
        _clear(store)
        lease = store.lease(folder, after=0)
        if lease is None:
            raise UserError(f"{folder}: was taken or removed meanwhile; run again")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / EXPERIMENT_FILE, experiment.yaml)
            store.keep(folder / EXPERIMENT_FILE)
        except BaseException:
            lease.release()
            raise
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"--store {store.location}: cannot be written ({reason}); make room, or give another"
        ) from error
    try:
        yield
    finally:
        try:
            lease.release()
            store.discard(folder)
        except OSError as error:  # whoever comes next clears it away
            log.warning("%s could not be removed: %s", folder, error)


def _clear(store: Store) -> None:
    """Remove what killed drivers have left, where they are known to be gone."""
    for folder in store.drivers():
        seen = store.sighting(folder)
        if seen.attempt and seen.state != "held":
            store.discard(folder)


def alive(
    held: Mapping[Key, Sighting],
    look: Callable[[Key], Sighting],
    beat: Callable[[Key], object],
    say: Callable[[str], object],
) -> set[Key]:
    """Those of the held leases whose holders live; `beat` is what changes with every heartbeat.

    Of a holder on another host only time can tell: it is watched until it gives a sign of life, or for as long as it takes
    to find it dead, which `say` is told of."""
    living = set(held)
    watched = {key: beat(key) for key, seen in held.items() if seen.owner is None or seen.owner.host != host_key()}
    if watched:
        say(f"at work on other hosts: {len(watched)}; waiting for a sign of life, {TTL:.0f} s at most")
    while watched:
        time.sleep(WATCH_S)
        for key, before in list(watched.items()):
            if look(key).state != "held":
                living.discard(key)
                del watched[key]
            elif beat(key) != before:
                del watched[key]
    return living


def files_of(drivers: set[Path]) -> Iterator[Path]:
    """The experiments of drivers; one that has just begun has none yet, and has made nothing."""
    yield from (folder / EXPERIMENT_FILE for folder in sorted(drivers) if (folder / EXPERIMENT_FILE).exists())
