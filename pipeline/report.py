"""What a sweep found: one row of plain values per cell, the comparisons between cells, and what to ship.

Everything is read from the store's payloads and records; nothing is measured here. Latency is compared only within one
`latency.json`, where the systems alternated in one process: `speed_up` is the full model's TPOT over the cell's own of
the same file and the same grid point (the first of the benchmark's grid).

OverFill against pruned-only is a paired question: the same samples, seeds, ratio and full model, answered by
`pipeline.statistics.compare`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overfill.dial import NONE
from overfill.errors import UserError
from overfill.shapes import ModelShape
from overfill.workload import EXACT, REFRESH
from pipeline.curves import Curve
from pipeline.graph import SYSTEM, ratio_label
from pipeline.stage import External
from pipeline.stages.folders import model_folder
from pipeline.statistics import Comparison, Interval, compare, share_over_seeds

if TYPE_CHECKING:
    from pipeline.store import Store
    from pipeline.sweep import Cell

Row = dict[str, Any]

METHODS = ("full", "overfill", "pruned", "scratch")
BENCHMARK = ("batch", "prompt", "output", "device")
"""The conditions of a cell's latency."""
KEEP_QUALITY = 0.95
"""A configuration is worth shipping when it keeps this share of the full model's exact match."""


@dataclass(frozen=True)
class Report:
    """Everything that is said about a sweep."""

    name: str
    description: str
    rows: list[Row]
    groups: list[Group]
    duels: list[Duel]

    @property
    def to_ship(self) -> dict[str, Advice]:
        """Per teacher the configuration to ship."""
        return to_ship(self.groups)


def make_report(name: str, description: str, cells: Sequence[Cell], store: Store) -> Report:
    """Read the store and compare the cells. Raises UserError for a result in the store that cannot be read."""
    table, outcomes = rows(cells, store), correct_samples(cells, store)
    found = groups(table, outcomes)
    return Report(name, description, table, found, duels(found, outcomes))


def rows(cells: Sequence[Cell], store: Store) -> list[Row]:
    """One mapping per cell, in the order of the cells; a value that is not there yet is None."""
    return [row(cell, store) for cell in cells]


def row(cell: Cell, store: Store) -> Row:
    """Everything that is known about one cell. Times in seconds, sizes in bytes, intervals as [low, high]."""
    evaluation, latency = _metrics(cell, store, "evaluate"), latency_row(cell, store, latency_system(cell))
    shape = _parameters(cell, store)
    baseline = latency_row(cell, store, "full")
    low, high = evaluation.get("eval/exact_match_low"), evaluation.get("eval/exact_match_high")
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
        "exact_match": evaluation.get("eval/exact_match"),
        "exact_match_interval": None if low is None or high is None else [low, high],
        "samples": evaluation.get("eval/samples"),
        "perplexity": evaluation.get("eval/perplexity"),
        "response_nll": evaluation.get("eval/response_nll"),
        "agreement": evaluation.get("eval/agreement"),
        "ttft_s": latency.get("ttft_s"),
        "tpot_s": latency.get("tpot_s"),
        "tokens_per_s": latency.get("tokens_per_s"),
        "peak_bytes": latency.get("peak_bytes"),
        "speed_up": _share(baseline.get("tpot_s"), latency.get("tpot_s")),
        "benchmark": {name: latency[name] for name in BENCHMARK if name in latency},
        "train_tokens": _train_tokens(cell, store),
        "state": "done" if all(store.record(leaf) for leaf in cell.leaves) else "unfinished",
        "store": str(store.folder(cell.leaves[0])),
    }


def variant(cell: Cell) -> str:
    """What teacher, ratio and method do not tell: `h0.3-i0.6` for two different widths, `learning_rate=0.001`."""
    told = ("teacher", "prune", "distill.method")
    other = {path: value for path, value in cell.axes.items() if not any(_under(path, name) for name in told)}
    parts = [f"{path.rsplit('.', 1)[-1]}={_plain(value)}" for path, value in sorted(other.items())]
    label = "" if cell.widths is None else ratio_label(cell.widths)
    return " ".join([label, *parts] if label.startswith("h") else parts)


