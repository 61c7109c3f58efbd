"""Which artifacts of a store are needed: what `overfill gc` must never take, wherever the store is.

An artifact is needed when an experiment file in the store (`sweeps/*/experiment.yaml`) or that of a living driver
(`pipeline.drivers`) comes to it, when something that is being built right now is made from it, or when it differs from a
needed one only in the machine (a latency that was measured elsewhere). An experiment file that cannot be read leaves that
open, and so ends the whole collection.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overfill.errors import UserError
from pipeline.experiment import read_experiment
from pipeline.fingerprint import IDENTITY_LENGTH, fingerprint
from pipeline.stage import Stage, topological
from pipeline.store import IDENTITY_FILE

_ARTIFACT = re.compile(rf"(?:.*_)?([0-9a-f]{{{IDENTITY_LENGTH}}})\Z")
_MACHINE = ("device", "versions")
"""Fields of a benchmark's config that the machine supplies, which this one may not be."""


@dataclass(frozen=True)
class Needed:
    """What experiments, and what is being built, refer to."""

    identities: frozenset[str]
    on_any_machine: frozenset[str]
    """Fingerprints of the same stages without their machine."""

    @classmethod
    def of(cls, files: Iterable[Path], held: Iterable[Path], name: Callable[[Path], str] = str) -> Needed:
        """By experiment files and by the folders of artifacts that are being built; `name` is what people call a path.

        Raises UserError when one of them does not say what it needs."""
        known = {stage.identity: stage for stage in _stages_of(files, name)}
        in_use = (_in_use(folder, name) for folder in held)
        return cls(
            frozenset(known).union(*in_use),
            frozenset(_without_machine(stage.full_description) for stage in known.values()),
        )

    def covers(self, folder: Path) -> bool:
        """Whether the artifact of a folder must stay."""
        return identity_of(folder) in self.identities or _without_machine(_description(folder)) in self.on_any_machine


def identity_of(folder: Path) -> str | None:
    """Identity in the name of an artifact's folder; None for any other name."""
    match = _ARTIFACT.match(folder.name)
    return match[1] if match else None


def _stages_of(files: Iterable[Path], name: Callable[[Path], str]) -> list[Stage]:
    stages: list[Stage] = []
    for path in files:
        try:
            stages += [stage for cell in read_experiment(str(path)).cells for stage in cell.stages]
        except (UserError, OSError) as error:
            raise UserError(
                f"{name(path)}: cannot be read, so nothing is removed; mend it, or delete its folder first ({error})"
            ) from error
    return topological(stages)


def _description(folder: Path) -> dict[str, Any]:
    """What an artifact is, by its own word; empty where that is missing or not of an artifact of this name."""
    try:
        described = json.loads((folder / IDENTITY_FILE).read_bytes())["description"]
        return described if folder.name.endswith(tuple(_made_from(described))) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _in_use(folder: Path, name: Callable[[Path], str]) -> set[str]:
    """What somebody is building there, and what it is made from."""
    found = _made_from(_description(folder))
    if not any(folder.name.endswith(identity) for identity in found):
        raise UserError(
            f"{name(folder)}: is being built, and its {IDENTITY_FILE} does not say from what; run gc again later"
        )
    return found


def _made_from(description: dict[str, Any]) -> set[str]:
    """Identities of everything that a description's stage is made from, and its own."""
    found: set[str] = set()

    def identity(of: dict[str, Any]) -> str:
        inputs = of.get("inputs")
        if not isinstance(inputs, dict):
            return fingerprint(of)  # not a stage
        own = fingerprint(of | {"inputs": {name: identity(source) for name, source in inputs.items()}})
        found.add(own)
        return own

    identity(description)
    return found


def _without_machine(description: dict[str, Any]) -> str:
    config = {key: value for key, value in description.get("config", {}).items() if key not in _MACHINE}
    return fingerprint(description | {"config": config})
