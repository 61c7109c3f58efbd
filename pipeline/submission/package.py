"""What a job takes with it: this project's own code and one experiment file, by an allow-list, as one zip.

Only files of the two packages whose kind is listed here are taken, so a key, an `.env`, a store or a repository beside
them cannot travel by mistake. The zip is the same bytes for the same content (names sorted, no times), so Ray's
content address finds a package that the cluster has already.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("overfill", "pipeline")
KINDS = (".py", ".cpp")
"""Sources, and the C++ that is compiled at first use."""
DATA = ("pipeline/reporting/page", "pipeline/harness/tasks")
"""Folders of package data, as `pyproject.toml` lists them: all that is in them travels."""
MARKERS = ("py.typed",)
EXPERIMENT = "experiment.yaml"
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Package:
    """A zip and what is in it."""

    content: bytes
    names: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of the zip."""
        return len(self.content)


def source_files(root: Path | None = None) -> list[tuple[str, Path]]:
    """(name, file) of the code that travels; `root` holds the two packages, the running ones by default."""
    root = root or Path(__file__).resolve().parents[2]
    found = []
    for package in PACKAGES:
        for path in (root / package).rglob("*"):
            name = path.relative_to(root).as_posix()
            hidden = any(part.startswith((".", "__pycache__")) for part in name.split("/"))
            wanted = path.suffix in KINDS or path.name in MARKERS or name.rpartition("/")[0] in DATA
            if wanted and not hidden and path.is_file() and not path.is_symlink():
                found.append((name, path))
    return sorted(found)


def make_package(experiment: str, root: Path | None = None) -> Package:
    """The code and the text of the effective experiment, as `experiment.yaml` beside it."""
    files = [(name, path.read_bytes()) for name, path in source_files(root)]
    files.append((EXPERIMENT, experiment.encode("utf-8")))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in files:
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content)
    return Package(stream.getvalue(), tuple(name for name, _ in files))
