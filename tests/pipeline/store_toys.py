"""Stage functions for the tests of the store, and a script that runs them in processes which can be killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline import lease
from pipeline.objects.store import open_at
from pipeline.record import libraries, source_commit
from pipeline.runner import RunContext, run_graph
from pipeline.stage import Stage, StageRun, Stopped, append_line, in_this_process
from pipeline.store import AlteredArtifact, Store


def toy(
    name: str = "teacher",
    inputs: dict[str, Any] | None = None,
    label: str = "toy",
    does: str = "write",
    version: int = 1,
    **config: Any,
) -> Stage:
    """A stage whose function is one of this module's."""
    return Stage(name, version, config, inputs or {}, f"store_toys:{does}", label)


def chain() -> tuple[Stage, Stage, Stage]:
    """teacher -> distill -> evaluate."""
    teacher = toy("teacher", layers=4)
    distill = toy("distill", {"teacher": teacher}, loss={"kv": 3.0})
    return teacher, distill, toy("evaluate", {"student": distill}, samples=8)


@in_this_process
def write(run: StageRun) -> dict[str, float | int]:
    """Payload: the config, what the inputs said, and a file in a folder. Says in a journal that it ran."""
    journal = (run.resources or {}).get("journal")
    if journal:
        append_line(Path(journal), f"{run.stage.name} {os.getpid()}")
    read = {name: (path / "config.json").read_text() for name, path in run.inputs.items()}
    (run.staging / "config.json").write_text(json.dumps(run.config))
    (run.staging / "read").mkdir()
    (run.staging / "read" / "inputs.json").write_text(json.dumps(read))
    return {"inputs": len(read), "share": 0.5}


@in_this_process
def slow(run: StageRun) -> dict[str, float | int]:
    """As `write`, but it says that it has begun and takes its time."""
    (run.progress / "begun").touch()
    time.sleep(run.resources["seconds"])
    return write.__wrapped__(run)


def steps(run: StageRun) -> dict[str, int]:
    """Ten steps with a step checkpoint after each; can be asked to stop, and can be killed at a step."""
    found = run.progress.glob("*/*/complete.json")
    first = max((int(marker.parent.name.split("-")[1]) for marker in found), default=0)
    for step in range(first + 1, 11):
        run.log_metrics(step, 10, {"train/loss": 1.0 / step}, tokens=step * 16)
        folder = run.progress / run.stage.identity / f"step-{step:08d}-abcdef"
        folder.mkdir(parents=True)
        (folder / "rank-00000.json").write_text('{"ranks": 1, "files": {}}')
        (folder / "complete.json").write_text('{"ranks": 1}')
        if run.stop_requested() or step == (run.resources or {}).get("stop_at"):
            raise Stopped(f"stopped at step {step}")
        if step == (run.resources or {}).get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
    (run.staging / "config.json").write_text(json.dumps({"from": first}))
    return {"first": first}


@in_this_process
def fail(run: StageRun) -> None:
    """Writes half a payload and raises."""
    (run.staging / "half").touch()
    raise ValueError("the loss is NaN\nat step 7")


# --- the script: each function below runs in a process of its own


def build(root: str, seconds: str) -> None:
    """Build the slow stage, and say in one line whether this process did it."""
    built: list[str] = []
    context = RunContext(
        resources={
            "teacher": {"seconds": float(seconds), "journal": "journal" if "://" in root else f"{root}/journal"}
        },
        on_done=lambda stage, record: built.append(stage.name),
        poll=0.02,
    )
    run_graph([toy(does="slow")], open_at(f"{root}/store"), context)
    print("built" if built else "reused")


def build_beating_fast(root: str) -> None:
    """As `build`, with a heartbeat of 20 ms; says what the artifact's attempt was."""
    context = RunContext(resources={"teacher": {"seconds": 1.5}}, beat=0.02, poll=0.02)
    records = run_graph([toy(does="slow")], open_at(f"{root}/store"), context)
    print([record.attempt for record in records.values()])


def killed_while_training(root: str, step: str) -> None:
    """Train and be killed."""
    run_graph([toy(does="steps")], Store(root), RunContext(resources={"teacher": {"kill_at": int(step)}}))


def contend(root: str, rounds: str) -> None:
    """Four processes want to take over the same dead leases; prints the number of winners of each.

    They start together and pause for a random moment before every line, so that their steps interleave."""
    together = multiprocessing.get_context("fork").Barrier(4)

    def contender(number: int) -> None:
        pause = random.Random(number)

        def trace(frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
            if frame.f_code.co_name != "acquire":
                return None
            time.sleep(pause.random() * 0.002)
            return trace

        for turn in range(int(rounds)):
            together.wait(timeout=20)
            sys.settrace(trace)
            won = lease.acquire(Path(root, str(turn), "attempts"), after=1, beat=3600.0)
            sys.settrace(None)
            if won is not None:
                Path(root, str(turn), f"won-by-{number}").touch()

    for child in [_forked(partial(contender, number)) for number in range(4)]:
        os.waitpid(child, 0)
    print(json.dumps([len(list(Path(root, str(turn)).glob("won-by-*"))) for turn in range(int(rounds))]))


def die_at_every_line(root: str, stride: str) -> None:
    """Build an artifact in a process that is killed at the n-th line of the store's code, for every n; look, and build
    again. Prints how often nothing and how often a whole artifact was left, and what was wrong."""
    left = {"nothing": 0, "whole": 0}
    wrong: list[str] = []
    stage = toy(layers=2)
    libraries()  # these two are cached, for they take most of the time of such a small build
    source_commit()
    line = 1
    while True:
        store = Store(f"{root}/{line}")
        child = _forked(partial(run_and_die, stage, store, line))
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
        try:
            whole = store.verify(stage, full=True) is not None
        except AlteredArtifact as error:
            wrong.append(f"line {line}: {error}")
            break
        left["whole" if whole else "nothing"] += 1
        if whole != (store.payload(stage).exists()):
            wrong.append(f"line {line}: a payload without a record")
        record = run_graph([stage], store)[stage.identity]
        again = store.verify(stage, full=True)
        names = set(record.files)
        if again is None or names != {"config.json", "read/inputs.json"} or list(store.folder(stage).glob("staging-*")):
            wrong.append(f"line {line}: not whole after the second run: {sorted(names)}")
        if record.attempt > 2 or (whole and record.attempt > 1):
            wrong.append(f"line {line}: built {record.attempt} times")
        line += int(stride)
    print(json.dumps({**left, "wrong": wrong}))


def run_and_die(stage: Stage, store: Store, line: int) -> None:
    """Run with a trace that kills this process at the given line of the store's code."""
    count = 0
    watched = tuple(f"pipeline/{name}.py" for name in ("build", "lease", "record", "store"))

    def trace(frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        nonlocal count
        if not frame.f_code.co_filename.endswith(watched):
            return None
        if event == "line":
            count += 1
            if count == line:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    run_graph([stage], store)


def _forked(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return child


if __name__ == "__main__":
    # The stage functions are looked up by name, so they must come from the module and not from this script.
    sys.modules["store_toys"] = sys.modules["__main__"]
    globals()[sys.argv[1]](*sys.argv[2:])
