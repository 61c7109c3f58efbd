"""The same samples answered by several methods, next to each other: what the numbers are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from pipeline.groups import Group
from pipeline.methods import METHOD_NAMES
from pipeline.rows import payload_of

if TYPE_CHECKING:
    from pipeline.store import Store
    from pipeline.sweep import Cell

SHOWN = 24
"""Samples of one configuration."""
LONGEST = 1500
"""Characters of a text that are shown."""
COLUMNS = ("sample", "prompt", "reference", "prediction", "correct")


@dataclass(frozen=True)
class Answer:
    """What a method wrote."""

    text: str
    correct: bool


@dataclass(frozen=True)
class Answered:
    """One sample with the answers to it."""

    number: int
    prompt: str
    reference: str
    answers: tuple[Answer, ...]
    """In the order of the methods."""
    outcome: str
    """Which of the students were right: `right: OverFill`."""


@dataclass(frozen=True)
class SampleTable:
    """Samples of one teacher, ratio and variant."""

    title: str
    methods: tuple[str, ...]
    """In words."""
    outcomes: tuple[tuple[str, int], ...]
    """How often each outcome was, over all samples; the shown ones are taken from each in turn."""
    samples: tuple[Answered, ...]


def sample_tables(found: Sequence[Group], cells: Sequence[Cell], store: Store) -> list[SampleTable]:
    """One table per teacher, ratio and variant whose students have been judged, with the full model beside them."""
    by_identity = {cell.identity: cell for cell in cells}
    gathered: dict[tuple[str, float, str], list[Group]] = {}
    for group in found:
        if group.method != "full":
            gathered.setdefault((group.teacher, group.ratio, group.variant), []).append(group)
    tables: list[SampleTable] = []
    for (teacher, ratio, variant), students in gathered.items():
        full = [group for group in found if group.teacher == teacher and group.method == "full"]
        read = {group.method: _answers(group, by_identity, store) for group in [*full, *students]}
        read = {method: answers for method, answers in read.items() if answers}
        if set(read) - {"full"}:
            name = f"{teacher}, ratio {ratio:g}" if students[0].is_pruned else teacher
            tables.append(_table(name + (f", {variant}" if variant else ""), read))
    return tables


def _answers(group: Group, by_identity: Mapping[str, Cell], store: Store) -> dict[int, dict[str, Any]]:
    """{sample: its line} of the group's first seed that is evaluated."""
    import pyarrow.parquet as parquet

    for member in group.members:
        folder = payload_of(by_identity[member["identity"]], store, "evaluate")
        if folder is not None:
            with parquet.ParquetFile(folder / "samples.parquet") as file:
                return {line["sample"]: line for line in file.read(columns=list(COLUMNS)).to_pylist()}
    return {}


def _table(title: str, read: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> SampleTable:
    shared = sorted(set.intersection(*(set(answers) for answers in read.values())))
    by_outcome: dict[str, list[int]] = {}
    for number in shared:
        right = [METHOD_NAMES[m] for m, answers in read.items() if m != "full" and answers[number]["correct"]]
        by_outcome.setdefault(f"right: {', '.join(right) or 'none of the students'}", []).append(number)
    samples = tuple(_answered(number, outcome, read) for number, outcome in _in_turn(by_outcome))
    counts = sorted(((outcome, len(numbers)) for outcome, numbers in by_outcome.items()), key=lambda entry: -entry[1])
    return SampleTable(title, tuple(METHOD_NAMES[method] for method in read), tuple(counts), samples)


def _in_turn(by_outcome: Mapping[str, Sequence[int]]) -> Iterator[tuple[int, str]]:
    """`SHOWN` samples, of every outcome in turn, so that rare ones are seen."""
    rounds = zip_longest(*([(number, outcome) for number in numbers] for outcome, numbers in by_outcome.items()))
    taken = (entry for one in rounds for entry in one if entry is not None)
    yield from (entry for _, entry in zip(range(SHOWN), taken, strict=False))


def _answered(number: int, outcome: str, read: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> Answered:
    lines = [answers[number] for answers in read.values()]
    answers = tuple(Answer(_clipped(line["prediction"]), bool(line["correct"])) for line in lines)
    return Answered(number, _clipped(lines[0]["prompt"]), _clipped(lines[0]["reference"]), answers, outcome)


def _clipped(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text) - LONGEST:,} characters more)"
