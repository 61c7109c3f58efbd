"""The faults: what each one does to a run, and where it can strike.

A fault is a name, the stages in which it can strike, and a function that does it and says what it hit, or None when
there is nothing to hit at this moment, in which case it is tried again until the stage has ended.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Literal

from pipeline.lease import TTL
from pipeline.training import checkpoints
from tests.faults.place import LONGEST_RUN_S, OF_A_CELL, STAGES, STEPS, Driver, Place, is_finished, kill, name_of
from tests.faults.surroundings import Surroundings

GRACE_S = 90.0
"""Longest time that a driver may take to end when it is told to."""
TAKE_OVER_S = TTL + 120.0
"""Longest time until a lease without a heartbeat is taken over, the start of another driver included."""
SUSPENDED = (
    "ray::ImplicitFunc",
    "ray::RayTrainWorker",
    *(f"ray::{stage}" for stage in ("prune", "evaluate", "benchmark")),
)
TRAINED = tuple(STEPS)
WORKERS = ("teacher", "calibrate", "distill")
"""Stages that run on Ray Train workers."""
TASKS = ("prune", "evaluate", "benchmark")
"""Stages that run as one Ray task of their name."""
Kind = Literal["plain", "disk", "server", "cluster", "clock"]


@dataclass
class Target:
    """What a strike works on."""

    place: Place
    around: Surroundings
    stage: str
    random: Random
    problems: list[str] = field(default_factory=list)
    """What went wrong in the strike itself: a driver that did not end when it was told to."""

    @property
    def driver(self) -> Driver:
        return self.place.driver


Strike = Callable[[Target], str | None]


@dataclass(frozen=True)
class Fault:
    """One kind of fault."""

    name: str
    stages: tuple[str, ...]
    """In which it can strike."""
    strike: Strike
    at_step: int = 0
    """Least step at which it strikes, of a stage that trains; 0: at any time of the stage."""
    kind: Kind = "plain"
    """What it needs around the run."""
    tears: bool = False
    """Whether it damages a step checkpoint: training cannot go on from there."""
    early: bool = False
    """Of stages that train: only in their first seconds is there something to hit."""


# --- killing


def kill_driver(target: Target) -> str | None:
    """The driver alone: its Ray processes notice and end, while the next run begins already."""
    os.kill(target.driver.process.pid, signal.SIGKILL)
    target.driver.process.wait()
    return "driver"


def kill_machine(target: Target) -> str | None:
    """Everything at once."""
    count = 0
    for driver in target.place.drivers:
        count += len(driver.processes())
        driver.kill_all()
    target.around.beside.clear()
    return f"{count} processes"


def kill_training_worker(target: Target) -> str | None:
    return _kill_titled(target, "ray::RayTrainWorker")


def kill_trial(target: Target) -> str | None:
    return _kill_titled(target, "ray::ImplicitFunc.train")


def kill_data_task(target: Target) -> str | None:
    return _kill_titled(target, "ray::MapBatches" if target.stage == "data" else "ray::ReadBlock")


def kill_stage_task(target: Target) -> str | None:
    return _kill_titled(target, f"ray::{target.stage}")


def _kill_titled(target: Target, title: str) -> str | None:
    processes = target.around.processes(target.driver)
    pids = [pid for pid, line in processes.items() if line.startswith(title)]
    return f"process {pids[-1]}" if pids and kill(max(pids)) else None


# --- asking to end


def terminate(target: Target) -> str | None:
    """SIGTERM, as a scheduler sends it before it takes a machine away."""
    return _told_to_end(target, lambda: kill(target.driver.process.pid, signal.SIGTERM))


def interrupt(target: Target) -> str | None:
    """Ctrl-C: a terminal sends it to every process of its foreground group."""
    return _told_to_end(target, lambda: os.killpg(target.driver.process.pid, signal.SIGINT))


def interrupt_twice(target: Target) -> str | None:
    """A second Ctrl-C, at once or a little later."""
    return _told_twice(target, signal.SIGINT, 0.05, 2.0)


def hang_up(target: Target) -> str | None:
    """The terminal is closed: its shell and then the system send SIGHUP to every process of its group."""
    return _told_twice(target, signal.SIGHUP, 0.0, 0.2)


def _told_twice(target: Target, number: int, least: float, most: float) -> str:
    def tell() -> None:
        os.killpg(target.driver.process.pid, number)
        time.sleep(target.random.uniform(least, most))
        if target.driver.alive:
            os.killpg(target.driver.process.pid, number)

    return _told_to_end(target, tell)


def _told_to_end(target: Target, tell: Callable[[], object]) -> str:
    driver = target.driver
    tell()
    began = time.monotonic()
    code = driver.wait(GRACE_S)
    if code is None:
        target.problems.append(f"the driver did not end within {GRACE_S:.0f} s")
        driver.kill_all()
    elif code == 2 or (code == 0 and not all(map(target.place.finished, STAGES))):
        target.problems.append(f"a driver that was told to end ended with code {code}")
    if "Traceback (most recent call last)" in driver.text():
        target.problems.append(f"a traceback in {driver.output.name}")
    return f"ended with {code} after {time.monotonic() - began:.1f} s"


# --- damage


def truncate_checkpoint(target: Target) -> str | None:
    """The machine dies, and of the newest step checkpoint only a part has reached the disk."""
    folder = _newest_after_the_end(target)
    if folder is None:
        return None
    file = folder / "rank-00000.safetensors"
    os.truncate(file, target.random.randrange(file.stat().st_size))
    return folder.name


def lose_checkpoint_file(target: Target) -> str | None:
    """The machine dies, and a file of the newest step checkpoint is gone."""
    folder = _newest_after_the_end(target)
    if folder is None:
        return None
    file = target.random.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    file.unlink()
    return f"{folder.name}/{file.name}"


def flip_in_shards(target: Target) -> str | None:
    """The machine dies, and a byte of the token shards is another one afterwards."""
    return _flip(target, "data", "payload/train/part-*.parquet")


def flip_in_student(target: Target) -> str | None:
    """The same, of the student that is read at the moment: the cut one while training, else the trained one."""
    return _flip(target, "prune" if target.stage == "distill" else "distill", "payload/model/*.safetensors")


def _flip(target: Target, stage: str, pattern: str) -> str | None:
    """In an artifact that will be read again: of two cells, of one that is not through the stage yet."""
    open_ = [path for path in target.place.artifacts(target.stage) if not is_finished(path)]
    labels = [path.name.rpartition("_")[0] for path in open_]
    finished = [path for path in target.place.artifacts(stage) if is_finished(path)]
    own = [path for path in finished if stage not in OF_A_CELL or path.name.rpartition("_")[0] in labels]
    if not own:
        return None
    folder = target.random.choice(own)
    kill_machine(target)
    file = next(folder.glob(pattern))
    content = bytearray(file.read_bytes())
    position = target.random.randrange(len(content))
    content[position] ^= 1 << target.random.randrange(8)
    file.write_bytes(content)
    target.around.damaged.append(folder)
    return f"byte {position} of {name_of(folder)} {file.name}"


def _newest_after_the_end(target: Target) -> Path | None:
    """The newest step checkpoint after the machine has died; it lives on when there is none to tear.

    The stage may have come to its end before the last process died: then there is nothing to tear any more either."""
    if _newest_checkpoint(target) is None:
        return None
    kill_machine(target)
    return _newest_checkpoint(target)


def _newest_checkpoint(target: Target) -> Path | None:
    """The newest marked one of the training that is at work; of two, of the one that has the newest."""
    folders = [path for path in target.place.artifacts(target.stage) if not is_finished(path)]
    marked = [path.parent for folder in folders for path in folder.glob(f"progress/*/*/{checkpoints.MARKER}")]
    return max(marked, key=lambda path: path.name, default=None)


# --- around the run


def fill_disk(target: Target) -> str | None:
    """No more than a few KB are free for a while, or until the driver ends."""
    free = target.random.choice([0, 4096, 65_536])
    target.around.leave_free(free)
    target.driver.wait(target.random.uniform(5.0, 25.0))
    target.around.make_room()
    return f"{free} bytes free"


def lose_server(target: Target) -> str | None:
    """The MLflow server is killed, and comes back some seconds later."""
    seconds = target.random.uniform(2.0, 20.0)
    target.around.lose_server(seconds)
    return f"for {seconds:.0f} s"


def lose_node(target: Target) -> str | None:
    """The node that all work runs on is gone; another one joins some seconds later."""
    seconds = target.random.uniform(1.0, 5.0)
    target.around.lose_node(seconds)
    return f"for {seconds:.0f} s"


def reclaim_node(target: Target) -> str | None:
    """That node is taken away some seconds after a notice, and another one is there before."""
    seconds = target.random.uniform(3.0, 15.0)
    target.around.reclaim_node(seconds)
    return f"after {seconds:.0f} s"


def jump_clock(target: Target) -> str | None:
    """Every process' `time.time()` is hours ahead or behind from now on."""
    offset = target.random.choice([-86_400.0, -3_700.0, -30.0, 30.0, 3_700.0, 86_400.0])
    target.around.set_clock(offset)
    return f"by {offset:+.0f} s"


