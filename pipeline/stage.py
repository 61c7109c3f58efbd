"""A stage: what is to be made, apart from where, when and on what it is made.

A stage is a frozen description (name, version, config, inputs, function) and its identity is the fingerprint of
exactly those. `label` is for people and a location is for this machine; neither counts. Equality follows identity:
two stages that describe the same artifact are equal whatever their labels, so cells of a sweep share it.

A stage's function is called with a `StageRun`: it writes the payload to `staging`, keeps what must outlive a crash in
`progress`, and returns numbers for the record. Whether the payload becomes an artifact is for the store to decide.
"""

from __future__ import annotations

import errno
import fcntl
import importlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, Protocol

from pipeline.fingerprint import canonical, fingerprint, fingerprint_of_canonical
from pipeline.stop import STOP_FILE, StopFile, StopFlag

_NAME = re.compile(r"[a-z][a-z0-9_]*\Z")
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*\Z")
_UNSAFE = re.compile(r"[^A-Za-z0-9.+=,-]+")
_LABEL_LENGTH = 80
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of a file system that has no locks."""

Metrics = Mapping[str, float | int | str]


class Stopped(Exception):
    """Raised by a stage's function that was asked to stop, after it has saved its position in `progress`."""


@dataclass(frozen=True)
class External:
    """Something a stage reads that no stage made: a Hub model at a commit, a file by its digest, a device."""

    kind: str
    """What it is: `model`, `dataset`, `files`, `device`, ..."""
    identifier: str
    """Its name or content digest."""
    revision: str | None = None
    """The commit that pins it."""
    location: str | None = field(default=None, compare=False)
    """Where it lies on this machine; it never counts."""

    @property
    def pinned_by_content(self) -> bool:
        """Whether its identifier is the digest of what lies at its location (`fingerprint.digest_tree`)."""
        return self.location is not None and self.revision is None

    @property
    def description(self) -> dict[str, Any]:
        """What counts of it."""
        return {"kind": self.kind, "identifier": self.identifier, "revision": self.revision}

    @cached_property
    def identity(self) -> str:
        """12 hex digits over kind, identifier and revision."""
        return fingerprint(self.description)


@dataclass(frozen=True, eq=False)
class Stage:
    """The frozen description of one artifact.

    Raises TypeError for a config without a canonical form, ValueError for a name or function that is malformed."""

    name: str
    """What kind of artifact this is; the folder of its kind in the store."""
    version: int
    """Raised by hand when the function changes what it makes from the same config."""
    config: dict[str, Any]
    """Everything that decides the content. It is copied, so later edits of the caller's dictionary change nothing."""
    inputs: dict[str, Stage | External]
    """Input name -> the stage or external reference it comes from."""
    function: str
    """Top-level function, as `package.module:function`."""
    label: str = ""
    """For people; part of the folder's name."""
    identity: str = field(init=False)
    """12 hex digits over name, version, config, input identities and function."""

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            raise ValueError(f"stage name {self.name!r}: use lower-case letters, digits and _")
        if not _FUNCTION.match(self.function):
            raise ValueError(f"function {self.function!r} of stage {self.name}: write it as package.module:function")
        object.__setattr__(self, "config", canonical(self.config, "config"))
        object.__setattr__(self, "inputs", {key: self.inputs[key] for key in sorted(self.inputs)})
        object.__setattr__(self, "identity", fingerprint_of_canonical(self.description))

    @property
    def description(self) -> dict[str, Any]:
        """What counts, with the identities of the inputs."""
        return {
            "name": self.name,
            "version": self.version,
            "config": self.config,
            "inputs": {key: source.identity for key, source in self.inputs.items()},
            "function": self.function,
        }

    @property
    def full_description(self) -> dict[str, Any]:
        """`description` with the inputs spelled out instead of by identity: to say in which field two stages differ."""
        inputs = {
            key: source.full_description if isinstance(source, Stage) else source.description
            for key, source in self.inputs.items()
        }
        return self.description | {"inputs": inputs}

    @property
    def folder_name(self) -> str:
        """`<label>_<identity>`, with what does not belong into a file name replaced by `-`."""
        label = _UNSAFE.sub("-", self.label).strip("-.")[:_LABEL_LENGTH]
        return f"{label}_{self.identity}" if label else self.identity

    @property
    def input_stages(self) -> tuple[Stage, ...]:
        """The inputs that are stages."""
        return tuple(source for source in self.inputs.values() if isinstance(source, Stage))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stage) and other.identity == self.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    def __str__(self) -> str:
        return f"{self.name}/{self.folder_name}"


class Site(Protocol):
    """How a stage's files come to a node and go back, where the store is no folder that every node sees.

    It travels to workers. Paths of a `StageRun` with a site mean something only inside of `visit`."""

    def visit(self, run: StageRun) -> AbstractContextManager[StageRun]:
        """The run with folders of this node: its inputs are brought here, what was made is taken away at the end."""
        ...

    def send(self, run: StageRun, path: Path) -> None:
        """Take a file of the visit's progress folder away now."""
        ...

    def fetch(self, name: str) -> Path:
        """The payload of an input, on this node."""
        ...

    def place(self, name: str) -> str:
        """The URL of the payload of an input."""
        ...

    @property
    def logs(self) -> str:
        """The URL of the attempt's logs."""
        ...

    def clear_staging(self) -> None:
        """Forget what visits of this attempt have delivered."""
        ...

    def stop_flag(self) -> StopFlag:
        """What is raised when the attempt shall save its position and end."""
        ...


