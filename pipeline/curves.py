"""Curves of a stage: reading `progress/metrics.jsonl` while another process writes it.

The file is append-only; a line is {"step", "steps", "tokens", "time", "metrics"}. What can happen to it, and what a
reader makes of that:

- the last line is half written: it is left for the next read, the cursor stays before it;
- a writer was killed in the middle of a line and its successor appended behind the stump: the stump is dropped, the
  successor's line is recovered;
- a step has several lines (training, then validation), and a resume goes back to its step checkpoint and emits steps
  again: of every metric the later line wins;
- the file is cut or replaced: reading starts again from its beginning.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.paths import require_regular

log = logging.getLogger(__name__)

RATE_WINDOW = 20
_STUMPS = 64
"""Places in a line at which a point is looked for; a stump has two braces, and a line of braces alone has no end."""
_LARGEST = 2**53
"""Above every step, token count and time."""


@dataclass(frozen=True)
class Point:
    """One logged step of a stage."""

    step: int
    steps: int
    """Steps of the whole stage."""
    tokens: int
    """Corpus tokens seen so far."""
    time: float
    """Seconds since the epoch."""
    metrics: dict[str, float]


@dataclass
class Curve:
    """All steps of one stage that have been read so far, with the cursor for the next read."""

    path: Path
    points: dict[int, Point] = field(default_factory=dict)
    """step -> its lines merged."""
    last: Point | None = None
    """The line written last; after a resume its step may be lower than that of lines before it."""
    latest_metrics: dict[str, float] = field(default_factory=dict)
    """Every metric's newest value; validation is logged more rarely than the loss."""
    unreadable: int = 0
    """Lines that held no point: stumps of killed writers."""
    _offset: int = 0
    _inode: int = -1
    _recent: list[Point] = field(default_factory=list)

    def update(self) -> list[Point]:
        """Read what was appended since the last call; returns the new points in the order of the file."""
        try:
            require_regular(self.path)
            stream = self.path.open("rb")
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            log.warning("%s cannot be read: %s", self.path, error.strerror)
            return []
        with stream:
            stat = os.fstat(stream.fileno())
            if stat.st_ino != self._inode or stat.st_size < self._offset:
                self._restart(stat.st_ino)
            stream.seek(self._offset)
            block = stream.read()
        complete = block.rfind(b"\n") + 1
        self._offset += complete
        lines = [line for line in block[:complete].split(b"\n") if line.strip()]
        fresh = [point for line in lines if (point := parse_line(line)) is not None]
        self.unreadable += len(lines) - len(fresh)
        for point in fresh:
            self._append(point)
        return fresh

    def _restart(self, inode: int) -> None:
        self.points.clear()
        self._recent.clear()
        self.latest_metrics.clear()
        self.last, self.unreadable, self._offset, self._inode = None, 0, 0, inode

    def _append(self, point: Point) -> None:
        if self.last is not None and point.step < self.last.step:
            # A resume: seconds per step across the gap would say nothing about the speed.
            self._recent.clear()
        earlier = self.points.get(point.step)
        if earlier is not None:
            point = replace(point, metrics=earlier.metrics | point.metrics)
        self.points[point.step] = self.last = point
        self.latest_metrics.update(point.metrics)
        self._recent = [*self._recent[-RATE_WINDOW:], point]

    @property
    def seconds_per_step(self) -> float | None:
        """Median over the latest lines, so that an evaluation, a checkpoint or a pause hardly counts."""
        pairs = zip(self._recent, self._recent[1:], strict=False)
        rates = [(b.time - a.time) / (b.step - a.step) for a, b in pairs if b.step > a.step and b.time >= a.time]
        return median(rates) if rates else None

    @property
    def tokens_per_second(self) -> float | None:
        """Corpus tokens per second over the latest lines."""
        if len(self._recent) < 2:
            return None
        first, last = self._recent[0], self._recent[-1]
        seconds, tokens = last.time - first.time, last.tokens - first.tokens
        return tokens / seconds if seconds > 0 and tokens > 0 else None


def parse_line(line: bytes) -> Point | None:
    """The point of one line, also behind the stumps of killed writers; None where there is none."""
    start = -1
    for _ in range(_STUMPS):
        start = line.find(b"{", start + 1)
        if start < 0:
            return None
        if (point := _point(line[start:])) is not None:
            return point
    return None


def _point(text: bytes) -> Point | None:
    try:
        raw: Any = json.loads(text)
        metrics = {str(name): float(value) for name, value in raw["metrics"].items()}
        point = Point(int(raw["step"]), int(raw["steps"]), int(raw["tokens"]), float(raw["time"]), metrics)
        sane = all(0 <= value < _LARGEST for value in (point.step, point.steps, point.tokens, point.time))
        return point if sane else None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None  # not a point: the caller counts it
