"""In which fields two stages differ, in words: the reason that `plan` gives for building something again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_ABSENT = "nothing"
_SHOWN = 3
_LONGEST = 60


@dataclass(frozen=True)
class Difference:
    """One field in which a stage that exists differs from the wanted one."""

    field: str
    """Dotted path, such as `config.loss.kv` or `inputs.tokens.config.max_length`."""
    there: str
    """Its value in the artifact that exists, as JSON."""
    here: str
    """Its value in the wanted stage, as JSON."""

    def __str__(self) -> str:
        return f"{self.field}: {self.there} there, {self.here} here"


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Fields that differ between two full descriptions (`Stage.full_description`), nearest first.

    An input that several stages share differs once: it is reported at its shortest path."""
    found: dict[tuple[str, str, str], Difference] = {}
    differing = {path: (a, b) for path, a, b in _differing(there, here, "")}
    for path in sorted(differing, key=lambda path: (path.count(".inputs."), len(path), path)):
        a, b = differing[path]
        # `inputs.student.inputs.teacher.config.layers` and `inputs.teacher.config.layers` say the same.
        innermost = path.rpartition("inputs.")[2]
        found.setdefault((innermost, a, b), Difference(path, a, b))
    return tuple(found.values())


def _differing(there: Any, here: Any, path: str) -> Iterator[tuple[str, str, str]]:
    """(path, value there, value here) of the leaves that differ. What is equal is not gone into: inputs share inputs, so
    that a description written out is many times larger than what it describes."""
    # To Python 1 and 1.0 are equal; as text they are what they are in an identity.
    if there == here and json.dumps(there, sort_keys=True) == json.dumps(here, sort_keys=True):
        return
    if isinstance(there, Mapping) and isinstance(here, Mapping) and there and here:
        for key in there.keys() & here.keys():
            yield from _differing(there[key], here[key], f"{path}.{key}" if path else key)
        theirs = {where: value for key in there.keys() - here.keys() for where, value in _below(there, key, path)}
        mine = {where: value for key in here.keys() - there.keys() for where, value in _below(here, key, path)}
    else:
        theirs, mine = dict(leaves(there, path)), dict(leaves(here, path))
    for where in theirs.keys() | mine.keys():
        yield where, theirs.get(where, _ABSENT), mine.get(where, _ABSENT)


def _below(values: Mapping[str, Any], key: str, path: str) -> Iterator[tuple[str, str]]:
    return leaves(values[key], f"{path}.{key}" if path else key)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, value as JSON) of everything in nested mappings."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else key)
    else:
        yield path, json.dumps(value)


@dataclass(frozen=True)
class Nearest:
    """The existing artifact of the same stage that differs in the fewest fields."""

    artifact: str
    """`<stage>/<label>_<identity>`."""
    differences: tuple[Difference, ...]

    def __str__(self) -> str:
        shown = "; ".join(_short(str(difference)) for difference in self.differences[:_SHOWN])
        more = len(self.differences) - _SHOWN
        return f"nearest is {self.artifact}, which differs in {shown}" + (f"; and {more} more" if more > 0 else "")


def _short(text: str) -> str:
    return text if len(text) <= 2 * _LONGEST else f"{text[:_LONGEST]} ... {text[-_LONGEST:]}"