def move_file_times(target: Target) -> str | None:
    """Every file of the store was written, by its times, a day ago or will be tomorrow: a server's clock is wrong."""
    moment = time.time() + target.random.choice([-86_400.0, 86_400.0])
    for path in sorted(target.place.store.rglob("*")):
        try:
            os.utime(path, (moment, moment), follow_symlinks=False)
        except FileNotFoundError:
            continue  # the run goes on meanwhile
    return f"to {time.strftime('%F', time.gmtime(moment))}"


def start_second_driver(target: Target) -> str | None:
    """A second driver of the same experiment, which waits for what the first one builds, and uses it."""
    first = target.driver
    second = target.place.start()
    target.place.drivers[-2:] = [second, first]  # what strikes next strikes the first one
    target.around.beside.append(second)
    return f"driver {second.process.pid}"


def suspend_trial(target: Target) -> str | None:
    """The processes that work for a driver get no processor until a second driver has taken their lease over, and wake up
    beside it: those of a trial on a machine that swaps, or is asleep."""
    first = target.driver
    working = [pid for pid, line in target.around.processes(first).items() if line.startswith(SUSPENDED)]
    before = _attempts(target)
    if not working or not before:
        return None
    for pid in working:
        kill(pid, signal.SIGSTOP)
    second = target.place.start()
    target.around.beside.append(first)
    end = time.monotonic() + TAKE_OVER_S
    while second.alive and _attempts(target) == before and time.monotonic() < end:
        time.sleep(0.2)
    taken = _attempts(target) != before
    time.sleep(target.random.uniform(0.0, 5.0))
    for pid in working:
        kill(pid, signal.SIGCONT)
    if not taken:
        target.problems.append(f"nobody has taken over within {TAKE_OVER_S:.0f} s")
    return f"{len(working)} processes"


