"""Step checkpoints on an object store: every rank takes its own files there, the marker follows when all have."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from overfill.errors import UserError
from pipeline.objects.mirror import Mirror, fetch_all, locked, readable, stamp
from pipeline.objects.site import Courier, ObjectSite
from pipeline.record import write_json
from pipeline.stage import Site
from pipeline.training.checkpoints import MARKER, StepFolders, mark_complete, outdated, step_of, why_incomplete

log = logging.getLogger(__name__)

STEPS = ".steps"
"""In a node's copy: step checkpoints that it goes on from."""
_VERIFIED = ".verified.json"
"""In such a copy: its files as they were when they had been compared with their digests."""


@dataclass(frozen=True)
class ObjectSteps(StepFolders):
    """Ranks write in their visit's folder; from there files go to the bucket and are removed."""

    site: ObjectSite

    @classmethod
    def of(cls, site: Site, root: Path) -> ObjectSteps:
        """The step checkpoints of the attempt that `site` is of."""
        assert isinstance(site, ObjectSite)
        return cls(root, site)

    @property
    def prefix(self) -> str:
        """Where they are in the bucket."""
        return f"{self.site.folder}/progress/{self.root.name}/"

    def sent(self, folder: Path, files: list[Path]) -> None:
        """This rank has written its files and their manifest: take them to the bucket."""
        for file in files:
            self.site.bucket.upload(file, f"{self.prefix}{folder.name}/{file.name}")

    def complete(self, folder: Path, ranks: int, keep: int) -> None:
        """Every rank has: mark the checkpoint, and remove all but the newest `keep`. Called once."""
        Courier.flush_of(self.root.parent)  # who goes on from here does not write the lines before it again
        mark_complete(folder, ranks)
        self.site.bucket.upload(folder / MARKER, f"{self.prefix}{folder.name}/{MARKER}")
        try:
            self._remove_old(folder.name, keep)
        except OSError:  # the next one removes them
            log.warning("old step checkpoints could not be removed", exc_info=True)

    def _remove_old(self, new: str, keep: int) -> None:
        self.known.add(new)
        marked = {name: MARKER in files for name, files in self._there().items() if name in self.known}
        for name in outdated(marked, new, keep, self.skipped):
            # The marker first: what has none is never taken for whole.
            self.site.bucket.remove([f"{self.prefix}{name}/{MARKER}"])
            self.site.bucket.remove_below(f"{self.prefix}{name}/")

    def leave(self, folder: Path) -> None:
        """The checkpoint is marked, and this rank is done with it."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(self._local(folder.name).parent, ignore_errors=True)  # what all ranks have gone on from

    def newest(self, on_torn: Callable[[str, str], None]) -> str | None:
        """Name of the newest that is complete; `on_torn` gets the name of each newer one that is not, with why."""
        there = self._there()
        self.known.update(there)
        for name, files in sorted(there.items(), reverse=True):
            if name in self.skipped:
                continue  # another node could not have it
            why = self.bring(name) if MARKER in files else f"{MARKER} is missing"
            if why is None:
                return name
            self.skipped.add(name)
            on_torn(name, why)
        return None

    def open(self, name: str) -> Path:
        """Folder of a checkpoint on this node, fetched once. Raises UserError when it does not arrive whole."""
        why = self.bring(name)
        if why is not None:
            raise UserError(
                f"{self.site.bucket.url}/{self.prefix}{name}: this step checkpoint is damaged ({why}); run again"
            )
        return self._local(name)

    def _there(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for key in self.site.bucket.list(self.prefix):
            name, _, file = key.removeprefix(self.prefix).partition("/")
            if step_of(Path(name)) is not None:
                found.setdefault(name, set()).add(file)
        return found

    def _local(self, name: str) -> Path:
        return Mirror(self.site.bucket).root / STEPS / self.root.name / name

    def bring(self, name: str) -> str | None:
        """Bring a checkpoint to this node, unless it is there as it was verified; None, or what is wrong with it."""
        local = self._local(name)
        local.parent.mkdir(parents=True, exist_ok=True)
        with locked(local.with_name(f".{name}.lock")):
            if local.is_dir() and readable(local / _VERIFIED) == _stamps(local):
                return None
            fresh = local.with_name(f".{name}.fetching")
            for leftover in (local, fresh):
                shutil.rmtree(leftover, ignore_errors=True)
            try:
                fetch_all(self.site.bucket, f"{self.prefix}{name}/", fresh)
            except FileNotFoundError as error:
                return f"{Path(str(error.filename)).name} was removed meanwhile"
            why = why_incomplete(fresh)
            if why is None:
                write_json(fresh / _VERIFIED, _stamps(fresh))
                fresh.rename(local)
            else:
                shutil.rmtree(fresh)
            return why


def _stamps(folder: Path) -> dict[str, list[int]]:
    """Of all files that were fetched."""
    return {file.name: stamp(file) for file in folder.iterdir() if file.name != _VERIFIED}
