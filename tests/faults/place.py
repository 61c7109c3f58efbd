"""Where faults strike: a small experiment, its store, and drivers of it as subprocesses.

The experiment has every stage and one cell, or two of two methods, so that a whole run takes about a minute on two cores,
of which training is a few seconds. Its store always lies at the same path of the place, because a student's manifest
names its full model's folder, and two runs are compared byte by byte.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.curves import Curve
from pipeline.lease import Watch
from pipeline.training import checkpoints

ROOT = Path(__file__).parents[2]
FILE = "faults.yaml"
EXPERIMENT = """\
# Hypothesis: nothing is lost.
name: faults
teacher:
  name: small
  pretrain:
    {hidden: 32, intermediate: 64, layers: 2, heads: 2, kv_heads: 1, tokens: 25_600, batch_tokens: 1280, learning_rate: 3e-3}
data: {source: toy, train_samples: 300, test_samples: 16, max_length: 64}
calibrate: {samples: 16}
prune: {hidden: 0.5, intermediate: 0.5}
distill: {tokens: 32_000, batch_tokens: 1280, learning_rate: 3e-3, evaluate_every: 10}
evaluate: {samples: 8, max_new_tokens: 4}
benchmark: {prompt: [8], output: [3], repeats: 1, warmup: 0}
resources:
  teacher: {checkpoint_every: 4, workers: WORKERS}
  distill: {checkpoint_every: 4, workers: WORKERS}
"""
SECOND_CELL = "sweep: {axes: {distill.method: [overfill, pruned]}}\n"
STAGES = ("tokenizer", "data", "teacher", "calibrate", "prune", "distill", "evaluate", "benchmark")
OF_A_CELL = ("distill", "evaluate")
"""Stages that two cells do not share."""
STEPS = {"teacher": 20, "distill": 25}
"""Stages that train -> their optimizer steps."""
LONGEST_RUN_S = 420.0
"""A run takes a minute on two free cores; one that takes this long hangs."""
_BEGINNING = re.compile(r"training from step (\d+) to")
_UNWANTED = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "OVERFILL_STORE")


@dataclass
class Driver:
    """`overfill run` as a subprocess, with a session of its own, in which all of its Ray's processes are too."""

    process: subprocess.Popen[Any]
    output: Path
    """What it printed."""

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def processes(self) -> dict[int, str]:
        """Pid -> command line of every process of its session."""
        return session_processes(self.process.pid)

    def kill_all(self) -> None:
        """End all of its processes as a machine would that loses power, and wait until none is left."""
        while processes := self.processes():
            for pid in processes:
                kill(pid)
            self.process.poll()  # reap it: a zombie stays in its session
            time.sleep(0.01)
        self.process.wait()

    def wait(self, seconds: float) -> int | None:
        """Its exit code; None when it does not end in time."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def text(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")


@dataclass(frozen=True)
class Left:
    """Where a training stood when a fault had struck."""

    folder: Path
    starts: int
    """How often it had begun."""
    step: int
    """Of its newest whole step checkpoint; 0 without one."""

    @classmethod
    def of(cls, folder: Path) -> Left:
        """An artifact's training now."""
        roots = folder.glob("progress/*/")
        newest = [checkpoints.newest_complete(root, lambda folder, why: None) for root in roots]
        steps = [checkpoints.step_of(found) or 0 for found in newest if found is not None]
        return cls(folder, len(starts(folder)), max(steps, default=0))


