"""The training loop of one worker, for distillation and for a teacher of our own.

Each optimizer step takes the global batch of its number. A worker computes its micro-batches: one pass of the full
model (where there is one), the student's losses as sums, and their gradient divided by the number of target tokens of
the *global* batch, known from the index of the shards. Losses are accumulated as sums too and written every few steps
by rank 0 to the run's metrics file; Ray Train hears of step checkpoints only, because its reports are barriers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from pipeline.training import state
from pipeline.training.batches import collate
from pipeline.training.checkpoints import Position
from pipeline.training.failures import NodeReclaimed
from pipeline.training.metrics import LossSums, Rate
from pipeline.training.schedule import learning_rate
from pipeline.training.session import Outcome, Session
from pipeline.training.stream import StepRows
from pipeline.training.system_metrics import system_metrics
from pipeline.training.validation import validation_nll

MOST_STEPS_BETWEEN_LINES = 10
LINES_AT_LEAST = 50
NO_LOAD: Mapping[str, float] = {}

GO_ON, STOP, LEAVE = range(3)
"""What rank 0 says after every step: nothing, that the run is asked to stop, that a node is being taken away."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Update:
    """What one optimizer step did."""

    grad_norm: float
    """2-norm of the gradient, before clipping."""
    learning_rate: float


def train(session: Session, start: Position) -> Outcome:
    """Train from `start` to the last step, or until the run is asked to stop. A collective over all workers.

    Raises NodeReclaimed, with the position saved, when a worker's node is being taken away."""
    steps, position, saved = session.plan.steps, start, start.step
    recorder = Recorder(session, start)
    for rows in session.services.stream(session.plan, start.step):
        recorder.data_arrived(first=rows.step == start.step)
        update = optimize(session, rows, recorder.sums)
        tokens = session.plan.order().total_tokens(rows.step)
        position = replace(position, step=rows.step + 1, tokens=position.tokens + tokens)
        recorder.count(tokens)
        last = position.step == steps
        if last or _due(position.step, line_every(steps)):
            recorder.write_line(position, update)
        request = GO_ON if last else _request(session)
        with recorder.pause():
            if last or _due(position.step, session.config.evaluate_every):
                position = recorder.write_validation(position, validation_nll(session))
            if last or request != GO_ON or _due(position.step, session.resources.checkpoint_every):
                position = replace(position, metrics=recorder.latest, pending=recorder.sums.totals())
                _checkpoint(session, position)
                saved = position.step
        if request == LEAVE:
            raise NodeReclaimed(f"a node is being taken away; step {position.step} is saved")
        if request == STOP:
            break
    if saved != position.step:
        raise RuntimeError(f"training ended at step {position.step} without a checkpoint of it")
    return Outcome(position, stopped=position.step < steps)


def _request(session: Session) -> int:
    """What is asked of the run, as rank 0 sees it. A collective."""
    code = GO_ON
    if session.place.first:
        code = STOP if session.run.stop_requested() else LEAVE if session.services.reclaimed() else GO_ON
    return session.place.code_from_first(code)


def optimize(session: Session, rows: StepRows, sums: LossSums) -> Update:
    """One optimizer step over this worker's micro-batches."""
    engine, objective, full = session.engine, session.objective, session.full
    tokens = objective.target_tokens(session.plan.order(), rows.step)
    rate = learning_rate(session.config, rows.step, session.plan.steps)
    norm: float | None = None
    for micro_batch in rows.rows:
        batch = collate(micro_batch, session.place.device)
        with torch.no_grad():
            teacher = full.call(batch) if full is not None else None
        terms = engine(
            batch,
            teacher,
            full.module.head if full is not None else None,
            objective.method,
            objective.loss,
            kv_second_moment=objective.kv_second_moment,
            chunks=session.resources.loss_chunks,
            prompt_targets=objective.prompt_targets,
        )
        engine.backward(terms["loss"][0], tokens)
        norm = engine.step(rate)
        sums.add(terms)
    if norm is None:
        raise RuntimeError(f"step {rows.step} ended without an update: its micro-batches do not match the engine's")
    return Update(norm, rate)


def line_every(steps: int) -> int:
    """Steps between two lines of training metrics: often enough for a curve of a short run."""
    return max(1, min(MOST_STEPS_BETWEEN_LINES, steps // LINES_AT_LEAST))


class Recorder:
    """The metrics of a run: accumulated on every worker, written by rank 0."""

    def __init__(self, session: Session, start: Position) -> None:
        self.sums = LossSums(session.place, start.pending)
        self.latest = start.metrics
        self._session = session
        self._rate = Rate()

    def data_arrived(self, first: bool) -> None:
        """The first step's data is here: the start of the stream does not count as training."""
        if first:
            self._rate = Rate()

    def count(self, tokens: int) -> None:
        """Count a global batch's tokens."""
        self._rate.add(tokens)

    def pause(self) -> Rate:
        """A context whose time does not count as training."""
        return self._rate

    def write_line(self, position: Position, update: Update) -> None:
        """Training metrics since the last line. A collective."""
        values = self.sums.means() | {
            "learning_rate": update.learning_rate,
            "grad_norm": update.grad_norm,
            "tokens_per_second": self._rate.read(),
        }
        self._write(position, {f"train/{name}": value for name, value in values.items()}, system_metrics())

    def write_validation(self, position: Position, nll: float) -> Position:
        """The held-out NLL; returns the position with the best so far, which no NaN is."""
        self._write(position, {"validation/nll": nll})
        if not nll < (math.inf if position.best_nll is None else position.best_nll):
            return position
        return replace(position, best_nll=nll, best_step=position.step)

    def _write(self, position: Position, metrics: dict[str, float], load: Mapping[str, float] = NO_LOAD) -> None:
        """`load` of the machine is for the curve alone: no result of the run."""
        self.latest = self.latest | metrics
        if self._session.place.first:
            steps = self._session.plan.steps
            self._session.run.log_metrics(position.step, steps, {**metrics, **load}, tokens=position.tokens)


def _checkpoint(session: Session, position: Position) -> None:
    """Write a step checkpoint and tell Ray Train of it. A collective."""
    keep = session.resources.keep_checkpoints
    state.save(session.engine, session.steps, position, session.place, keep)
    session.services.report(position)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
