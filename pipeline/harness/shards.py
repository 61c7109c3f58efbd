"""Answers of a system to a task's documents, shard by shard, each kept as soon as it is there.

A shard is a range of documents. Its answers go to one file, written whole, with a digest over its content; a file that
is not what its digest says counts as not there. Kept are the system's raw answers and a digest of each request, and
nothing that is derived: scores and aggregates are lm_eval's to compute, from all answers at once (`aggregate`).

Who does which shard is a function of the shards alone, and every worker sees the same ones: nothing is negotiated.
Shards that an earlier attempt has finished are skipped, whatever its workers and its size of shards were.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.fingerprint import fingerprint
from pipeline.kept import SHARDS
from pipeline.record import read_json, write_json

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from pipeline.harness.adapter import EngineLM

log = logging.getLogger(__name__)

Documents = dict[str, "list[list[Instance]]"]
"""By task, the requests of each document."""


@dataclass(frozen=True)
class Shard:
    """Documents `start` to `stop` of a task."""

    task: str
    start: int
    stop: int


@dataclass
class Answers:
    """What is known of one task: {document: {"<kind>/<number>": {"request": digest, "answers": [...]}}}."""

    documents: dict[int, dict[str, Any]] = field(default_factory=dict)
    truncated: int = 0
    """Contexts that had to be cut."""


def plan(documents: Mapping[str, int], size: int) -> list[Shard]:
    """All shards of tasks with so many documents."""
    return [
        Shard(task, start, min(start + size, count))
        for task, count in documents.items()
        for start in range(0, count, size)
    ]


def documents_of(instances: Sequence[Instance]) -> list[list[Instance]]:
    """Requests by document, in the documents' order."""
    grouped: dict[int, list[Instance]] = {}
    for instance in instances:
        assert instance.doc_id is not None  # `build_requests` has looked
        grouped.setdefault(instance.doc_id, []).append(instance)
    return list(grouped.values())


def answer(model: EngineLM, documents: Sequence[Sequence[Instance]]) -> Answers:
    """Put the documents' requests to the model."""
    before = model.truncated
    asked = [
        (instance, repeat) for requests in documents for instance in requests for repeat in range(instance.repeats or 1)
    ]
    given: dict[int, Any] = {}
    for kind in dict.fromkeys(instance.request_type for instance, _ in asked):
        places = [place for place, (instance, _) in enumerate(asked) if instance.request_type == kind]
        given |= dict(zip(places, getattr(model, kind)([asked[place][0] for place in places]), strict=True))
    found = Answers(truncated=model.truncated - before)
    for place, (instance, _) in enumerate(asked):
        assert instance.doc_id is not None  # as above
        entry = found.documents.setdefault(instance.doc_id, {})
        entry.setdefault(request_key(instance), {"request": request_digest(instance), "answers": []})
        entry[request_key(instance)]["answers"].append(given[place])
    return found


def request_key(instance: Instance) -> str:
    """A request within its document."""
    return f"{instance.request_type}/{instance.idx}"


def request_digest(instance: Instance) -> str:
    """Of everything that the model is asked."""
    return hashlib.sha256(json.dumps(instance.args, sort_keys=True, default=str).encode()).hexdigest()[:16]


# --- files


def shard_file(folder: Path, shard: Shard) -> Path:
    """Where a shard's answers are kept. Names of tasks may hold anything, so a digest stands for them."""
    return folder / SHARDS / fingerprint(shard.task) / f"{shard.start:08d}-{shard.stop:08d}.json"


def keep(folder: Path, shard: Shard, answers: Answers) -> Path:
    """Write a shard's answers, whole or not at all; returns the file."""
    path = shard_file(folder, shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"task": shard.task, "truncated": answers.truncated, "documents": answers.documents}
    content = json.loads(json.dumps(content))  # as it will be read, for the digest
    write_json(path, {"content": content, "digest": _digest(content)})
    return path


def kept(folder: Path, task: str) -> Answers:
    """All answers to a task that are there and whole."""
    found = Answers()
    for path in sorted((folder / SHARDS / fingerprint(task)).glob("*.json")):
        try:
            entry = read_json(path) or {}
        except ValueError:
            entry = {}
        content = entry.get("content")
        if content is None or _digest(content) != entry.get("digest"):
            log.warning("%s is damaged and is done again", path)
            continue
        fresh = {int(number): value for number, value in content["documents"].items()}
        found.truncated += content["truncated"] if fresh.keys() - found.documents.keys() else 0
        found.documents |= fresh
    return found


def answered(folder: Path, task: str) -> int:
    """How many of a task's documents have answers, by the names of the files alone: for a progress bar."""
    ranges = (map(int, path.stem.split("-")) for path in (folder / SHARDS / fingerprint(task)).glob("*.json"))
    return len({number for start, stop in ranges for number in range(start, stop)})


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def missing(folder: Path, shards: Sequence[Shard]) -> list[Shard]:
    """The shards of which some document is not answered yet."""
    there = {task: kept(folder, task).documents.keys() for task in dict.fromkeys(shard.task for shard in shards)}
    return [
        shard for shard in shards if any(number not in there[shard.task] for number in range(shard.start, shard.stop))
    ]