@dataclass(frozen=True)
class Located:
    """A place in an input that a task on any node will read."""

    site: Site
    name: str
    """Of the input."""
    parts: tuple[str, ...]
    """The way from its payload."""


def here(place: Path | Located) -> Path:
    """A place as a path of this node."""
    return place if isinstance(place, Path) else place.site.fetch(place.name).joinpath(*place.parts)


@dataclass
class StageRun:
    """What a stage's function gets."""

    stage: Stage
    """The description it makes come true."""
    inputs: dict[str, Path]
    """Input name -> payload folder of that stage, or location of that external reference, if it has one."""
    staging: Path
    """An empty folder: the payload is written here and published as a whole."""
    progress: Path
    """A folder that outlives attempts: step checkpoints, metrics.jsonl."""
    attempt: Path
    """The folder of this attempt, for logs."""
    resources: Any = None
    """What the experiment gives this stage to run on; never part of its identity."""
    stop_requested: Callable[[], bool] = lambda: False
    """Whether to save the position and raise `Stopped` at the next opportunity."""
    site: Site | None = None
    """None where every node sees the store's folders."""

    @contextmanager
    def on_this_node(self) -> Iterator[StageRun]:
        """The run as a process on any node needs it before it touches a file."""
        if self.site is None:
            yield self
            return
        with self.site.visit(self) as run:
            yield run

    def located(self, name: str, path: Path) -> Path | Located:
        """`path`, which lies in the input `name`, in a form that tasks on other nodes can read (`here`)."""
        return path if self.site is None else Located(self.site, name, path.relative_to(self.inputs[name]).parts)

    def sent(self, path: Path) -> None:
        """Say that a file of the progress folder is finished, so that it outlives this process' node."""
        if self.site is not None:
            self.site.send(self, path)

    @property
    def logs(self) -> str:
        """Where the logs of this attempt's workers are, for people."""
        return str(self.attempt) if self.site is None else self.site.logs

    def stop_flag(self) -> StopFlag:
        """What is raised, from wherever, when this attempt's workers shall save their position and end."""
        return StopFile(self.attempt / STOP_FILE) if self.site is None else self.site.stop_flag()

    @property
    def config(self) -> dict[str, Any]:
        """The stage's config."""
        return self.stage.config

    def clear_staging(self) -> None:
        """Remove what a worker that died has left in the staging folder."""
        if self.site is not None:
            self.site.clear_staging()
        for path in self.staging.iterdir() if self.staging.is_dir() else ():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    @property
    def metrics_path(self) -> Path:
        """The lines that `log_metrics` appends."""
        return self.progress / "metrics.jsonl"

    def log_metrics(self, step: int, steps: int, metrics: Mapping[str, float], tokens: int = 0) -> None:
        """Append one line {"step", "steps", "tokens", "time", "metrics"} to `progress/metrics.jsonl`.

        The line is one write to a file opened for appending. After a killed writer's half line it starts on a line of
        its own. Values that are not finite are written as NaN and Infinity: a loss that is lost must be seen."""
        values = {name: float(value) for name, value in metrics.items()}
        line = {"step": step, "steps": steps, "tokens": tokens, "time": time.time(), "metrics": values}
        append_line(self.metrics_path, json.dumps(line))


def in_this_process(function: Callable[[StageRun], Metrics]) -> Callable[[StageRun], Metrics]:
    """For a stage's function that reads and writes files itself, and does not send workers to do it."""

    @wraps(function)
    def run_here(run: StageRun) -> Metrics:
        with run.on_this_node() as local:
            return function(local)

    return run_here


def append_line(path: Path, text: str) -> None:
    """Append `text` as a line of its own, whole beside those of other writers.

    The lock (released by the system when a holder dies) keeps writers apart: a write that crosses a page of the file
    grows it page by page, so that another's look at the last byte would take it for a killed writer's half line. Where
    the file system has no locks, a lease already says that there is one writer.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        _lock(descriptor)
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        _append(descriptor, size, f"{chr(10) if torn else ''}{text}\n".encode())
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def _append(descriptor: int, size: int, data: bytes) -> None:
    """Append all of `data`, or leave the file at `size` and raise OSError: on a full disk a write can be a short one."""
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError:
        with suppress(OSError):  # then the next line begins behind a stump
            os.ftruncate(descriptor, size)
        raise


def resolve(function: str) -> Callable[[StageRun], Metrics | None]:
    """Import `package.module:function`. Raises ImportError when there is no such function."""
    module_name, _, name = function.partition(":")
    found = getattr(importlib.import_module(module_name), name, None)
    if not callable(found):
        raise ImportError(f"{function}: module {module_name} has no function {name}")
    return found


def topological(targets: Iterable[Stage]) -> list[Stage]:
    """The targets and everything they are made from, each once, inputs first."""
    ordered: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        if stage.identity not in ordered:
            for source in stage.input_stages:
                visit(source)
            ordered[stage.identity] = stage

    for target in targets:
        visit(target)
    return list(ordered.values())


def sinks(stages: Iterable[Stage]) -> list[Stage]:
    """The stages that no other of these is made from: what a graph is for."""
    everything = topological(stages)
    used = {source.identity for stage in everything for source in stage.input_stages}
    return [stage for stage in everything if stage.identity not in used]
