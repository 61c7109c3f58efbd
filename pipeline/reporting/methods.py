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
    dodge: float = 0.0
    """Sideways shift in percentage points, so that the bars of two methods at one ratio do not hide each other."""
    colour: str = "#7F7F7F"
    """For charts that have one per method; of Okabe and Ito's palette, told apart also by colour-blind readers."""
    pruned: bool = True
    """Whether a pruning ratio says anything about it."""


LOOKS = {
    "full": Look("full model", "*", ":", pruned=False),
    "overfill": Look("OverFill", "o", "-", colour="#0072B2"),
    "assisted": Look("assisted generation", "P", ":", 1.0, "#56B4E9"),
    "pruned": Look("pruned only", "s", "--", 0.5, "#D55E00"),
    "lora": Look("pruned, LoRA", "D", "--", -1.0, "#E69F00"),
    "untrained": Look("pruned, untrained", "v", ":", 0.5, "#CC79A7"),
    "untrained-overfill": Look("OverFill, untrained", "<", ":", colour="#B8A000"),
    "scratch": Look("from scratch", "^", "-.", -0.5, "#009E73"),
    "released": Look("released model", "X", "-.", colour="#8C6D46", pruned=False),
}
METHODS = tuple(LOOKS)
METHOD_NAMES = {method: look.name for method, look in LOOKS.items()}
