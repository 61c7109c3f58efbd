"""Running a stage's work in a Ray worker: where the GPUs are, and in a process that has torch already.

A stage's function runs in the trial's process, which holds no resources. The work is a task, not an actor, because Ray
keeps a task's process for the next one: the seconds that importing torch and transformers takes are paid once.
"""

from __future__ import annotations

import dataclasses
import logging
import traceback
from collections.abc import Callable, Mapping

import ray

from overfill.errors import UserError, disk_full
from pipeline.cluster import capacity
from pipeline.config import StageResources
from pipeline.stage import StageRun, Stopped
from pipeline.training.failures import Budget, cause_of, one_line, out_of_memory

Metrics = Mapping[str, float | int | str]

log = logging.getLogger(__name__)


class WorkerFailed(Exception):
    """The work raised in its worker, or the worker died too often; `str` is one line, the rest is in the attempt's log."""


@dataclasses.dataclass(frozen=True)
class _Result:
    metrics: dict[str, float | int | str] = dataclasses.field(default_factory=dict)
    user_error: str = ""
    out_of_memory: str = ""
    traceback: str = ""


def run_on_worker(work: Callable[[StageRun], Metrics], run: StageRun, *, exclusive: bool = False) -> Metrics:
    """Call the top-level function `work(run)` in a Ray worker and return its metrics.

    `exclusive` takes every CPU of a node (or, with GPUs, those GPUs), so that nothing of this project runs beside it.
    A worker that dies is replaced as often as the stage's budgets allow; what the work raises is final. Raises UserError
    as the work raised it and for too little memory, Stopped when a stop was asked for, WorkerFailed for anything else."""
    resources: StageResources = run.resources
    whole_node = exclusive and not resources.gpus_per_worker
    task = ray.remote(_guarded).options(
        num_cpus=max(1.0, float(int(capacity().node_cpus))) if whole_node else resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
        max_retries=0,  # Ray would try again for ever where memory is short
        scheduling_strategy="DEFAULT",  # anywhere: by default a task stays in its trial's sliver of the head node
        name=run.stage.name,
    )
    result = _result(lambda: task.remote(work, dataclasses.replace(run, stop_requested=_never)), run, resources)
    if result.out_of_memory:
        raise UserError(out_of_memory(run.stage.name, resources, MemoryError(result.out_of_memory)))
    if result.user_error:
        raise UserError(result.user_error)
    if result.traceback:
        log.error("in the worker:\n%s", result.traceback)
        raise WorkerFailed(result.traceback.strip().splitlines()[-1])
    return result.metrics


def _result(start: Callable[[], ray.ObjectRef], run: StageRun, resources: StageResources) -> _Result:
    budget = Budget.of(resources)
    while True:
        try:
            return _wait(start(), run)
        except ray.exceptions.RayError as error:
            cause = cause_of(error)
            again = budget.spend(cause)
            log.warning("%s (%s); %s", one_line(error), budget.told(cause), "again" if again else "that is the end")
            if cause == "memory":
                raise UserError(out_of_memory(run.stage.name, resources, error)) from error
            if not again:
                raise WorkerFailed(" ".join(str(error).split())[:300]) from error
            run.clear_staging()


def _wait(reference: ray.ObjectRef, run: StageRun) -> _Result:
    try:
        while not ray.wait([reference], timeout=1.0)[0]:
            if run.stop_requested():
                ray.cancel(reference)
                raise Stopped(f"{run.stage.name} was stopped")
        return ray.get(reference)
    except (KeyboardInterrupt, SystemExit):
        ray.cancel(reference, force=True)
        raise


def _never() -> bool:
    return False


def _guarded(work: Callable[[StageRun], Metrics], run: StageRun) -> _Result:
    """In the worker. An error travels as text: its type may not be importable where it arrives."""
    import torch

    torch.set_num_threads(run.resources.threads)
    try:
        return _Result(metrics=dict(work(run)))
    except UserError as error:
        return _Result(user_error=str(error))
    except Exception as error:
        if cause_of(error) == "memory":
            return _Result(out_of_memory=str(error))
        if full := disk_full(error):
            return _Result(user_error=str(full))
        return _Result(traceback=traceback.format_exc())