@dataclass
class Place:
    """A folder with the experiment file, the store, and what drivers printed."""

    folder: Path
    workers: int = 1
    """Of each stage that trains."""
    cells: Literal[1, 2] = 1
    environment: dict[str, str] = field(default_factory=dict)
    """Variables for drivers beside those of this process."""
    arguments: tuple[str, ...] = ()
    """Of `overfill run`, beside the experiment and the store."""
    drivers: list[Driver] = field(default_factory=list)
    """All that were ever started here."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        text = EXPERIMENT.replace("WORKERS", str(self.workers)) + (SECOND_CELL if self.cells == 2 else "")
        (self.folder / FILE).write_text(text, encoding="utf-8")

    @property
    def store(self) -> Path:
        return self.folder / "runs"

    @property
    def driver(self) -> Driver:
        """The newest one."""
        return self.drivers[-1]

    def start(self) -> Driver:
        """Start `overfill run`."""
        output = self.folder / f"driver-{len(self.drivers) + 1:02d}.txt"
        command = [sys.executable, "-m", "pipeline.cli", "run", FILE, "--store", str(self.store)]
        with output.open("wb") as stream:
            process = subprocess.Popen(
                [*command, *self.arguments],
                cwd=self.folder,
                env=self.variables(),
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.drivers.append(Driver(process, output))
        return self.driver

    def variables(self) -> dict[str, str]:
        """The environment of drivers."""
        return environment() | self.environment

    def clear(self) -> None:
        """Empty the store and forget all drivers, for another run at the same path."""
        for path in [*self.folder.glob("*"), *self.store.glob("*")]:
            if path not in (self.store, self.folder / FILE):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self.drivers.clear()

    # --- where the run stands, from the store's files

    def artifacts(self, stage: str) -> list[Path]:
        """The stage's folders, of every cell that has begun it."""
        return sorted(path for path in self.store.glob(f"{stage}/*_*") if (path / "attempts").is_dir())

    def finished(self, stage: str) -> bool:
        """Whether every cell has it."""
        done = [path for path in self.artifacts(stage) if is_finished(path)]
        return len(done) == count_of(stage, self.cells)

    def running(self, stage: str) -> bool:
        """Whether a living process holds its lease."""
        return any(Watch(path / "attempts").look().state == "held" for path in self.artifacts(stage))

    def step(self, stage: str) -> int:
        """Step of the last line of the stage's metrics; of two cells, of the one that has come further."""
        curves = [Curve(path / "progress" / "metrics.jsonl") for path in self.artifacts(stage)]
        for curve in curves:
            curve.update()
        return max((curve.last.step for curve in curves if curve.last is not None), default=0)

    def leftover_processes(self, patience: float) -> dict[int, str]:
        """Processes of ended drivers that are still there after so many seconds."""
        end = time.monotonic() + patience
        while True:
            found = {pid: line for driver in self.drivers for pid, line in driver.processes().items()}
            if not found or time.monotonic() > end:
                return found
            time.sleep(0.1)

    def end(self) -> None:
        """End every process of every driver."""
        for driver in self.drivers:
            driver.kill_all()


def count_of(stage: str, cells: int) -> int:
    """How many artifacts so many cells have of a stage."""
    return cells if stage in OF_A_CELL else 1


def name_of(folder: Path) -> str:
    """An artifact in words and as a key: `distill/small-0.5-overfill-s0_e3a78ca75c12`."""
    return f"{folder.parent.name}/{folder.name}"


def is_finished(folder: Path) -> bool:
    """Whether it has a record."""
    return (folder / "payload" / "record.json").is_file()


def starts(folder: Path) -> list[int]:
    """The steps from which an artifact's training has begun so far, over all attempts."""
    logs = sorted(folder.glob("attempts/*/worker-0.log"))
    return [int(step) for log in logs for step in _BEGINNING.findall(log.read_text(errors="replace"))]


def environment() -> dict[str, str]:
    """Of drivers: this process' own, without what would lead them elsewhere."""
    kept = {name: value for name, value in os.environ.items() if name not in _UNWANTED}
    return kept | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"}


def session_processes(session: int) -> dict[int, str]:
    """Pid -> command line of the living processes of a session."""
    return {pid: line for pid, line in _all_processes() if _session(pid) == session}


def _all_processes() -> Iterator[tuple[int, str]]:
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                yield int(path.name), (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


def _session(pid: int) -> int | None:
    """Session of a process; None when it has ended, zombies included: they hold nothing."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[3])


def kill(pid: int, number: int = signal.SIGKILL) -> bool:
    """Send a signal; whether there was such a process."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