def _under(path: str, section: str) -> bool:
    return path == section or path.startswith(section + ".")


def _plain(value: Any) -> str:
    """`kl:1,kv:3` for a mapping: short enough for a column."""
    if isinstance(value, Mapping):
        return ",".join(f"{name}:{_plain(part)}" for name, part in value.items())
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str, separators=(",", ":"))


@dataclass(frozen=True)
class Group:
    """The cells that differ in nothing but the seed, and their numbers over the seeds."""

    teacher: str
    ratio: float
    variant: str
    method: str
    members: tuple[Row, ...]
    exact_match: Interval | None

    def mean(self, name: str) -> float | None:
        """Mean of a column over the seeds that have it."""
        values = [member[name] for member in self.members if member[name] is not None]
        return sum(values) / len(values) if values else None

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the members."""
        return tuple(member["seed"] for member in self.members)


def groups(table: Sequence[Row], outcomes: Mapping[str, Mapping[int, bool]]) -> list[Group]:
    """Rows without their seeds, in the order teacher, ratio, variant, method; the full model once per teacher.

    `outcomes` has {identity: {sample: correct}} for the cells that are evaluated."""
    gathered: dict[tuple[str, float, str, int], dict[str, Row]] = {}
    for entry in table:
        full = entry["method"] == "full"
        key = (entry["teacher"], 0.0 if full else entry["ratio"], "" if full else entry["variant"])
        gathered.setdefault((*key, METHODS.index(entry["method"])), {})[entry["identity"]] = entry
    return [
        Group(teacher, ratio, text, METHODS[method], tuple(members.values()), _over_seeds(members, outcomes))
        for (teacher, ratio, text, method), members in sorted(gathered.items(), key=lambda item: item[0])
    ]


def _over_seeds(members: Mapping[str, Row], outcomes: Mapping[str, Mapping[int, bool]]) -> Interval | None:
    known = [outcomes[identity] for identity in members if identity in outcomes]
    return share_over_seeds(known) if known else None


@dataclass(frozen=True)
class Duel:
    """OverFill against pruned-only under otherwise equal conditions."""

    teacher: str
    ratio: float
    variant: str
    comparison: Comparison


def duels(found: Sequence[Group], outcomes: Mapping[str, Mapping[int, bool]]) -> list[Duel]:
    """Every (teacher, ratio, variant) where both methods are evaluated, over the seeds that both have."""
    pruned = {(group.teacher, group.ratio, group.variant): group for group in found if group.method == "pruned"}
    result: list[Duel] = []
    for group in found:
        rival = pruned.get((group.teacher, group.ratio, group.variant))
        if group.method != "overfill" or rival is None:
            continue
        ours, theirs = _by_seed(group, outcomes), _by_seed(rival, outcomes)
        seeds = [seed for seed in ours if seed in theirs]
        if seeds:
            comparison = compare([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
            result.append(Duel(group.teacher, group.ratio, group.variant, comparison))
    return result


def _by_seed(group: Group, outcomes: Mapping[str, Mapping[int, bool]]) -> dict[int, Mapping[int, bool]]:
    members = [member for member in group.members if member["identity"] in outcomes]
    return {member["seed"]: outcomes[member["identity"]] for member in members}


def correct_samples(cells: Iterable[Cell], store: Store) -> dict[str, dict[int, bool]]:
    """{identity of the cell: {sample: correct}} of every cell that is evaluated."""
    import pyarrow.parquet as parquet

    found: dict[str, dict[int, bool]] = {}
    for cell in cells:
        folder = payload_of(cell, store, "evaluate")
        if folder is None or cell.identity in found:
            continue
        # Not read_table: that loads pyarrow.dataset, which loads pandas, which takes longer than everything else here.
        with parquet.ParquetFile(folder / "samples.parquet") as file:
            table = file.read(columns=["sample", "correct"]).to_pydict()
        found[cell.identity] = dict(zip(table["sample"], map(bool, table["correct"]), strict=True))
    return found


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, quality) points that no other point beats in both, by rising cost."""
    order = sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1]))
    kept: list[int] = []
    for index in order:
        if not kept or points[index][1] > points[kept[-1]][1]:
            kept.append(index)
    return kept


