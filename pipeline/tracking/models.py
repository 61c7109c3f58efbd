"""What MLflow is told about a cell's corpus and student, as plain values: data sets, and a logged model.

The logged model is a reference (`pipeline.tracking.pyfunc_model`): place and digests of the student's files in the store.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from overfill.dial import EXACT, dial
from pipeline.graph import SYSTEM
from pipeline.tracking.pyfunc_model import REFERENCE_FILE

if TYPE_CHECKING:
    from pipeline.record import Record
    from pipeline.store import Store
    from pipeline.sweep import Cell

SPLITS = {"train": "training", "test": "evaluation"}
"""Split of the corpus -> MLflow's word for what it is used for."""


@dataclass(frozen=True)
class DatasetUse:
    """A data set that a run has read."""

    name: str
    digest: str
    """Identity of the stage that made its token shards."""
    source_type: str
    source: str
    """JSON."""
    profile: str
    """JSON: samples and tokens."""
    context: str
    """What it was used for."""


@dataclass(frozen=True)
class LoggedStudent:
    """A student as MLflow lists it under Models."""

    name: str
    parameters: dict[str, str]
    files: dict[str, str] = field(default_factory=dict)
    """What the logged model holds, name -> text."""


def datasets(cell: Cell, store: Store) -> list[DatasetUse]:
    """The corpus of a finished cell, a split at a time."""
    stage = cell.stage("data")
    record = None if stage is None else store.record(stage)
    if stage is None or record is None:
        return []
    data = cell.config.data
    place = {"dataset": data.dataset, "revision": data.revision} if data.source == "hf" else {"uri": data.path}
    return [
        DatasetUse(
            name=f"{data.dataset or data.source}-{split}".replace("/", "-"),
            digest=stage.identity,
            source_type="hugging_face" if data.source == "hf" else "local",
            source=json.dumps(place | {"shards": f"{store.place(stage)}/{split}"}),
            profile=json.dumps(_profile(record, split)),
            context=context,
        )
        for split, context in SPLITS.items()
        if _profile(record, split)
    ]


def _profile(record: Record, split: str) -> dict[str, Any]:
    start = f"data/{split}_"
    return {name.removeprefix(start): value for name, value in record.metrics.items() if name.startswith(start)}


def student(cell: Cell, store: Store) -> LoggedStudent | None:
    """The trained student of a finished cell; None where there is none to log."""
    stage, teacher = cell.stage("distill"), cell.stage("teacher")
    record = None if stage is None else store.record(stage)
    if stage is None or record is None:
        return None
    asked = dial(cell.config.evaluate.refresh) if SYSTEM[cell.method] == "overfill" else "none"
    weights = {name: entry.sha256 for name, entry in record.files.items() if name.startswith("model/")}
    reference = {
        "system": SYSTEM[cell.method],
        "student": f"{store.place(stage)}/model",
        "full": None if teacher is None else f"{store.place(teacher)}/model",
        "options": {"exact": True} if asked == EXACT else {"refresh": asked},
        "sha256": {name.removeprefix("model/"): digest for name, digest in weights.items()},
    }
    known = {"method": cell.method, "teacher": cell.teacher, "ratio": f"{cell.ratio:g}", "seed": str(cell.seed)}
    return LoggedStudent(
        name=re.sub(r"[/:.%\"']", "_", f"{cell.teacher}-{cell.ratio:g}-{cell.method}-s{cell.seed}"),
        parameters=known | {"identity": stage.identity},
        files={REFERENCE_FILE: json.dumps(reference, indent=1) + "\n"},
    )
