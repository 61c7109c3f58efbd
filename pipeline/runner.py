"""Executes a plan: decide, do one thing, look again, until the targets are there.

Nothing is decided here: `resume.plan` says what to do, and after every stage and every wait it is asked anew, for other
processes work on the same store. What a stage's function raises becomes `outcome.json`, a traceback in its log and one
line for people.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from overfill.errors import UserError, disk_full
from pipeline.attempt_log import AttemptLog
from pipeline.build import Build
from pipeline.fingerprint import digest_tree
from pipeline.lease import BEAT, LeaseLost
from pipeline.objects.build import ObjectBuild
from pipeline.objects.store import ObjectStore
from pipeline.record import Record
from pipeline.resume import Action, Facts, Refuse, Resume, Run, plan
from pipeline.stage import Metrics, Stage, StageRun, Stopped, resolve, sinks, topological
from pipeline.store import AlteredArtifact, Store

log = logging.getLogger(__name__)

OUTAGE_S = 300.0
"""How long a service of objects may be away, beyond its client's own retries."""
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class StageFailed(Exception):
    """A stage's function raised. `str(error)` is one line with the cause and where the log is."""

    def __init__(self, stage: Stage, cause: str, log: Path | str) -> None:
        super().__init__(f"{stage} failed: {cause} (log: {log})")
        self.stage = stage
        self.cause = cause
        """One line."""
        self.log = Path(log)
        """With the full traceback."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.stage, self.cause, self.log)


class StageInterrupted(Exception):
    """This run was asked to end; the next one goes on with the stage."""

    def __init__(self, stage: Stage, reason: str) -> None:
        super().__init__(f"{stage} was interrupted: {reason}")
        self.stage = stage
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.stage, self.reason)


class StageStopped(Stopped):
    """The scheduler has stopped a stage, now or in an earlier run."""

    def __init__(self, stage: Stage, reason: str) -> None:
        super().__init__(f"{stage} was stopped: {reason}")
        self.stage = stage
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.stage, self.reason)


def _ignore(*_: Any) -> None:
    """No display."""


class Remembered:
    """A question whose yes holds: who asks a run to end may be gone, with its flag, while the run still saves its position,
    and that would look as if the scheduler had stopped it."""

    def __init__(self, question: Callable[[], bool]) -> None:
        self._question = question
        self._yes = False

    def __call__(self) -> bool:
        """The answer, asked for until it is yes."""
        self._yes = self._yes or self._question()
        return self._yes


@dataclass(frozen=True)
class RunContext:
    """What the machine supplies; nothing of it counts in an identity."""

    resources: Mapping[str, Any] = field(default_factory=dict)
    """Stage name -> what its function gets as `run.resources`."""
    stop_requested: Callable[[], bool] = lambda: False
    """Whether this run shall end; the stage's function asks, and what it had to leave is interrupted, not stopped."""
    on_start: Callable[[Stage, Action], None] = _ignore
    """A stage begins, by this action (Run or Resume)."""
    on_done: Callable[[Stage, Record], None] = _ignore
    """A stage is published."""
    on_reuse: Callable[[Stage, Record], None] = _ignore
    """A needed stage was there already, or another process has finished it."""
    on_wait: Callable[[Stage, Action], None] = _ignore
    """A stage is left to another process, or waits for an input; called once for each reason."""
    continue_stopped: bool = False
    """Take up what the scheduler stopped."""
    before: Mapping[str, int] | None = None
    """Identity -> newest attempt that had ended when the run began: a failure of a later one, in whatever process, is
    final. A sweep gives all cells what it saw at its start; None looks when `run_graph` begins."""
    poll: float = 1.0
    """Seconds between two looks at what another process is building."""
    beat: float = BEAT
    """Seconds between heartbeats of a lease."""