@dataclass(frozen=True)
class Advice:
    """Which student to ship for one full model."""

    best: Group
    full: float
    """Exact match of the full model."""
    keeps_quality: bool
    """Whether `best` keeps `KEEP_QUALITY` of it."""
    is_faster: bool
    """Whether `best` decodes faster than the full model; where it does not, no student does."""


def to_ship(found: Sequence[Group]) -> dict[str, Advice]:
    """Per teacher the fastest of the students that keep the full model's quality, else the most accurate one.

    Only students that decode faster than the full model are considered, if there are any. Teachers are left out that
    have no right answer themselves, and those without a measured student."""
    chosen: dict[str, Advice] = {}
    for teacher in dict.fromkeys(group.teacher for group in found):
        own = [group for group in found if group.teacher == teacher]
        full = next((group.exact_match.value for group in own if group.method == "full" and group.exact_match), 0.0)
        students = [group for group in own if group.method != "full" and group.exact_match and group.mean("speed_up")]
        if not full or not students:
            continue
        faster = [group for group in students if _speed(group) > 1.0]
        keeping = [group for group in faster or students if _share_correct(group) >= KEEP_QUALITY * full]
        best = max(keeping, key=_speed) if keeping else max(faster or students, key=_share_correct)
        chosen[teacher] = Advice(best, full, bool(keeping), bool(faster))
    return chosen


def _speed(group: Group) -> float:
    return group.mean("speed_up") or 0.0


def _share_correct(group: Group) -> float:
    return 0.0 if group.exact_match is None else group.exact_match.value


def payload_of(cell: Cell, store: Store, name: str) -> Path | None:
    """Payload folder of the cell's stage of that name, None while there is none."""
    stage = cell.stage(name)
    return None if stage is None or store.record(stage) is None else store.payload(stage)


def latency_system(cell: Cell) -> str:
    """Which system of its benchmark a cell is."""
    stage = cell.stage("benchmark")
    refresh = NONE if stage is None else stage.config["refresh"]
    return SYSTEM[cell.method] if refresh == NONE else EXACT if refresh == EXACT else REFRESH


def latency_row(cell: Cell, store: Store, system: str) -> dict[str, Any]:
    """The benchmark's numbers of one system at the first grid point, empty while there are none."""
    folder = payload_of(cell, store, "benchmark")
    if folder is None:
        return {}
    measured = _read_json(folder / "latency.json")
    found = next((entry for entry in measured["rows"] if entry["system"] == system), None)
    return {} if found is None else {**found, "device": measured["device"]}


def _metrics(cell: Cell, store: Store, name: str) -> Mapping[str, Any]:
    stage = cell.stage(name)
    record = None if stage is None else store.record(stage)
    return {} if record is None else record.metrics


def _parameters(cell: Cell, store: Store) -> dict[str, float | int | None]:
    """Parameters of the model that decodes, and how many that is of the full model's.

    Read from the models in the store; before they are there, from the cell's planned shapes."""
    full = model_shape(_teacher_folder(cell, store)) or cell.shape
    own = full
    if cell.widths is not None:
        student = payload_of(cell, store, "distill") or payload_of(cell, store, "prune")
        own = model_shape(student) or full.pruned(cell.widths.hidden, cell.widths.intermediate)
    kept = own.parameters() / full.parameters()
    return {"parameters": own.parameters(), "kept": kept, "ratio_effective": 1 - kept}


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


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove its stage folder and run the sweep again") from error


def _share(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole
