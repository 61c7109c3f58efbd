"""Ray Tune runs the cells: a trial is `run_graph(cell.stages)`, as many at once as the cluster allows.

The cells are fixed beforehand (`pipeline.sweep`), so Tune's part is placement, concurrency, and early stopping. A trial
is a driver: it holds a sliver of the head node, or of what `resources.drivers` names, and no CPU, and its stages ask Ray
for what they need. Results live in the store; what a trial returns is only its outcome, so running a sweep again needs no
`Tuner.restore`, and a cell that fails returns its reason instead of raising, for an exception would count against the
whole sweep.

Early stopping is cooperative: when successive halving decides against a cell, a flag is set that its training loop sees
at the next step; it saves its position and ends. Killing the trial instead would leave its placement group behind
(ray#54305).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from overfill.errors import UserError, disk_full
from pipeline.cluster import remove_abandoned_groups
from pipeline.config import AshaConfig, ResourcesConfig
from pipeline.curves import Curve
from pipeline.objects.store import open_at
from pipeline.runner import RunContext, StageFailed, StageInterrupted, StageStopped, run_graph
from pipeline.stop import StopFlag
from pipeline.store import AlteredArtifact, Store
from pipeline.submission.fitting import driver_bundle
from pipeline.sweep import Cell, to_build

log = logging.getLogger(__name__)

RUNG_METRIC = "validation/nll"
"""What successive halving compares; smaller is better."""
DIVERGED = 1e30
"""What a NaN counts as there: Ray leaves a NaN out, and between it and infinity there would be no percentile."""
TRIAL_RETRIES = 3
"""A trial raises nothing, so what Tune sees fail is its process: the next one takes its stage over where it was."""
LOST_TRIAL = (
    f"the process that drives the cell was killed {TRIAL_RETRIES + 1} times; see whether memory is short, and run again"
)
CHUNK = 16
"""Cells in one object of Ray's store."""
_POLL_S = 1.0
DEATH_KNOWN_S = 30.0
"""How long it may take until Ray's head knows of the death of a trial that Tune has heard of."""


@dataclass(frozen=True)
class Outcome:
    """How a cell ended."""

    cell: int
    """Index of the cell."""
    state: Literal["done", "failed", "stopped", "interrupted"]
    reason: str = ""
    """One line: why it is not done."""
    log: str = ""
    """The file with the whole story of a failure."""


@dataclass(frozen=True)
class _Task:
    """What a trial gets of its own."""

    cell: Cell
    before: dict[str, int]
    """Identity of each of its stages -> the newest attempt that had ended when the sweep began."""


@dataclass(frozen=True)
class _Job:
    """What every trial of a sweep gets."""

    chunks: list[ray.ObjectRef[list[_Task]]]
    """The cells, `CHUNK` of them in an object: a trial that read all of them would make the sweep's cost quadratic."""
    store: str
    """Its location."""
    resources: ResourcesConfig
    reports: bool
    """Whether a scheduler wants to hear of the curves."""
    continue_stopped: bool
    leaves: tuple[str, ...]
    interrupt: StopFlag
    """Raised when all shall end."""


def run_cells(
    cells: Sequence[Cell],
    store: Store,
    resources: ResourcesConfig,
    concurrent: int,
    leaves: tuple[str, ...],
    interrupt: StopFlag,
    asha: AshaConfig | None = None,
    continue_stopped: bool = False,
) -> list[Outcome]:
    """Run every cell up to its stages of the names `leaves`; a failing one does not take the others with it.

    When `interrupt` is raised, what runs saves its position and ends, and the rest does not begin."""
    with store.look_once(stage for cell in cells for stage in cell.stages):
        tasks = [_Task(cell, store.ended_attempts(cell.stages)) for cell in cells]
    chunks = [ray.put(tasks[start : start + CHUNK]) for start in range(0, len(tasks), CHUNK)]
    job = _Job(chunks, store.location, resources, asha is not None, continue_stopped, leaves, interrupt)
    place = tune.PlacementGroupFactory([driver_bundle(resources.drivers)])
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_drive, job=job), place),
        param_space={"place": tune.grid_search(list(range(len(cells))))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=concurrent,
            reuse_actors=True,
            scheduler=FIFOScheduler() if asha is None else CooperativeAsha(asha, cells, store),
        ),
        run_config=tune.RunConfig(
            name=f"run-{time.time_ns()}",
            storage_path=str(store.root / "tune"),
            callbacks=[AfterDeath(cells)],
            failure_config=tune.FailureConfig(max_failures=TRIAL_RETRIES),
            verbose=0,
        ),
    )
    results = tuner.fit()
    outcomes = {found.cell: found for result in results if (found := _outcome(result.metrics or {})) is not None}
    return [outcomes.get(cell.index) or Outcome(cell.index, "failed", LOST_TRIAL) for cell in cells]


def _outcome(metrics: dict[str, Any]) -> Outcome | None:
    return Outcome(**metrics["outcome"]) if "outcome" in metrics else None