def _attempts(target: Target) -> dict[str, int]:
    """The artifacts of the stage that are not finished -> their newest attempt."""
    open_ = [path for path in target.place.artifacts(target.stage) if not is_finished(path)]
    return {name_of(path): len(list((path / "attempts").glob("[0-9]*"))) for path in open_}


def wait_for_second_drivers(target: Target) -> None:
    """What every second driver must come to."""
    for second in target.around.beside:
        code = second.wait(LONGEST_RUN_S)
        if code is None:
            target.problems.append(f"the second driver ({second.output.name}) did not end")
            second.kill_all()
        elif code != 0:
            target.problems.append(f"the second driver ended with {code} ({second.output.name})")
    target.around.beside.clear()


FAULTS = (
    Fault("kill -9 of the driver", STAGES, kill_driver),
    Fault("kill -9 of everything", STAGES, kill_machine),
    Fault("kill -9 of a training worker", WORKERS, kill_training_worker),
    Fault("kill -9 of the Tune trial", STAGES, kill_trial),
    Fault("kill -9 of a Ray Data task", ("data", *WORKERS), kill_data_task, early=True),
    Fault("kill -9 of a stage's task", TASKS, kill_stage_task),
    Fault("SIGTERM", STAGES, terminate),
    Fault("Ctrl-C", STAGES, interrupt),
    Fault("second Ctrl-C", STAGES, interrupt_twice),
    Fault("closed terminal", STAGES, hang_up),
    Fault("truncated step checkpoint", TRAINED, truncate_checkpoint, at_step=5, tears=True),
    Fault("lost file of a step checkpoint", TRAINED, lose_checkpoint_file, at_step=5, tears=True),
    Fault("flipped byte in a token shard", WORKERS, flip_in_shards),
    Fault("flipped byte in a student", ("distill", "evaluate"), flip_in_student),
    Fault("two drivers at once", STAGES, start_second_driver),
    Fault("suspended trial", WORKERS, suspend_trial),
    Fault("file times a day off", STAGES, move_file_times),
    Fault("clock jump", STAGES, jump_clock, kind="clock"),
    Fault("disk full", STAGES, fill_disk, kind="disk"),
    Fault("MLflow server down", STAGES, lose_server, kind="server"),
    Fault("loss of a node", STAGES[1:], lose_node, kind="cluster"),
    Fault("preemption of a node", STAGES[1:], reclaim_node, kind="cluster"),
)
