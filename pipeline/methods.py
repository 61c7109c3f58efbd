"""The methods of a sweep in the order of a report, in words, and how a plot tells them apart."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """How a method is shown."""

    name: str
    """In words."""
    marker: str
    """Matplotlib's."""
    line: str
    """Matplotlib's."""
    colour: str
    """Of Okabe and Ito's palette, told apart also by colour-blind readers; for charts that have one per method."""
    pruned: bool = True
    """Whether a pruning ratio says anything about it."""
    dodge: float = 0.0
    """Sideways shift in percentage points, so that the bars of two methods at one ratio do not hide each other."""


LOOKS = {
    "full": Look("full model", "*", ":", "#7F7F7F", pruned=False),
    "overfill": Look("OverFill", "o", "-", "#0072B2"),
    "pruned": Look("pruned only", "s", "--", "#D55E00", dodge=0.5),
    "scratch": Look("from scratch", "^", "-.", "#009E73", dodge=-0.5),
}
METHODS = tuple(LOOKS)
METHOD_NAMES = {method: look.name for method, look in LOOKS.items()}