def run_graph(
    stages: Sequence[Stage], store: Store, context: RunContext | None = None, targets: Sequence[Stage] | None = None
) -> dict[str, Record]:
    """Build what is missing of the targets, and return their records by identity.

    `targets` are by default those of `stages` that no other is made from. Raises StageFailed (a function raised, here
    or meanwhile in another process), StageStopped (by the scheduler), StageInterrupted (this run shall end) and
    AlteredArtifact (a needed one is damaged)."""
    context = context or RunContext()
    context = replace(context, stop_requested=Remembered(context.stop_requested))
    targets = sinks(stages) if targets is None else list(targets)
    before = store.ended_attempts(topological(targets)) if context.before is None else context.before
    told: set[tuple[str, str]] = set()
    explain = True  # comparing with every artifact takes a while: not at every look while waiting
    while True:
        facts = _gather(store, targets, explain, context)
        actions = plan(targets, facts, targets, continue_stopped=context.continue_stopped, before=before)
        _raise_refusals(actions, facts)
        _tell(actions, store, context, told)
        ready = [action for action in actions if isinstance(action, Run | Resume) and not action.after]
        if ready and not explain:
            explain = True
        elif ready:
            if context.stop_requested():
                raise StageInterrupted(ready[0].stage, "before it began")
            if _inputs_whole(ready[0].stage, store):
                _execute(ready[0], facts[ready[0].stage.identity], store, context, told)
        elif all(action.kind == "reuse" for action in actions):
            return {stage.identity: _finished(store, stage) for stage in targets}
        else:
            _wait(actions, context)
            explain = False


def _gather(store: Store, targets: Sequence[Stage], explain: bool, context: RunContext) -> dict[str, Facts]:
    """The facts; a service of objects that is away for minutes ends no cell that only waits."""
    deadline = time.monotonic() + (OUTAGE_S if isinstance(store, ObjectStore) else 0.0)
    while True:
        try:
            return store.gather(targets, explain)
        except OSError as error:
            if time.monotonic() >= deadline or context.stop_requested() or isinstance(error, PermissionError):
                raise
            log.warning("the store cannot be looked at, and is again in a moment: %s", error)
            time.sleep(context.poll)


def _raise_refusals(actions: Sequence[Action], facts: Mapping[str, Facts]) -> None:
    for action in actions:
        if isinstance(action, Refuse):
            known = facts[action.stage.identity]
            if action.cause == "failed":
                raise StageFailed(action.stage, known.error, known.log)
            raise StageStopped(action.stage, known.stopped)


def _inputs_whole(stage: Stage, store: Store) -> bool:
    """Whether every byte of what the stage reads is what was written; if not, the next look finds it altered.

    Raises UserError for files of the user's that are not those of the plan any more, and for what cannot be read;
    AlteredArtifact where the next look would not find it altered, and this one would come again for ever."""
    for name, source in stage.inputs.items():
        if isinstance(source, Stage):
            seen = _record_seen(store, source)
            try:
                if not store.ready(source):
                    return False
            except AlteredArtifact as error:
                if seen is not None and _record_seen(store, source) == seen:
                    raise
                log.warning("%s cannot begin: %s", stage, error)
                return False
        elif source.pinned_by_content and digest_tree(str(source.location)) != source.identifier:
            raise UserError(f"{name} = {source.location}: it was changed while this ran; run again")
    return True


def _record_seen(store: Store, stage: Stage) -> Record | None:
    """The record of what a look takes for whole."""
    try:
        return store.record(stage)
    except AlteredArtifact:
        return None


def _tell(actions: Sequence[Action], store: Store, context: RunContext, told: set[tuple[str, str]]) -> None:
    for action in actions:
        key = (action.stage.identity, action.reason if action.kind == "wait" else action.kind)
        if action.kind not in ("reuse", "wait") or key in told:
            continue
        told.add(key)
        log.info("%s", action)
        if action.kind == "reuse":
            context.on_reuse(action.stage, _finished(store, action.stage))
        else:
            context.on_wait(action.stage, action)


def _wait(actions: Sequence[Action], context: RunContext) -> None:
    if context.stop_requested():
        waiting = next(action for action in actions if action.kind == "wait")
        raise StageInterrupted(waiting.stage, f"while it waited: {waiting.reason}")
    time.sleep(context.poll)


