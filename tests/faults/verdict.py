"""What came out of a run, and whether it is what an unbroken one gives.

Compared are the SHA-256 of every file that is a function of the experiment (latencies are not); every line of metrics
that was ever written for a step, in whatever attempt: with one worker in fp32 the loss of a step says, to the last bit,
which samples it and all steps before it have seen; and what MLflow has, run by run and step by step.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline import gc
from pipeline.curves import parse_line
from pipeline.lease import Watch
from pipeline.record import RECORD_FILE, Record
from pipeline.store import AlteredArtifact, Store
from tests.faults.place import STAGES, STEPS, count_of, name_of
from tests.machine_metrics import of_the_machine

MEASURED = ("benchmark",)
"""Stages whose payload is a measurement and differs from run to run."""
KEPT_BY_GC = ("set aside as altered", "of a run that has ended")
"""Reasons of `overfill gc` for what may be left: evidence of damage from outside; Ray Tune's folders, once they are old,
which they are at once when the times of files are moved."""


@dataclass(frozen=True)
class Result:
    """What an experiment's store holds at the end."""

    files: dict[str, dict[str, str]]
    """Artifact -> file -> SHA-256."""
    steps: dict[str, dict[str, list[str]]]
    """Artifact that is trained -> `step metric` -> every value that was ever written for it, each once, as JSON."""
    history: dict[str, list[int]]
    """`run metric` in MLflow, a cell's run by its name, -> its steps as they are there."""

    @classmethod
    def of(cls, store: Path, uri: str | None = None) -> Result:
        """Read a store, and MLflow at `uri` (by default the store's own file)."""
        return cls(_files(store), _steps(store), dict(_history(store, uri)))

    @classmethod
    def read(cls, path: Path) -> Result:
        return cls(**json.loads(path.read_text()))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1))


def differences(unbroken: Result, found: Result) -> list[str]:
    """In what a result is not that of the unbroken run; one line each."""
    told: list[str] = []
    for artifact, files in unbroken.files.items():
        for name in sorted(files.keys() | found.files.get(artifact, {}).keys()):
            if files.get(name) != found.files.get(artifact, {}).get(name):
                told.append(f"{artifact}: {name} is another file than that of the unbroken run")
    for artifact, lines in unbroken.steps.items():
        there = found.steps.get(artifact, {})
        wrong = [name for name in sorted(lines.keys() | there.keys()) if lines.get(name) != there.get(name)]
        told += [f"{artifact}: {name} is {there.get(name)}, not {lines.get(name)}" for name in wrong[:3]]
        told += [f"{artifact}: and {len(wrong) - 3} more"] if len(wrong) > 3 else []
    for name in sorted(unbroken.history.keys() | found.history.keys()):
        expected, there = unbroken.history.get(name), found.history.get(name)
        if expected != there:
            told.append(f"MLflow: {name} has the steps {there}, not {expected}")
    return told


def leftovers(store: Path, cells: int = 1) -> list[str]:
    """What a run that has ended should not have left in its store: artifacts that are not whole, leases, garbage."""
    here, told = Store(store), []
    for stage in STAGES:
        folders = [path for path in store.glob(f"{stage}/*") if (path / "attempts").is_dir()]
        if len(folders) != count_of(stage, cells):
            told.append(f"{stage}: {len(folders)} artifacts instead of {count_of(stage, cells)}")
        for folder in folders:
            state = Watch(folder / "attempts").look().state
            if state != "free":
                told.append(f"{name_of(folder)}: its lease is {state}")
            try:
                if here.verify(folder.name.rpartition("_")[2]) is None:
                    told.append(f"{name_of(folder)}: there is no artifact")
            except AlteredArtifact as error:
                told.append(f"{name_of(folder)}: {error}")
    found = [one for one in gc.collect(here) if one.reason not in KEPT_BY_GC]
    return told + [f"garbage: {one.path.relative_to(store)} ({one.reason})" for one in found]


def records(store: Path) -> dict[str, Record]:
    """Artifact -> record of what is finished."""
    found = sorted(store.glob(f"*/*/payload/{RECORD_FILE}"))
    return {name_of(path.parents[1]): Record.model_validate_json(path.read_bytes()) for path in found}


def _files(store: Path) -> dict[str, dict[str, str]]:
    return {
        name: {file: entry.sha256 for file, entry in record.files.items()}
        for name, record in records(store).items()
        if record.stage not in MEASURED
    }


def _steps(store: Path) -> dict[str, dict[str, list[str]]]:
    """Not through `curves.Curve`, which keeps of every step the last line only."""
    paths = [path for stage in STEPS for path in sorted(store.glob(f"{stage}/*/progress/metrics.jsonl"))]
    return {name_of(path.parents[1]): _values(path) for path in paths}


def _values(path: Path) -> dict[str, list[str]]:
    values: dict[str, set[str]] = {}
    for line in path.read_bytes().split(b"\n"):
        point = parse_line(line)
        if point is None:
            continue  # a killed writer's half line
        for name, value in {"tokens": point.tokens, **point.metrics}.items():
            if not of_the_machine(name):
                values.setdefault(f"{point.step} {name}", set()).add(json.dumps(value))
    return {name: sorted(found) for name, found in sorted(values.items())}


def _history(store: Path, uri: str | None) -> Iterator[tuple[str, list[int]]]:
    """Steps of every metric of every run; and how many runs there are in which state."""
    with tempfile.TemporaryDirectory() as copies:
        if uri is None:
            # A copy under a name of its own, for MLflow keeps one connection for each name.
            uri = f"sqlite:///{shutil.copy(store / 'mlflow.db', Path(copies) / f'{Path(copies).name}.db')}"
        yield from _history_at(uri)


def _history_at(uri: str) -> Iterator[tuple[str, list[int]]]:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    counts: Counter[str] = Counter()
    for run in runs:
        kind = "child" if "mlflow.parentRunId" in run.data.tags else "parent"
        counts[f"{kind} runs {run.info.status}"] += 1
        for metric in run.data.metrics:
            yield (
                f"{run.info.run_name} {metric}",
                # By step: MLflow's order is that of the clock, which a fault may turn back.
                sorted(point.step for point in client.get_metric_history(run.info.run_id, metric)),
            )
    for name, count in counts.items():
        yield name, [count]
