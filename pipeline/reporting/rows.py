"""One row of plain values per cell of a sweep, read from the store's payloads and records; nothing is measured here.

Latency is compared only within one `latency.json`, where the systems alternated in one process: `speed_up` is the full
model's TPOT over the cell's own of the same file and the same grid point (the first of the benchmark's grid).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overfill.dial import NONE
from overfill.errors import UserError
from overfill.shapes import ModelShape
from overfill.workload import EXACT, REFRESH
from pipeline.config_io import is_under
from pipeline.curves import Curve
from pipeline.fingerprint import digest_once
from pipeline.graph import SYSTEM, ratio_label
from pipeline.harness.results import TaskMetric, primary_metrics
from pipeline.stage import External
from pipeline.stages.folders import model_folder
from pipeline.store import AlteredArtifact

if TYPE_CHECKING:
    from pipeline.store import Store
    from pipeline.sweep import Cell

Row = dict[str, Any]

_LARGEST = 1e15
"""A record may have been edited: what is beyond is no measurement."""
BENCHMARK = ("batch", "prompt", "output", "device")
"""The conditions of a cell's latency."""


def rows(cells: Sequence[Cell], store: Store) -> list[Row]:
    """One mapping per cell, in the order of the cells; a value that is not there yet is None."""
    return [row(cell, store) for cell in cells]


def row(cell: Cell, store: Store) -> Row:
    """Everything that is known about one cell. Times in seconds, sizes in bytes, intervals as [low, high]."""
    shape = _parameters(cell, store)
    return {
        "cell": cell.label,
        "identity": cell.identity,
        "teacher": cell.teacher,
        "method": cell.method,
        "ratio": cell.ratio,
        "ratio_effective": shape["ratio_effective"],
        "seed": cell.seed,
        "variant": variant(cell),
        "parameters": shape["parameters"],
        "parameters_kept": shape["kept"],
        "parameters_full": shape["full"],
        **_accuracy(_metrics(cell, store, "evaluate")),
        "tasks": {name: _task(metric) for name, metric in primary_metrics(cell, store).items()},
        **_latency(latency_row(cell, store, latency_system(cell)), latency_row(cell, store, "full")),
        "train_tokens": _train_tokens(cell, store),
        "train_s": _train_seconds(cell, store),
        "state": "done" if all(store.record(leaf) for leaf in cell.leaves) else "unfinished",
        "store": str(store.folder(cell.leaves[0])),
    }


def _accuracy(metrics: Mapping[str, Any]) -> Row:
    low, high = metrics.get("eval/exact_match_low"), metrics.get("eval/exact_match_high")
    return {
        "exact_match": metrics.get("eval/exact_match"),
        "exact_match_interval": None if low is None or high is None else [low, high],
        "samples": metrics.get("eval/samples"),
        "perplexity": metrics.get("eval/perplexity"),
        "response_nll": metrics.get("eval/response_nll"),
        "agreement": metrics.get("eval/agreement"),
    }


def _task(metric: TaskMetric) -> Row:
    names = ("metric", "filter", "value", "stderr", "samples", "higher_is_better")
    return {name: getattr(metric, name) for name in names}


def _latency(own: Mapping[str, Any], full: Mapping[str, Any]) -> Row:
    names = ("ttft_s", "tpot_s", "tpot_spread_s", "tokens_per_s", "peak_bytes", "weight_bytes")
    return {
        **{name: own.get(name) for name in names},
        "speed_up": _share(full.get("tpot_s"), own.get("tpot_s")),
        "full": {name: full.get(name) for name in ("ttft_s", "tpot_s", "tpot_spread_s", "peak_bytes") if full},
        "benchmark": {name: own[name] for name in BENCHMARK if name in own},
    }


def variant(cell: Cell) -> str:
    """What teacher, ratio and method do not tell: `h0.3-i0.6` for two different widths, `learning_rate=0.001`, and the
    name of a released model."""
    told = ("teacher", "prune", "distill.method", "released")
    other = {path: value for path, value in cell.axes.items() if not any(is_under(path, name) for name in told)}
    parts = [f"{path.rsplit('.', 1)[-1]}={_plain(value)}" for path, value in sorted(other.items())]
    if cell.method == "released" and cell.config.released is not None:
        parts = [cell.config.released.label, *parts]
    label = "" if cell.widths is None else ratio_label(cell.widths)
    return " ".join([label, *parts] if label.startswith("h") else parts)


def _plain(value: Any) -> str:
    """`kl:1,kv:3` for a mapping: short enough for a column."""
    if isinstance(value, Mapping):
        return ",".join(f"{name}:{_plain(part)}" for name, part in value.items())
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str, separators=(",", ":"))


def payload_of(cell: Cell, store: Store, name: str) -> Path | None:
    """Payload folder of the cell's stage of that name, None while there is none."""
    stage = cell.stage(name)
    return None if stage is None or store.record(stage) is None else store.payload(stage)


def file_of(cell: Cell, store: Store, name: str, file: str) -> Path | None:
    """A file in the payload of the cell's stage of that name, None while there is no payload.

    Raises AlteredArtifact for a file with another digest than its record says: what is compared is what was measured."""
    stage = cell.stage(name)
    record = None if stage is None else store.record(stage)
    if stage is None or record is None:
        return None
    path = store.payload(stage) / file
    if file not in record.files or digest_once(path) != record.files[file].sha256:
        raise AlteredArtifact(
            f"{path}: this file of an artifact was altered; restore it, or run again to build it anew"
        )
    return path


def latency_system(cell: Cell) -> str:
    """Which system of its benchmark a cell is."""
    stage = cell.stage("benchmark")
    refresh = NONE if stage is None else stage.config["refresh"]
    return SYSTEM[cell.method] if refresh == NONE else EXACT if refresh == EXACT else REFRESH


def latency_row(cell: Cell, store: Store, system: str) -> dict[str, Any]:
    """The benchmark's numbers of one system at the first grid point, empty while there are none."""
    file = file_of(cell, store, "benchmark", "latency.json")
    if file is None:
        return {}
    measured = _read_json(file)
    found = next((entry for entry in measured["rows"] if entry["system"] == system), None)
    return {} if found is None else {**found, "device": measured["device"]}


def _metrics(cell: Cell, store: Store, name: str) -> Mapping[str, Any]:
    stage = cell.stage(name)
    record = None if stage is None else store.record(stage)
    numbers = {} if record is None else record.metrics
    return {name: value for name, value in numbers.items() if isinstance(value, int | float) and abs(value) < _LARGEST}


def _parameters(cell: Cell, store: Store) -> dict[str, float | int | None]:
    """Parameters of the model that decodes, and how many that is of the full model's.

    Read from the models in the store; before they are there, from the cell's planned shapes."""
    full = model_shape(_teacher_folder(cell, store)) or cell.shape
    planned = cell.decodes if cell.method == "released" else full
    if cell.widths is not None:
        planned = full.pruned(cell.widths.hidden, cell.widths.intermediate)
    made = (payload_of(cell, store, name) for name in ("distill", "prune", "released"))
    own = model_shape(next(filter(None, made), None)) or planned
    kept = own.parameters() / full.parameters()
    return {
        "parameters": own.parameters(),
        "kept": kept,
        "ratio_effective": 1 - kept,
        "full": full.parameters(),
    }


def _teacher_folder(cell: Cell, store: Store) -> Path | None:
    if cell.stage("teacher") is not None:
        return payload_of(cell, store, "teacher")
    sources = (source for stage in cell.stages for source in stage.inputs.values())
    given = next((source for source in sources if isinstance(source, External) and source.kind == "model"), None)
    return None if given is None or given.location is None else Path(given.location)


def model_shape(path: Path | None) -> ModelShape | None:
    """Shape of the `transformers` model in a payload or folder; None where there is none."""
    if path is None:
        return None
    config = model_folder(path) / "config.json"
    return ModelShape.from_config(_read_json(config), str(config))


def _train_tokens(cell: Cell, store: Store) -> int | None:
    stage = cell.stage("distill")
    if stage is None:
        return None
    curve = Curve(store.progress(stage) / "metrics.jsonl")
    curve.update()
    return None if curve.last is None else curve.last.tokens


def _train_seconds(cell: Cell, store: Store) -> float | None:
    """Duration of the student's training, all attempts together."""
    stage = cell.stage("distill")
    record = None if stage is None else store.record(stage)
    return None if record is None else record.seconds_all_attempts


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove its stage folder and run the sweep again") from error


def _share(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole
