"""Paths that a user wrote: made absolute, or refused in one line where they can be none."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from overfill.errors import UserError


def local_path(text: str, field: str) -> Path:
    """`text` as an absolute path, `~` resolved; whether something is there does not matter.

    Raises UserError, naming `field`, for what no file can be called."""
    try:
        path = Path(text).expanduser().absolute()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{field} = {text}: cannot be a path ({reason}); give a file or a folder") from error
    return path


def require_regular(path: Path) -> None:
    """Raise OSError unless `path` is a file with an end: a pipe would be waited for, a device read for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(None, "a folder, a pipe or a device, not a file", os.fspath(path))
