"""Claims: `<store>/.claims/<identity>` is a link to the folder of an identity, so that two processes with different labels
for the same stage use the same one."""

from __future__ import annotations

import contextlib
import logging
import uuid
from pathlib import Path

log = logging.getLogger(__name__)


def claimed_place(claim: Path) -> Path | None:
    """Place in the store that a claim names; None for no claim, and for what is none: a link may say anything."""
    try:
        place = claim.readlink()
    except OSError:
        return None
    inside = len(place.parts) == 2 and ".." not in place.parts and place.name.rpartition("_")[2] == claim.name
    return place if inside else None


def claim_for(claim: Path, place: Path) -> Path:
    """Claim an identity for a place in the store, if nobody has; returns the place that it is claimed for."""
    with contextlib.suppress(FileExistsError):
        claim.symlink_to(place)
    if (claimed := claimed_place(claim)) is None:
        log.warning("%s names no folder of this store that is called by it, and is replaced", claim)
        fresh = claim.with_name(f".{claim.name}.{uuid.uuid4().hex}")
        fresh.symlink_to(place)
        fresh.replace(claim)
    return claimed or place
