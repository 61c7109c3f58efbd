"""What an attempt that ended early has left to go on from: step checkpoints, or answered shards of tasks.

Status and plans look at this often, so it goes by names and sizes alone. The training loop and the evaluation of tasks,
which read the files, compare their digests.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.curves import Curve
from pipeline.training.checkpoints import newest_complete, step_of

SHARDS = "shards"
"""Folder in `progress` of finished shards (`pipeline.harness.shards`)."""
_SHARD = re.compile(r"(\d{8})-(\d{8})\.json")


@dataclass(frozen=True)
class Kept:
    """What is left of a stage that is not finished."""

    checkpoint: int | None = None
    """Step of the newest whole step checkpoint."""
    torn: str = ""
    """Newer step checkpoints that are not whole, each with what is wrong with it."""
    shards: str = ""
    """Of tasks: how many shards are finished, and how many documents of how many they hold."""


def look(progress: Path) -> Kept:
    """What is in a stage's progress folder now."""
    torn: list[str] = []
    steps: list[int | None] = []
    for root in sorted(path for path in progress.glob("*") if path.is_dir() and path.name != SHARDS):
        newest = newest_complete(root, lambda folder, why: torn.append(f"{folder.name} ({why})"), digests=False)
        steps.append(None if newest is None else step_of(newest))
    whole = [step for step in steps if step is not None]
    return Kept(max(whole, default=None), ", ".join(torn), _shards(progress))


def _shards(progress: Path) -> str:
    """By the files' names, which say the first document and the one behind the last."""
    files = [(path.parent.name, _SHARD.fullmatch(path.name)) for path in (progress / SHARDS).glob("*/*.json")]
    found = sorted((task, int(match[1]), int(match[2])) for task, match in files if match is not None)
    if not found:
        return ""
    curve = Curve(progress / "metrics.jsonl")
    curve.update()
    of = f" of {curve.last.steps}" if curve.last is not None else ""
    return f"{len(found)} finished shard{'s' if len(found) > 1 else ''} with {_documents(found)}{of} documents"


def _documents(ranges: list[tuple[str, int, int]]) -> int:
    """How many documents of all tasks lie in sorted ranges, which may overlap where the size of shards was changed."""
    count, before, end = 0, "", 0
    for task, start, stop in ranges:
        end = end if task == before else 0
        count += max(stop - max(start, end), 0)
        before, end = task, max(stop, end)
    return count
