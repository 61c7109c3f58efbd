"""Where a report's numbers come from: artifacts with their digests, commits, libraries, devices; and in what cells differ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pipeline.difference import leaves
from pipeline.fingerprint import digest_file
from pipeline.record import RECORD_FILE, Record

if TYPE_CHECKING:
    from pipeline.store import Store
    from pipeline.sweep import Cell

APART = ("name", "description", "sweep", "resources")
"""Sections of an experiment that do not make a cell what it is."""
ABSENT = "–"


@dataclass(frozen=True)
class Artifact:
    """One finished stage."""

    stage: str
    label: str
    identity: str
    finished: str
    """UTC."""
    seconds: float
    """Over all attempts."""
    host: str
    commit: str
    bytes: int
    digest: str
    """SHA-256 of its record, which has those of its files."""


@dataclass(frozen=True)
class Provenance:
    """Everything that the rows were read from."""

    artifacts: tuple[Artifact, ...]
    commits: tuple[str, ...]
    libraries: tuple[str, ...]
    """`torch 2.13.0`; a library that artifacts were made with different versions of has them all."""
    devices: tuple[str, ...]
    """Of the latencies."""
    hosts: tuple[str, ...]


def provenance(cells: Sequence[Cell], store: Store) -> Provenance:
    """The artifacts behind a report, each once, in the order of the stages."""
    stages = {stage.identity: stage for cell in cells for stage in cell.stages}
    found = [(stage, record) for stage in stages.values() if (record := store.record(stage)) is not None]
    records = [record for _, record in found]
    versions = {name: _unique(record.libraries.get(name) for record in records) for name in _library_names(records)}
    return Provenance(
        tuple(_artifact(record, digest_file(store.payload(stage) / RECORD_FILE)) for stage, record in found),
        _unique(record.commit for record in records),
        tuple(f"{name} {', '.join(there)}" for name, there in versions.items()),
        _unique(str(stage.config["device"]) for stage, _ in found if "device" in stage.config),
        _unique(record.host for record in records),
    )


def _artifact(record: Record, digest: str) -> Artifact:
    when = datetime.fromtimestamp(record.finished, UTC).strftime("%Y-%m-%d %H:%M")
    return Artifact(
        record.stage, record.label, record.identity, when, record.seconds_all_attempts, record.host,
        record.commit or ABSENT, record.bytes, digest,
    )  # fmt: skip


def _library_names(records: Iterable[Record]) -> tuple[str, ...]:
    return _unique(name for record in records for name in record.libraries)


def _unique(values: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(value for value in values if value))


def differing_fields(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """The fields in which the cells' configurations differ, and every cell's values of them, as JSON."""
    configs = [dict(leaves(cell.config.model_dump(mode="json", exclude=set(APART)))) for cell in cells]
    fields = list(dict.fromkeys(field for config in configs for field in config))
    differing = [field for field in fields if len({config.get(field) for config in configs}) > 1]
    return differing, [[config.get(field, ABSENT).strip('"') for field in differing] for config in configs]