def _drive(config: dict[str, Any], job: _Job) -> dict[str, Any]:
    """One trial, in a process of its own on the head node."""
    task: _Task = ray.get(job.chunks[config["place"] // CHUNK])[config["place"] % CHUNK]
    cell, store = task.cell, open_at(job.store)
    resources = {name: getattr(job.resources, name) for name in ResourcesConfig.model_fields}
    resources["tokenizer"] = resources["data"]
    context = RunContext(
        resources=resources,
        stop_requested=job.interrupt,
        continue_stopped=job.continue_stopped,
        before=task.before,
    )
    done = threading.Event()
    reporter = threading.Thread(target=_report_curve, args=(cell, store, done), daemon=True)
    if job.reports:
        reporter.start()
    try:
        outcome = _run(cell, store, context, job.leaves)
    finally:
        done.set()
    if job.reports:
        reporter.join()
    return {"outcome": asdict(outcome)}


def _run(cell: Cell, store: Store, context: RunContext, leaves: tuple[str, ...]) -> Outcome:
    try:
        run_graph(cell.stages, store, context, targets=to_build(cell, leaves, store))
    except StageFailed as failure:
        return Outcome(cell.index, "failed", f"{failure.stage.name}: {failure.cause}", str(failure.log))
    except StageStopped as stopped:
        return Outcome(cell.index, "stopped", f"{stopped.stage.name}: {stopped.reason}")
    except StageInterrupted as interrupted:
        return Outcome(cell.index, "interrupted", f"{interrupted.stage.name}: {interrupted.reason}")
    except (AlteredArtifact, UserError) as error:
        return Outcome(cell.index, "failed", str(error))
    except OSError as error:  # the store itself cannot be written or read: no stage, and no attempt's log
        log.exception("cell %s", cell.label)
        return Outcome(cell.index, "failed", str(disk_full(error) or f"{type(error).__name__}: {error}"))
    return Outcome(cell.index, "done")


def _report_curve(cell: Cell, store: Store, done: threading.Event) -> None:
    """Hand the held-out NLL of the cell's distillation to Tune, as it is logged."""
    stage = cell.stage("distill")
    if stage is None:
        return
    curve: Curve | None = None
    while not done.wait(_POLL_S):
        try:
            if store.find(stage.identity, stage.name) is None:
                continue
            progress = store.progress(stage)  # at every look: where the store is no folder, it is brought up to date
        except OSError as error:
            log.warning("the curve of %s cannot be looked at: %s", cell.label, error)
            continue
        curve = curve or Curve(progress / "metrics.jsonl")
        for point in curve.update():
            if RUNG_METRIC in point.metrics:
                tune.report({"step": point.step, RUNG_METRIC: point.metrics[RUNG_METRIC], "cell": cell.index})


class AfterDeath(tune.Callback):
    """After the death of a trial's process, says so and frees what its workers held: Ray itself would keep that until the
    driver ends, and another trial may wait for a whole node, also when the dead one is not tried again."""

    def __init__(
        self,
        cells: Sequence[Cell],
        remove: Callable[[], int] = remove_abandoned_groups,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cells = cells
        self._remove = remove
        self._clock = clock
        self._next = 0.0
        self._until = 0.0

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """It is tried again."""
        label = self._cells[trial.config["place"]].label
        log.warning("%s: the process that drives the cell was killed; another one goes on", label)
        self._until = self._clock() + DEATH_KNOWN_S

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """It is not; the cell's outcome says so."""
        self._until = self._clock() + DEATH_KNOWN_S

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Look now and then for some time, for Ray's head may not know of the death yet."""
        now = self._clock()
        if self._next <= now < self._until:
            self._next = now + _POLL_S
            self._remove()


class CooperativeAsha(FIFOScheduler):
    """Successive halving (arXiv 1810.05934) that asks a trial to end instead of killing it.

    Cells compete only with cells of the same teacher, widths, method and seed: halving across ratios would merely
    rediscover that a wider student is better."""

    def __init__(self, asha: AshaConfig, cells: Sequence[Cell], store: Store) -> None:
        super().__init__()
        self._asha = asha
        self._cells = cells
        self._store = store
        self._groups: dict[tuple[Any, ...], ASHAScheduler] = {}

    def _group(self, trial: Trial) -> ASHAScheduler:
        cell = self._cells[trial.config["place"]]
        key = (cell.teacher, cell.widths, cell.method, cell.seed)
        if key not in self._groups:
            self._groups[key] = ASHAScheduler(
                time_attr="step",
                metric=RUNG_METRIC,
                mode="min",
                max_t=max(cell.config.distill.steps, self._asha.grace_steps + 1),
                grace_period=self._asha.grace_steps,
                reduction_factor=self._asha.reduction,
            )
        return self._groups[key]

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Enter the trial into its group."""
        self._group(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Let the group decide; a decision to stop becomes a request."""
        if RUNG_METRIC not in result or "outcome" in result:
            return self.CONTINUE
        if not math.isfinite(result[RUNG_METRIC]):
            result = result | {RUNG_METRIC: DIVERGED}
        decision = self._group(trial).on_trial_result(tune_controller, trial, result)
        cell = self._cells[trial.config["place"]]
        if decision == self.STOP and result["step"] < cell.config.distill.steps:
            request_stop(cell, self._store, f"successive halving at step {result['step']}")
        return self.CONTINUE


def request_stop(cell: Cell, store: Store, reason: str) -> None:
    """Ask the cell's distillation to save its position and end."""
    stage = cell.stage("distill")
    if stage is not None:
        try:
            if (flag := store.stop_flag(stage)) is not None:
                flag.ask(reason)
        except OSError as error:  # the next rung asks again
            log.warning("%s could not be asked to end: %s", cell.label, error)