def _finished(store: Store, stage: Stage) -> Record:
    record = store.record(stage)
    if record is None:
        raise AlteredArtifact(f"{store.folder(stage)}: this artifact was removed while it was in use; run again")
    return record


def _execute(action: Run | Resume, facts: Facts, store: Store, context: RunContext, told: set[tuple[str, str]]) -> None:
    stage = action.stage
    build = _begin(store, stage, facts, context)
    if build is None:
        return  # another process was faster: the next look finds it building
    try:
        with _logging_to(build.log_path) as handler:
            log.info("%s", action)
            context.on_start(stage, action)
            record = _attempt(build, store, context, handler)
    finally:
        build.release()
    if record is not None:
        log.info("%s is done after %.1f s", stage, record.seconds)
        told.add((stage.identity, "reuse"))
        context.on_done(stage, record)


def _begin(store: Store, stage: Stage, facts: Facts, context: RunContext) -> Build | None:
    resources = context.resources.get(stage.name)
    if isinstance(store, ObjectStore):
        return ObjectBuild.start(store, stage, facts, resources, context.beat)
    return Build.begin(store, stage, facts, resources, context.beat)


def _attempt(build: Build, store: Store, context: RunContext, handler: logging.Handler) -> Record | None:
    """Call the function and publish; None when the lease was lost, which is another process' success so far."""
    stage = build.stage
    try:
        return build.publish(_call(build, store, context))
    except Exception as error:
        if isinstance(error, LeaseLost) or not build.lease.held():
            # Its successor has cleared its staging folder away, so whatever the function raised is no failure of it.
            _log_traceback(handler, stage, error)
            build.interrupt(f"another process has taken over: {_cause(error)}")
            return None
        raise _ended(build, context, handler, error) from error
    except BaseException as end:
        _log_traceback(handler, stage, end)
        build.interrupt(f"ended by {type(end).__name__}")
        raise


def _ended(build: Build, context: RunContext, handler: logging.Handler, error: Exception) -> Exception:
    """Write down how the function ended, and give what to raise."""
    if isinstance(error, Stopped) and context.stop_requested():
        reason = f"asked to end: {_one_line(error)}"
        build.interrupt(reason)
        return StageInterrupted(build.stage, reason)
    if isinstance(error, Stopped):
        reason = _one_line(error) or "stopped by the scheduler"
        build.stop(reason)
        return StageStopped(build.stage, reason)
    _log_traceback(handler, build.stage, error)
    build.fail(_cause(error))
    return StageFailed(build.stage, _cause(error), build.log_path)


def _call(build: Build, store: Store, context: RunContext) -> Metrics | None:
    run = StageRun(
        stage=build.stage,
        inputs=_input_paths(build.stage, store),
        staging=build.staging,
        progress=build.progress,
        attempt=build.lease.folder,
        resources=build.resources,
        # Who has lost the lease works for nothing: the sooner it stops, the better.
        stop_requested=lambda: context.stop_requested() or not build.lease.held(),
        site=store.site(build.stage, build.lease.number),
    )
    return resolve(build.stage.function)(run)


def _input_paths(stage: Stage, store: Store) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for name, source in stage.inputs.items():
        if isinstance(source, Stage):
            paths[name] = store.input_path(source)
        elif source.location is not None:
            paths[name] = Path(source.location)
    return paths


def _cause(error: Exception) -> str:
    """One line; a user's mistake is already in words, anything else is named by its type."""
    error = disk_full(error) or error
    return _one_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else ""


def _log_traceback(handler: logging.Handler, stage: Stage, error: BaseException) -> None:
    """The traceback goes to this attempt's log alone: the terminal gets one line."""
    information = (type(error), error, error.__traceback__)
    handler.handle(log.makeRecord(log.name, logging.ERROR, __file__, 0, "%s ended", (stage,), information))


@contextmanager
def _logging_to(path: Path) -> Iterator[logging.Handler]:
    """Everything that is logged from INFO on goes to `path` too."""
    root = logging.getLogger()
    handler = AttemptLog(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(_FORMAT))
    handler.setLevel(logging.INFO)
    level = root.level
    root.addHandler(handler)
    root.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield handler
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
        handler.close()
