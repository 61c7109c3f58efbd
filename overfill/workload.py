"""What is measured: points of a grid, systems by name, and what a decode step of each must read. No torch.

Systems: `full` and `student` are one model alone, `overfill` is both, `overfill-refresh` lets the full model read again
what was written every so many tokens, `exact` lets it verify every token; these run in `overfill.engine`. The
`transformers-` ones are the library's own `generate`, plain and assisted, with the same models.

A decode step is bound by what it reads: every matrix of the decoding model once, and the cache of every row. Where one
step is the mean of different passes (refresh), the passes are added up over the whole output. Where what is read
depends on what is accepted (`exact`, `transformers-assisted`), there is no such number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from overfill.errors import UserError
from overfill.shapes import ModelShape

FULL, STUDENT, OVERFILL, REFRESH, EXACT = "full", "student", "overfill", "overfill-refresh", "exact"
PLAIN_FULL, PLAIN_STUDENT, ASSISTED = "transformers-full", "transformers-student", "transformers-assisted"
SYSTEMS = (FULL, STUDENT, OVERFILL, REFRESH, EXACT, PLAIN_FULL, PLAIN_STUDENT, ASSISTED)
"""Every system, in the order in which they take turns."""
ALONE = (FULL, PLAIN_FULL)
"""Those that need no student."""

Refresh = int | str | None
"""Tokens between two refreshes, a rule such as `entropy>2.0`, or none."""


@dataclass(frozen=True)
class Point:
    """One point of the grid; lengths in tokens."""

    batch: int
    prompt: int
    output: int
    """New tokens per row, the first included."""
    dtype: str
    """A key of `overfill.shapes.BYTES`."""

    @property
    def mean_context(self) -> int:
        """Columns of the cache that a decode step reads, its own included, on average over the output."""
        return self.prompt + self.output // 2


def grid(batches: Sequence[int], prompts: Sequence[int], outputs: Sequence[int], dtype: str) -> list[Point]:
    """All combinations, the batch changing slowest."""
    return [Point(*sizes, dtype) for sizes in product(batches, prompts, outputs)]


def unfit(system: str, point: Point, refresh: Refresh = None) -> str | None:
    """Why a system cannot be measured at a point, or None."""
    if system == ASSISTED and point.batch > 1:
        return "transformers assists one row at a time"
    if system == REFRESH and refresh is None:
        return "no refresh was asked for"
    if system == REFRESH and isinstance(refresh, int) and point.output <= refresh:
        return f"{point.output} tokens end before the first refresh at {refresh}"
    return None


def chosen_systems(names: Sequence[str] | None, points: Sequence[Point], refresh: Refresh, student: bool) -> list[str]:
    """The systems to measure, in the order of `SYSTEMS`; None: all that can be measured at some point.

    Raises UserError for a name that is not known, or asked for where no point of the grid allows it.
    """
    possible = [name for name in SYSTEMS if student or name in ALONE]
    fitting = [name for name in possible if not all(unfit(name, point, refresh) for point in points)]
    for name in names or ():
        if name not in SYSTEMS:
            raise UserError(f"--systems: {name!r} is not known; known: {', '.join(SYSTEMS)}")
        if name not in possible:
            raise UserError(f"--systems: {name} needs a student; give a student folder or a ratio, --shape NAME:0.45")
        if name not in fitting:
            raise UserError(f"--systems: {name} cannot be measured: {unfit(name, points[0], refresh)}")
    return fitting if names is None else [name for name in SYSTEMS if name in names]


def step_bytes(
    system: str, full: ModelShape, student: ModelShape | None, point: Point, refresh: Refresh = None
) -> int | None:
    """Bytes that a decode step must read, on average over the output; None where that depends on the tokens.

    A refresh takes the place of every n-th step: one pass of the full model over all its matrices and the cache.
    """
    if system in (EXACT, ASSISTED) or (system == REFRESH and not isinstance(refresh, int)):
        return None
    model = full if system in ALONE else student
    if model is None:
        raise ValueError(f"{system} needs a student's shape")
    step = model.decode_bytes(point.dtype, point.mean_context, point.batch)
    if system != REFRESH or not isinstance(refresh, int):
        return step
    full_step = full.decode_bytes(point.dtype, point.mean_context, point.batch)
    share = students_share(system, point, refresh)
    return round(share * step + (1 - share) * full_step)


def students_share(system: str, point: Point, refresh: Refresh = None) -> float:
    """Share of the decode steps at a point that are the decoding model's own; the others are refreshes."""
    if system != REFRESH or not isinstance(refresh, int):
        return 1.0
    steps = max(1, point.output - 1)
    return 1 - (steps // refresh) / steps
