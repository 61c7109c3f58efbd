"""An experiment in a store: its file, its cells, and running what is missing of them.

The effective experiment (overrides applied, paths absolute) is kept in `<store>/sweeps/<name>/experiment.yaml`, so that
`status`, `resume` and `report` need only the name. Nothing to do is found out from files alone, without Ray.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from overfill.errors import UserError
from pipeline.config import ExperimentConfig
from pipeline.config_io import dump_yaml, load_experiment
from pipeline.objects.store import ObjectStore
from pipeline.paths import local_path
from pipeline.record import write_text
from pipeline.resume import Action, plan
from pipeline.stage import Stage
from pipeline.store import Store
from pipeline.sweep import LEAVES, Cell, expand, to_build

if TYPE_CHECKING:
    from pipeline.cluster import Capacity
    from pipeline.interruption import Interruption
    from pipeline.tune import Outcome

DEFAULT_STORE = "./runs"
STORE_VARIABLE = "OVERFILL_STORE"
EXPERIMENT_FILE = "experiment.yaml"


@dataclass(frozen=True)
class Experiment:
    """An experiment and its cells."""

    config: ExperimentConfig
    cells: list[Cell]

    @property
    def name(self) -> str:
        """Name of the sweep."""
        return self.config.name

    @property
    def leaves(self) -> list[Stage]:
        """What all cells end in, each once."""
        return list({stage.identity: stage for cell in self.cells for stage in cell.leaves}.values())

    @property
    def yaml(self) -> str:
        """The effective experiment: what was written, overrides applied, paths absolute."""
        values = self.config.model_dump(mode="json", exclude_unset=True)
        _make_absolute(values)
        return dump_yaml(values)


def _make_absolute(values: dict) -> None:
    for section, field in (("data", "path"), ("evaluate", "task_path"), ("evaluate", "task_data")):
        if given := values.get(section, {}).get(field):
            values[section][field] = str(Path(given).expanduser().absolute())
    for section in (values.get("teacher") or {}, values.get("released") or {}):
        if section.get("model") and Path(section["model"]).expanduser().is_dir():
            section["model"] = str(Path(section["model"]).expanduser().absolute())


def open_store(store: str | None, verify: bool = False) -> Store:
    """The store at the folder or URL `store`, `$OVERFILL_STORE` or ./runs, of which `verify` reads every byte.

    Raises UserError when it cannot be one."""
    given = store or os.environ.get(STORE_VARIABLE) or DEFAULT_STORE
    if "://" in given:
        return ObjectStore.reached(given, verify)
    root = local_path(given, "--store")
    if os.path.lexists(root) and not root.is_dir():
        raise UserError(f"--store {root}: is no folder; give one, or a place where one can be made")
    return Store(root, verify=verify)


def read_experiment(file: str, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file and expand its cells. Raises UserError for anything wrong in it."""
    config = load_experiment(file, overrides)
    return Experiment(config, expand(config, file))


def sweep_folder(store: Store, name: str) -> Path:
    """Where a sweep's own files lie: the experiment, MLflow's run ids, tables, plots."""
    return store.root / "sweeps" / name


def known_experiment(store: Store, name: str | None) -> Experiment:
    """An experiment that was run in this store; the only one when no name is given.

    Raises UserError when there is none of that name, naming those that are there."""
    store.bring(store.root / "sweeps", EXPERIMENT_FILE)
    names = sorted(path.parent.name for path in (store.root / "sweeps").glob(f"*/{EXPERIMENT_FILE}"))
    if name is None and len(names) == 1:
        name = names[0]
    if name is None or name not in names:
        known = ", ".join(names) if names else "none yet; start one with `overfill run FILE`"
        asked = "give the name of an experiment" if name is None else f"no experiment {name!r}"
        raise UserError(f"{store.location}: {asked}; known: {known}")
    return read_experiment(str(sweep_folder(store, name) / EXPERIMENT_FILE))


def planned(experiment: Experiment, store: Store, explain: bool = True, continue_stopped: bool = False) -> list[Action]:
    """What running the experiment would do: make the results, and anew what was altered on the way to them."""
    stages = {stage.identity: stage for cell in experiment.cells for stage in cell.stages}
    with store.look_once(stages.values()):
        return _planned(experiment, store, stages, explain, continue_stopped)


