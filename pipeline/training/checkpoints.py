"""Step checkpoints: folders that are complete or not there.

    progress/<identity>/step-00000040-3f9a1c/
        position.json               step, tokens, best so far
        rank-00000.safetensors      the part of the state that this rank wrote, by parameter name
        rank-00000.json             the manifest of that rank: how many there are, its files with size and sha256
        complete.json               how many ranks; written last, by one rename, when every manifest is written

A checkpoint is complete if the marker is there and every file that the manifests list has the listed size and digest.
A crash, a full disk or a copied folder that lacks a file therefore leaves a checkpoint that is named, skipped and
later removed, when the run that has gone on from the one before it writes its next; it counts as none of those that
are kept, although its marker is there. A folder's name is never used twice. All of a checkpoint is on disk before an
older one is removed: kernels write back what nobody asks for after half a minute, and a power failure takes that.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.paths import require_regular
from pipeline.record import sync

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


def write_manifest(folder: Path, rank: int, ranks: int, files: list[Path]) -> Path:
    """List this rank's files, which are complete now, with size and sha256; returns the manifest.

    It says how many ranks there are too, so that a marker with another number does not leave out any."""
    listed = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files}
    _write_json(_manifest(folder, rank), {"ranks": ranks, "files": listed})
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
        if ranks < 1:
            return f"{MARKER} says {ranks} ranks"
        for rank in range(ranks):
            manifest = _read_json(_manifest(folder, rank))
            if manifest.get("ranks") != ranks:
                return f"{MARKER} says {ranks} ranks, {_manifest(folder, rank).name} {manifest.get('ranks', 'none')}"
            for name, expected in manifest["files"].items():
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


def outdated(marked: Mapping[str, bool], new: str, keep: int, skipped: Collection[str]) -> list[str]:
    """Of the names in `marked` (and whether they are) those to remove when `new` is complete: all but the newest `keep`,
    of which one that the run has `skipped` is none."""
    newest = sorted((name for name, is_marked in marked.items() if is_marked and name not in skipped), reverse=True)
    kept = {new, *newest[:keep]}
    return [name for name in marked if name not in kept]


@dataclass(frozen=True)
class StepFolders:
    """Where the step checkpoints of a run are: a folder that all its workers see. `pipeline.objects` has another kind."""

    root: Path
    """Where ranks write."""
    skipped: set[str] = field(default_factory=set, kw_only=True, compare=False)
    """Those that this run has found damaged when it looked for where to go on."""
    known: set[str] = field(default_factory=set, kw_only=True, compare=False)
    """Those that it has found then, and its own. It removes no others: when its attempt has lost the lease, or has taken
    it from one that still writes, there may be any."""

    def sent(self, folder: Path, files: list[Path]) -> None:
        """This rank has written its files and their manifest: bring them to disk."""
        for file in files:
            sync(file)

    def complete(self, folder: Path, ranks: int, keep: int) -> None:
        """Every rank has: mark the checkpoint, and remove all but the newest `keep`. Called once.

        What is removed is gone for certain, what was written only when it is on disk: so that comes first."""
        if (lines := self.root.parent / "metrics.jsonl").exists():
            sync(lines)  # who goes on from here does not write the lines before it again
        mark_complete(folder, ranks)
        for written in (folder / MARKER, folder, self.root):  # the folder has the names of all ranks' files
            sync(written)
        self.known.add(folder.name)
        found = [one for one in _folders(self.root) if one.name in self.known]
        marked = {one.name: (one / MARKER).exists() for one in found}
        for name in outdated(marked, folder.name, keep, self.skipped):
            shutil.rmtree(self.root / name, ignore_errors=True)  # the other attempt may remove it at the same time

    def leave(self, folder: Path) -> None:
        """The checkpoint is marked, and this rank is done with it."""

    def newest(self, on_torn: Callable[[str, str], None]) -> str | None:
        """Name of the newest that is complete; `on_torn` gets the name of each newer one that is not, with why."""

        def torn(folder: Path, why: str) -> None:
            self.skipped.add(folder.name)
            on_torn(folder.name, why)

        self.known.update(folder.name for folder in _folders(self.root))
        found = newest_complete(self.root, torn)
        return None if found is None else found.name

    def bring(self, name: str) -> str | None:
        """Have a checkpoint on this node; None, or why it cannot be had."""

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
