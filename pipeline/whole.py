"""Whether an artifact on disk is what was written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from pydantic import ValidationError

from overfill.errors import UserError
from pipeline.paths import require_regular
from pipeline.record import RECORD_FILE, Record

IDENTITY_FILE = "identity.json"

_DIFFERS = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, None)
"""Errors of a look at a file that say that it is not what was written; None: a folder, a pipe or a device."""


class AlteredArtifact(UserError):
    """An artifact whose files are not those of its record."""


def verify_model(folder: Path) -> None:
    """Raise AlteredArtifact when `folder` lies in an artifact that is not what was written; reads every byte of it."""
    for payload in (folder.absolute(), *folder.absolute().parents):
        if payload.name == "payload" and (payload.parent / IDENTITY_FILE).is_file():
            checked(payload.parent, payload.parent.name.rpartition("_")[2], full=True)


def checked(folder: Path, identity: str, full: bool) -> Record | None:
    """The record of the artifact in `folder`, after a look at its files, with `full` at every byte; None without one.

    Raises AlteredArtifact for what was seen to differ, UserError for what cannot be read: that may be whole."""
    payload = folder / "payload"
    if not os.path.lexists(payload):  # a link to nothing is in the way, too
        return None
    try:
        require_regular(payload / RECORD_FILE)
        record = Record.model_validate_json((payload / RECORD_FILE).read_bytes())
        problems = record.problems(payload, full)
        if record.identity != identity:
            problems.insert(0, f"its record is that of {record.stage} {record.identity}")
        if not problems:
            return record
    except ValidationError:
        problems = [f"{RECORD_FILE} is damaged"]
    except OSError as error:
        file = Path(error.filename or payload)
        if error.errno not in _DIFFERS:
            raise UserError(
                f"{file}: cannot be read ({error.strerror}), so nobody knows whether this artifact is whole; "
                "see that this user can read it, and run again"
            ) from error
        missing = isinstance(error, FileNotFoundError)
        problems = [f"{file.name} is missing" if missing else f"{file.name} cannot be read: {error.strerror}"]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    raise AlteredArtifact(
        f"{folder}: this artifact was altered: {problems[0]}{more}; restore its payload, or run again to build it anew"
    )