def _planned(
    experiment: Experiment, store: Store, stages: dict[str, Stage], explain: bool, continue_stopped: bool
) -> list[Action]:
    leaves = {leaf.identity: leaf for leaf in experiment.leaves}
    for leaf in leaves.values():
        store.is_altered(leaf, full=True)  # a report reads them, and they are small; the facts below know it then
    others = [stage for identity, stage in stages.items() if identity not in leaves]
    targets = [*leaves.values(), *(stage for stage in others if store.is_altered(stage))]
    facts = store.gather(targets, explain=explain)
    return plan(targets, facts, targets, continue_stopped=continue_stopped)


def is_done(experiment: Experiment, store: Store) -> bool:
    """Whether every cell's results are there."""
    return all(action.kind == "reuse" for action in planned(experiment, store, explain=False))


def keep_experiment(experiment: Experiment, store: Store) -> Path:
    """Write the effective experiment into its folder in the store, and return the folder."""
    folder = sweep_folder(store, experiment.name)
    try:
        store.prepare()
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / EXPERIMENT_FILE, experiment.yaml)
        store.keep(folder / EXPERIMENT_FILE)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--store {store.location}: cannot be written ({reason}); give another folder") from error
    return folder


def run_missing(
    experiment: Experiment, store: Store, address: str | None, console: Console, continue_stopped: bool = False
) -> list[Outcome]:
    """Run what is missing of the experiment, on a cluster at `address` or on this machine.

    Raises KeyboardInterrupt when it was asked to end before all was done."""
    from pipeline.cluster import check_fits, connected, usage
    from pipeline.progress import Progress
    from pipeline.tracking.tracker import Tracker
    from pipeline.utilisation import FILE, Sampler

    with ExitStack() as stack:
        has = stack.enter_context(connected(address))
        check_fits(experiment.config)
        _check_tasks(experiment, store, console)
        stack.enter_context(Tracker(store, experiment.config, experiment.cells))
        progress = stack.enter_context(Progress(store, experiment.cells, console))
        folder = sweep_folder(store, experiment.name)
        store.bring(folder, FILE)
        stack.enter_context(Sampler(folder, usage, progress.waiting, keep=store.keep))
        interruption = stack.enter_context(_interruption(experiment, store, console))
        outcomes = _accuracy_then_latency(experiment, store, has, interruption, continue_stopped)
        if interruption.requested() and not is_done(experiment, store):
            raise KeyboardInterrupt
        return outcomes


def _interruption(experiment: Experiment, store: Store, console: Console) -> Interruption:
    from pipeline.interruption import Interruption
    from pipeline.progress import running_stages
    from pipeline.watch import snapshot

    return Interruption(
        store.interrupt_flag(),
        experiment.config.resources.grace_s,
        waiting_for=lambda: running_stages(snapshot(store, experiment.cells)),
        say=lambda text: console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True),
    )


def _accuracy_then_latency(
    experiment: Experiment, store: Store, has: Capacity, interruption: Interruption, continue_stopped: bool
) -> list[Outcome]:
    """All cells up to their accuracy, then the latency of those that got there.

    A benchmark has its device to itself, so among training cells it would make every core wait for the slowest one."""
    from pipeline.cluster import concurrent_cells
    from pipeline.tune import run_cells  # imports ray.tune: only when there is something to run

    config, outcomes = experiment.config, {}
    for leaf in LEAVES:
        alive = [
            cell for cell in experiment.cells if cell.index not in outcomes or outcomes[cell.index].state == "done"
        ]
        missing = [cell for cell in alive if to_build(cell, (leaf,), store)]
        if missing and not interruption.requested():
            at_once = concurrent_cells(config, has, len(missing))
            asha = config.sweep.asha if leaf == "evaluate" else None  # nothing is trained for a latency
            found = run_cells(
                missing, store, config.resources, at_once, (leaf,), interruption.flag, asha, continue_stopped
            )
            outcomes |= {outcome.cell: outcome for outcome in found}
            store.look_anew()
    return list(outcomes.values())


def _check_tasks(experiment: Experiment, store: Store, console: Console) -> None:
    """See early that tasks can be loaded: their data may be on the Hub, and nobody wants to hear of it after training."""
    built = [stage for cell in experiment.cells for stage in to_build(cell, ("tasks",), store)]
    missing = {stage.identity: stage for stage in built if stage.name == "tasks"}
    if missing:
        from pipeline.stages.tasks import check_tasks  # imports ray: only when there is something to run

        names = sorted({name for stage in missing.values() for name in stage.config["tasks"]})
        console.print(f"loading the data of {', '.join(names)}", highlight=False, soft_wrap=True)
        check_tasks(missing.values())
