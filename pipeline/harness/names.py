"""Which tasks there are, found in YAML files by their keys alone.

lm_eval takes seconds to import and more to index its fourteen thousand files, and `overfill plan` must know at once
whether a name exists. Names are looked for in the user's folder, in ours, and in lm_eval's, in this order.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from overfill.errors import UserError

SHIPPED = Path(__file__).parent / "tasks"
"""Tasks that need no network."""
_KEY = re.compile(
    r"""^["']?(task|group|tag)["']?:[ \t]*"""
    r"""(?:["']?([^\s"'#\[][^"'#\n]*?)["']?[ \t]*(?:\#.*)?$|$((?:\n[ \t]*-[ \t]*\S+)*))""",
    re.MULTILINE,
)
_ITEM = re.compile(r"""-[ \t]*["']?([^"'\n]+?)["']?[ \t]*$""", re.M)


@dataclass(frozen=True)
class Known:
    """Where a name was found."""

    name: str
    folder: Path
    """The user's folder, `SHIPPED`, or a folder of lm_eval's below which the name is defined."""
    is_task: bool
    """A single task that is defined in that folder; not a group or tag, whose members may lie anywhere."""


def registry() -> Path:
    """lm_eval's folder of tasks; finding it imports nothing."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None and spec.origin is not None  # a dependency
    return Path(spec.origin).parent / "tasks"


def find(names: Sequence[str], folder: Path | None) -> dict[str, Known]:
    """Where each name is defined.

    Raises UserError for a name that is nowhere, with the nearest one."""
    found: dict[str, Known] = {}
    for place in filter(None, (folder, SHIPPED)):
        own = _names_below(place)
        found |= {name: Known(name, place, own[name]) for name in names if name in own and name not in found}
    for name in names:
        if name not in found:
            found[name] = _in_registry(name) or _refuse(name, folder)
    return found


def _in_registry(name: str) -> Known | None:
    for folder in _likely_first(name):
        own = _names_below(folder)
        if name in own:
            return Known(name, folder, own[name])
    return None


def _likely_first(name: str) -> Iterator[Path]:
    """lm_eval's folders, those first that the name begins like: it is mostly there, and the others are never read."""
    folders = sorted(path for path in registry().iterdir() if path.is_dir())
    first = re.split(r"[^a-z0-9]", name.lower())[0]
    return iter(sorted(folders, key=lambda folder: not folder.name.lower().startswith(first)))


def _refuse(name: str, folder: Path | None) -> Known:
    known = {other for place in (folder, SHIPPED, *_likely_first("")) if place for other in _names_below(place)}
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(near)}?" if near else f"{len(known)} names are known, see `lm-eval ls tasks`"
    where = "lm_eval" if folder is None else f"{folder} or lm_eval"
    raise UserError(f"evaluate.tasks: {name!r}: no such task in {where}; {hint}")


@lru_cache(maxsize=512)
def _names_below(folder: Path) -> dict[str, bool]:
    """Name -> whether it is a single task, of everything that YAML files below a folder define, or files they include."""
    found: dict[str, bool] = {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix in ("", ".yaml") and path.is_file()):
        text = path.read_text(encoding="utf-8", errors="replace")
        for key, name, listed in _KEY.findall(text):
            # A list under `task:` has a group's members, one under `tag:` names that this file helps to define.
            names = [name] if name else _ITEM.findall(listed) if key == "tag" else []
            for one in names:
                found[one] = key == "task" or found.get(one, False)
    return found
