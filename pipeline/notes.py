"""Small JSON files beside an artifact, as they are found: torn by a kill, edited by hand, or not files at all.

They say how an attempt went and are for people; no decision about an artifact rests on them alone. So what cannot be
read is taken as not there, and said once in the log, and what has another type than it should is left out.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from pipeline.paths import require_regular

log = logging.getLogger(__name__)

_LARGEST = 2**20
_LONGEST = 300
"""Characters of a text: these are one-line causes."""


def read_note(path: Path) -> dict[str, Any]:
    """Fields of a small JSON file; empty when it is not there or damaged."""
    try:
        require_regular(path)
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"more than {_LARGEST >> 20} MiB")
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
        return found
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s is damaged (%s) and is taken as not there", path, error)
        return {}


def text_of(note: dict[str, Any], name: str) -> str:
    """A text of a note on one line; empty when it is none."""
    value = note.get(name)
    return " ".join(value.encode("utf-8", "replace").decode().split())[:_LONGEST] if isinstance(value, str) else ""


def time_of(note: dict[str, Any], name: str) -> float | None:
    """Seconds since the epoch; None when that is no time at which anything here can have run."""
    value = note.get(name)
    known = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e11
    return float(value) if known and math.isfinite(value) else None
