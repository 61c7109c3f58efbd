"""How much of a cluster is in use while a sweep runs: samples by its driver, kept in the store, told by `overfill status`.

A sample says what is reserved of CPUs and GPUs, and how many cells have work that has not begun. Idle while cells wait
is what a sweep wastes, so that share is told apart from the mean.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType

log = logging.getLogger(__name__)

INTERVAL_S = 15.0
FILE = "utilisation.jsonl"
GAP_S = 4 * INTERVAL_S
"""Samples further apart are of two drivers: between them nobody looked."""

Usage = Mapping[str, tuple[float, float]]
"""CPU and GPU -> (in use, there)."""


@dataclass(frozen=True)
class Sample:
    """The cluster at one moment."""

    time: float
    usage: Usage
    waiting: int
    """Cells that have not begun, or wait."""

    @property
    def share(self) -> float:
        """Share in use of what the sweep needs most: of the GPUs where there are some, of the CPUs otherwise."""
        used, there = self.usage.get("GPU") or self.usage.get("CPU") or (0.0, 0.0)
        return min(1.0, used / there) if there else 0.0


class Sampler:
    """Writes a sample every few seconds while it is entered; never raises into the run that it looks at."""

    def __init__(
        self,
        folder: Path,
        usage: Callable[[], Usage],
        waiting: Callable[[], int],
        interval: float = INTERVAL_S,
        keep: Callable[[Path], None] | None = None,
    ) -> None:
        """`keep` is called with the file when it has grown."""
        self._path = folder / FILE
        self._keep = keep
        self._usage, self._waiting, self._interval = usage, waiting, interval
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="utilisation", daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        try:
            while not self._end.wait(self._interval):
                sample = [round(time.time(), 1), dict(self._usage()), self._waiting()]
                with self._path.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(sample) + "\n")
                if self._keep is not None:
                    self._keep(self._path)
        except Exception:  # what only informs must not take the run with it
            log.warning("the cluster's utilisation is no longer recorded", exc_info=True)


def read_samples(folder: Path) -> list[Sample]:
    """The samples of a sweep's folder, oldest first; a torn line at the end is left out."""
    samples: list[Sample] = []
    try:
        lines = (folder / FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            moment, usage, waiting = json.loads(line)
        except ValueError:
            continue
        samples.append(Sample(moment, {kind: (pair[0], pair[1]) for kind, pair in usage.items()}, waiting))
    return samples


def mean_share(samples: Sequence[Sample]) -> tuple[float, float]:
    """(mean share in use, share of the cluster's time that was idle while cells waited), weighted by time."""
    total = used = wasted = 0.0
    for before, sample in pairwise(samples):
        seconds = sample.time - before.time
        if 0 < seconds <= GAP_S:
            total += seconds
            used += seconds * sample.share
            wasted += seconds * (1 - sample.share) if sample.waiting else 0.0
    return (used / total, wasted / total) if total else (0.0, 0.0)


def in_use(usage: Usage) -> str:
    """`12 of 16 CPU, 8 of 8 GPU in use`; nothing when nothing is known. A kind that is not there is left out."""
    parts = [f"{used:g} of {there:g} {kind}" for kind, (used, there) in sorted(usage.items()) if there]
    return f"{', '.join(parts)} in use" if parts else ""


def recorded_line(samples: Sequence[Sample], now: float) -> str:
    """What the samples say, in one line; nothing without at least two."""
    if len(samples) < 2:
        return ""
    last = samples[-1]
    used, wasted = mean_share(samples)
    kind = "GPUs" if "GPU" in last.usage else "CPUs"
    when = "now" if now - last.time < GAP_S else time.strftime("at %Y-%m-%d %H:%M", time.localtime(last.time))
    over_the_run = f"{kind} over the run: {used:.0%} in use, {wasted:.0%} idle while cells waited"
    return f"cluster {when}: {in_use(last.usage)}; {over_the_run}"
