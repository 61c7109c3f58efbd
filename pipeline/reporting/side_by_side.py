"""The same samples answered by several methods, next to each other: what the numbers are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.reporting.groups import Group
from pipeline.reporting.methods import METHOD_NAMES
from pipeline.reporting.rows import payload_of

if TYPE_CHECKING:
    from pipeline.store import Store
    from pipeline.sweep import Cell

SHOWN = 24
"""Samples of one table."""
LONGEST = 1500
"""Characters of a text that are shown."""
LOOKED_AT = 500
"""Samples of an lm-eval task that are read: the whole of one is too much for a page, and slow."""
HELD_OUT_COLUMNS = {"sample": "sample", "prompt": "prompt", "reference": "reference", "prediction": "text"}
TASK_COLUMNS = {"sample": "sample", "prompt": "prompt", "target": "reference", "response": "text"}


@dataclass(frozen=True)
class Answer:
    """What a method wrote."""

    text: str
    right: bool


@dataclass(frozen=True)
class Answered:
    """One sample with the answers to it."""

    number: int
    prompt: str
    reference: str
    answers: tuple[Answer, ...]
    """In the order of the methods."""
    agree: bool
    """Whether all have it right or all have it wrong."""


@dataclass(frozen=True)
class SampleTable:
    """Samples of one task, teacher, ratio and variant."""

    title: str
    methods: tuple[str, ...]
    """In words."""
    outcomes: tuple[tuple[str, int], ...]
    """Which students were right -> how often; the shown samples are taken from each in turn."""
    samples: tuple[Answered, ...]


_Line = Mapping[str, Any]
"""sample, prompt, reference, text, right."""
_Read = Mapping[str, Mapping[int, _Line]]
"""Method -> sample -> line."""


def sample_tables(found: Sequence[Group], cells: Sequence[Cell], store: Store) -> list[SampleTable]:
    """Per teacher, ratio and variant whose students have been judged one table of the held-out samples and one of each
    task, with the full model beside them. Of a method the first seed that is evaluated is shown."""
    by_identity = {cell.identity: cell for cell in cells}
    gathered: dict[tuple[str, float, str], list[Group]] = {}
    for group in found:
        if group.method != "full":
            gathered.setdefault((group.teacher, group.ratio, group.variant), []).append(group)
    tables: list[SampleTable] = []
    for (teacher, ratio, variant), students in gathered.items():
        full = [group for group in found if group.teacher == teacher and group.method == "full"]
        read = {group.method: _answers(group, by_identity, store) for group in [*full, *students]}
        name = f"{teacher}, ratio {ratio:g}" if students[0].is_pruned else teacher
        tables += _tables(name + (f", {variant}" if variant else ""), read)
    return tables


def _tables(title: str, read: Mapping[str, Mapping[str, Mapping[int, _Line]]]) -> Iterator[SampleTable]:
    for task in dict.fromkeys(task for tasks in read.values() for task in tasks):
        answered = {method: tasks[task] for method, tasks in read.items() if tasks.get(task)}
        if set(answered) - {"full"}:
            yield _table(title + (f": {task}" if task else ""), answered)


def _answers(group: Group, by_identity: Mapping[str, Cell], store: Store) -> dict[str, dict[int, _Line]]:
    """{task: {sample: its line}}, the held-out samples under an empty name."""
    for member in group.members:
        cell = by_identity[member["identity"]]
        held_out, tasks = payload_of(cell, store, "evaluate"), payload_of(cell, store, "tasks")
        found = {} if held_out is None else {"": _held_out(held_out)}
        found |= {} if tasks is None else _tasks(tasks)
        if found:
            return found
    return {}


def _held_out(folder: Path) -> dict[int, _Line]:
    lines = _lines(folder, HELD_OUT_COLUMNS, "correct")
    return {line["sample"]: line for line in lines}


def _tasks(folder: Path) -> dict[str, dict[int, _Line]]:
    found: dict[str, dict[int, _Line]] = {}
    for line in _lines(folder, TASK_COLUMNS | {"task": "task"}, "score"):
        if line["right"] is not None:
            found.setdefault(line["task"], {}).setdefault(line["sample"], line)  # of several filters the first
    return found


def _lines(folder: Path, columns: Mapping[str, str], right: str) -> Iterator[_Line]:
    """Lines of `samples.parquet` under our names; `right` is the column of scores."""
    import pyarrow.parquet as parquet

    limit = None if right == "correct" else LOOKED_AT
    with parquet.ParquetFile(folder / "samples.parquet") as file:
        for batch in file.iter_batches(LOOKED_AT, columns=[*columns, right]):
            for line in batch.to_pylist():
                score = line[right]
                yield {name: line[column] for column, name in columns.items()} | {
                    "right": None if score is None else score >= 1
                }
            if limit is not None:
                return


def _table(title: str, read: _Read) -> SampleTable:
    shared = sorted(set.intersection(*(set(answers) for answers in read.values())))
    by_outcome: dict[str, list[int]] = {}
    for number in shared:
        right = [METHOD_NAMES[m] for m, answers in read.items() if m != "full" and answers[number]["right"]]
        by_outcome.setdefault(f"right: {', '.join(right) or 'none of the students'}", []).append(number)
    samples = tuple(_answered(number, read) for number in _in_turn(by_outcome.values()))
    counts = sorted(((outcome, len(numbers)) for outcome, numbers in by_outcome.items()), key=lambda entry: -entry[1])
    return SampleTable(title, tuple(METHOD_NAMES[method] for method in read), tuple(counts), samples)


def _in_turn(outcomes: Iterable[Sequence[int]]) -> Iterator[int]:
    """`SHOWN` samples, of every outcome in turn, so that rare ones are seen."""
    taken = (number for one in zip_longest(*outcomes) for number in one if number is not None)
    yield from (number for _, number in zip(range(SHOWN), taken, strict=False))


def _answered(number: int, read: _Read) -> Answered:
    lines = [answers[number] for answers in read.values()]
    answers = tuple(Answer(_clipped(line["text"]), line["right"]) for line in lines)
    agree = len({answer.right for answer in answers}) == 1
    return Answered(number, _clipped(lines[0]["prompt"]), _clipped(lines[0]["reference"]), answers, agree)


def _clipped(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text) - LONGEST:,} characters more)"
