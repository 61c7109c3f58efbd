"""Running a stage's work in a Ray worker: where the GPUs are, and in a process that has torch already.

A stage's function runs in the trial's process, which holds no resources. The work is a task, not an actor, because Ray
keeps a task's process for the next one: the seconds that importing torch and transformers takes are paid once.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import ray

from overfill.errors import UserError, disk_full
from pipeline.cluster import largest_node
from pipeline.config import StageResources
from pipeline.stage import StageRun, Stopped
from pipeline.submission.fitting import worker_bundle
from pipeline.training.failures import Budget, cause_of, one_line, out_of_memory

Metrics = Mapping[str, float | int | str]
Work = Callable[[StageRun], Metrics]
"""A top-level function, or a `functools.partial` of one: it travels to the worker."""

log = logging.getLogger(__name__)


class WorkerFailed(Exception):
    """The work raised in its worker, or the worker died too often; `str` is one line, the rest is in the attempt's log."""


@dataclasses.dataclass(frozen=True)
class _Result:
    metrics: dict[str, float | int | str] = dataclasses.field(default_factory=dict)
    user_error: str = ""
    out_of_memory: str = ""
    traceback: str = ""


def run_on_worker(work: Work, run: StageRun, *, exclusive: bool = False) -> Metrics:
    """Call the top-level function `work(run)` in a Ray worker and return its metrics.

    `exclusive` takes every CPU of a node (or, with GPUs, those GPUs), so that nothing of this project runs beside it.
    A worker that dies is replaced as often as the stage's budgets allow; what the work raises is final. Raises UserError
    as the work raised it and for too little memory, Stopped when a stop was asked for, WorkerFailed for anything else."""
    return run_on_workers([work], run, exclusive=exclusive)[0]


def run_on_workers(works: Sequence[Work], run: StageRun, *, exclusive: bool = False) -> list[Metrics]:
    """As `run_on_worker`, for several at once, which share the budgets; what one raises ends the others. Several may not
    write to the staging folder: a worker's death clears it."""
    resources: StageResources = run.resources
    bundle = worker_bundle(resources)
    cpus, gpus = bundle.pop("CPU"), bundle.pop("GPU", 0.0)
    if exclusive:  # the whole of a shared GPU, or of a node
        cpus, gpus = cpus if gpus else max(1.0, float(int(largest_node(resources)))), float(math.ceil(gpus))
    task = ray.remote(_guarded).options(
        num_cpus=cpus,
        num_gpus=gpus,
        resources=bundle,  # the type of GPU, if one is named
        max_retries=0,  # Ray would try again for ever where memory is short
        scheduling_strategy="DEFAULT",  # anywhere: by default a task stays in its trial's sliver of the head node
        name=run.stage.name,
    )
    apart = dataclasses.replace(run, stop_requested=_never)
    return _results([partial(task.remote, work, apart) for work in works], run, Budget.of(resources))


def _results(starts: Sequence[Callable[[], ray.ObjectRef]], run: StageRun, budget: Budget) -> list[Metrics]:
    running = {start(): place for place, start in enumerate(starts)}
    found: dict[int, Metrics] = {}
    try:
        while running:
            for reference in ray.wait(list(running), timeout=1.0)[0]:
                place = running.pop(reference)
                try:
                    found[place] = _metrics(ray.get(reference), run)
                except ray.exceptions.RayError as error:
                    _spend(budget, error, run)
                    running[starts[place]()] = place
            if running and run.stop_requested():
                raise Stopped(f"{run.stage.name} was stopped")
    except BaseException as end:
        for reference in running:
            ray.cancel(reference, force=isinstance(end, KeyboardInterrupt | SystemExit))
        raise
    return [found[place] for place in range(len(starts))]


def _spend(budget: Budget, error: ray.exceptions.RayError, run: StageRun) -> None:
    """Take a worker's death from the budget, and make room for its successor. Raises where there is to be none."""
    cause = cause_of(error)
    again = budget.spend(cause)
    log.warning("%s (%s); %s", one_line(error), budget.told(cause), "again" if again else "that is the end")
    if cause == "memory":
        raise UserError(out_of_memory(run.stage.name, run.resources, error)) from error
    if not again:
        raise WorkerFailed(" ".join(str(error).split())[:300]) from error
    run.clear_staging()


def _metrics(result: _Result, run: StageRun) -> Metrics:
    if result.out_of_memory:
        raise UserError(out_of_memory(run.stage.name, run.resources, MemoryError(result.out_of_memory)))
    if result.user_error:
        raise UserError(result.user_error)
    if result.traceback:
        log.error("in the worker:\n%s", result.traceback)
        raise WorkerFailed(result.traceback.strip().splitlines()[-1])
    return result.metrics


def _never() -> bool:
    return False


def _guarded(work: Work, run: StageRun) -> _Result:
    """In the worker. An error travels as text: its type may not be importable where it arrives."""
    import torch

    torch.set_num_threads(run.resources.threads)
    try:
        with run.on_this_node() as local:
            return _Result(metrics=dict(work(local)))
    except UserError as error:
        return _Result(user_error=str(error))
    except Exception as error:
        if cause_of(error) == "memory":
            return _Result(out_of_memory=str(error))
        if full := disk_full(error):
            return _Result(user_error=str(full))
        return _Result(traceback=traceback.format_exc())
