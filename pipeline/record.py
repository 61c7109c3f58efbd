"""The record of an artifact: written last, so that an artifact exists if and only if its record does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from pipeline.fingerprint import digest_once, known_digest

FORMAT = 2
"""1: without a digest of the record itself."""
RECORD_FILE = "record.json"
_NFS = ".nfs"
"""What NFS calls a file that was removed while a process had it open; it goes when that process closes it."""
COMMIT_VARIABLE = "OVERFILL_COMMIT"
"""What the source was made of, where it runs outside its repository: set by whoever sends it there."""
LIBRARIES = (
    "torch", "transformers", "tokenizers", "safetensors", "numpy", "pydantic",
    "ray", "deepspeed", "mlflow", "datasets", "pyarrow", "lm_eval",
)  # fmt: skip


Seconds = Annotated[float, Field(ge=0.0, lt=1e11)]
"""A time since the epoch or a duration; what is beyond was written by no clock."""


class FileEntry(BaseModel):
    """One file of a payload."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    size: int
    """Bytes."""
    sha256: str
    """Digest of its content, in hex."""


class Record(BaseModel):
    """What is known of a finished artifact."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True, ser_json_inf_nan="constants")

    format: int = FORMAT
    """Version of this layout."""
    stage: str
    """Name of the stage."""
    identity: str
    """Identity of the stage."""
    label: str
    """Label of the stage when it was built."""
    function: str
    """What made it."""
    version: int
    """Version of the stage."""
    inputs: dict[str, str]
    """Input name -> identity."""
    files: dict[str, FileEntry]
    """Relative name -> size and digest; the record itself is not among them."""
    metrics: dict[str, float | int | str]
    """What the stage's function returned."""
    commit: str | None
    """Commit of the source that made it, with `+` when the tree had changes; None outside a repository."""
    libraries: dict[str, str]
    """Versions of Python and of the libraries that matter."""
    resources: Any = None
    """What it ran on."""
    host: str
    """Host name."""
    attempt: int
    """Number of the attempt that finished it."""
    started: Seconds
    """Start of that attempt, in seconds since the epoch."""
    finished: Seconds
    """End of it."""
    seconds: Seconds
    """Duration of that attempt, of a clock that does not jump."""
    seconds_all_attempts: Seconds
    """Duration of all attempts, those that failed included."""
    digest: str = ""
    """SHA-256 of everything above; empty in format 1."""

    def sealed(self) -> Record:
        """The same record with its digest."""
        return self.model_copy(update={"digest": self._digest()})

    def _digest(self) -> str:
        content = self.model_dump(mode="json", exclude={"digest"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def bytes(self) -> int:
        """Size of the payload."""
        return sum(entry.size for entry in self.files.values())

    def problems(self, payload: Path, full: bool = False) -> list[str]:
        """In what the payload differs from this record, and this record from what was written.

        Compared are names, sizes, and the digests that this process knows already; with `full` every digest."""
        try:
            there = {name: path.stat().st_size for name, path in payload_files(payload)}
        except ValueError as link:
            return [str(link)]
        found = self.differs_from(there)
        for name, entry in self.files.items():
            if there.get(name) == entry.size:
                digest = (digest_once if full else known_digest)(payload / name)
                found += [f"{name} has another SHA-256 than its record"] if digest not in (None, entry.sha256) else []
        return found

    def differs_from(self, there: Mapping[str, int]) -> list[str]:
        """In what files of these names and sizes differ from this record, and this record from what was written."""
        if self.format not in (1, FORMAT):
            return [f"{RECORD_FILE} has format {self.format}, this version reads 1 and {FORMAT}"]
        if self.format > 1 and self.digest != self._digest():
            return [f"{RECORD_FILE} has another SHA-256 than it says"]
        found = [f"{name} is missing" for name in self.files if name not in there]
        found += [f"{name} was added" for name in there if name not in self.files and not is_hidden(name)]
        for name, entry in self.files.items():
            if there.get(name, entry.size) != entry.size:
                found.append(f"{name} has {there[name]:,} bytes, its record says {entry.size:,}")
        return found


def is_hidden(name: str) -> bool:
    """Whether a relative name belongs to a tool (`.nfs0001`, `.DS_Store`, `.cache/...`) rather than to us."""
    return any(part.startswith(".") for part in name.split("/"))


def payload_files(payload: Path) -> list[tuple[str, Path]]:
    """(relative name, file) of every file of a payload but its record and what NFS keeps of removed ones, sorted.

    Raises ValueError for a link: what it points at may change, and is not in the artifact; OSError for a folder that
    cannot be listed: its files are not missing."""
    found: list[tuple[str, Path]] = []
    for folder, folders, files in os.walk(payload, onerror=_unless_gone):
        for name in [*folders, *files]:
            path = Path(folder, name)
            if path.is_symlink():
                raise ValueError(f"{path} is a link; an artifact holds its files itself, so copy what it points at")
        found += [(Path(folder, name).relative_to(payload).as_posix(), Path(folder, name)) for name in files]
    return sorted(entry for entry in found if entry[0] != RECORD_FILE and not entry[1].name.startswith(_NFS))


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def plain_metrics(metrics: Any) -> dict[str, float | int | str]:
    """Metrics as JSON scalars; numpy and tensor scalars are unpacked. Raises TypeError naming another value."""
    plain: dict[str, float | int | str] = {}
    for name, value in dict(metrics or {}).items():
        value = value.item() if hasattr(value, "item") else value
        if not isinstance(value, float | int | str):
            raise TypeError(f"metric {name!r} is a {type(value).__name__}; a record holds numbers and strings")
        plain[str(name)] = value
    return plain


@lru_cache(maxsize=1)
def libraries() -> dict[str, str]:
    """Versions of Python and the installed ones of LIBRARIES, from their metadata: nothing is imported."""
    found = {"python": sys.version.split()[0]}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@lru_cache(maxsize=1)
def source_commit() -> str | None:
    """Commit of the repository this file is in, `+` behind it when tracked files have changes; None without one.

    A copy that was sent to a cluster knows it from `$OVERFILL_COMMIT`."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    # Installed in a virtual environment inside some other project, that project's commit would say nothing of us.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None or (commit := git("rev-parse", "HEAD")) is None:
        return os.environ.get(COMMIT_VARIABLE)
    return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def read_json(path: Path) -> Any | None:
    """Content of a JSON file; None when it is not there. Raises ValueError when it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all: beside it, to disk, then renamed."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # two hosts may well have the same pid
    try:
        with fresh.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)  # on a full disk it is there, and empty
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
