"""Step checkpoints: folders that are complete or not there.

    progress/<identity>/step-00000040-3f9a1c/
        position.json               step, tokens, best so far
        rank-00000.safetensors      the part of the state that this rank wrote, by parameter name
        rank-00000.json             the manifest of that rank: its files with size and sha256
        complete.json               how many ranks; written last, by one rename, when every manifest is written

A checkpoint is complete if the marker is there and every file that the manifests list has the listed size and digest.
A crash, a full disk or a copied folder that lacks a file therefore leaves a checkpoint that is named, skipped and
later removed; the one before it is used. A folder's name is never used twice.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.paths import require_regular

MARKER = "complete.json"
POSITION = "position.json"
_NAME = re.compile(r"step-(\d{8,})-[0-9a-f]{6}\Z")


@dataclass(frozen=True)
class Position:
    """Where a run stands: everything that is not a tensor."""

    step: int
    """Optimizer steps taken, and the number of the next batch."""
    tokens: int
    """Corpus tokens read so far, over all workers."""
    best_nll: float | None = None
    """Lowest held-out NLL so far."""
    best_step: int | None = None
    """The step at which it was measured."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The latest value of every metric."""
    pending: dict[str, list[float]] = field(default_factory=dict)
    """[sum, count] of every loss term since the last line of metrics, over all workers."""


def new_name(step: int) -> str:
    """A folder name for a checkpoint after `step` steps that was never used before."""
    return f"step-{step:08d}-{uuid.uuid4().hex[:6]}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name; None for any other folder."""
    match = _NAME.match(folder.name)
    return int(match[1]) if match else None


def write_manifest(folder: Path, rank: int, files: list[Path]) -> Path:
    """List this rank's files, which are complete now, with size and sha256; returns the manifest."""
    listed = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files}
    _write_json(_manifest(folder, rank), {"files": listed})
    return _manifest(folder, rank)


def write_position(folder: Path, position: Position) -> Path:
    """Write `position.json`; it belongs into the manifest of the rank that writes it."""
    _write_json(folder / POSITION, asdict(position))
    return folder / POSITION


def mark_complete(folder: Path, ranks: int) -> None:
    """Write the marker. To be called once, when every rank has written its manifest."""
    _write_json(folder / MARKER, {"ranks": ranks})


def why_incomplete(folder: Path, digests: bool = True) -> str | None:
    """What is wrong with a checkpoint folder; None when it is complete. With `digests`, reads every byte of it."""
    try:
        ranks = int(_read_json(folder / MARKER)["ranks"])
        for rank in range(ranks):
            for name, expected in _read_json(_manifest(folder, rank))["files"].items():
                size = (folder / name).stat().st_size
                if size != expected["bytes"]:
                    return f"{name} has {size} bytes, {expected['bytes']} were written"
                if digests and _sha256(folder / name) != expected["sha256"]:
                    return f"{name} is not what was written (sha256 differs)"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except OSError as error:
        return f"{Path(str(error.filename)).name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"a manifest is torn ({error})"
    return None


def newest_complete(root: Path, on_torn: Callable[[Path, str], object], digests: bool = True) -> Path | None:
    """The complete checkpoint with the most steps, or None. `on_torn` gets each newer one that is not, with why.

    Without `digests` a file that has kept its size passes: enough to say what will happen, not to load it."""
    for folder in sorted(_folders(root), reverse=True):
        reason = why_incomplete(folder, digests)
        if reason is None:
            return folder
        on_torn(folder, reason)
    return None


def read_position(folder: Path) -> Position:
    """The position of a complete checkpoint."""
    return Position(**_read_json(folder / POSITION))


def rank_files(folder: Path) -> list[Path]:
    """The tensor files of a complete checkpoint, of all ranks that wrote it."""
    return [folder / f"rank-{rank:05d}.safetensors" for rank in range(int(_read_json(folder / MARKER)["ranks"]))]


def remove_old(root: Path, keep: int) -> None:
    """Remove all checkpoints but the newest `keep` that are marked, and any that are newer than these."""
    marked = sorted((folder for folder in _folders(root) if (folder / MARKER).exists()), reverse=True)
    if not marked:
        return
    for folder in _folders(root):
        if folder not in marked[:keep] and folder <= marked[0]:
            shutil.rmtree(folder)


@dataclass(frozen=True)
class StepFolders:
    """Where the step checkpoints of a run are: a folder that all its workers see. `pipeline.objects` has another kind."""

    root: Path
    """Where ranks write."""

    def sent(self, folder: Path, files: list[Path]) -> None:
        """This rank has written its files and their manifest."""

    def complete(self, folder: Path, ranks: int, keep: int) -> None:
        """Every rank has: mark the checkpoint, and remove all but the newest `keep`. Called once."""
        mark_complete(folder, ranks)
        remove_old(self.root, keep)

    def leave(self, folder: Path) -> None:
        """The checkpoint is marked, and this rank is done with it."""

    def newest(self, on_torn: Callable[[str, str], None]) -> str | None:
        """Name of the newest that is complete; `on_torn` gets the name of each newer one that is not, with why."""
        found = newest_complete(self.root, lambda folder, why: on_torn(folder.name, why))
        return None if found is None else found.name

    def open(self, name: str) -> Path:
        """Folder of a checkpoint on this node."""
        return self.root / name


def _folders(root: Path) -> list[Path]:
    return [folder for folder in root.iterdir() if step_of(folder) is not None] if root.is_dir() else []


def _manifest(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def _read_json(path: Path) -> dict[str, Any]:
    require_regular(path)
    return json.loads(path.read_text())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
