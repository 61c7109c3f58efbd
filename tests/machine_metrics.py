"""Which metrics of a training run say something of the machine and not of the run."""

from __future__ import annotations


def of_the_machine(name: str) -> bool:
    """Whether two equal runs may differ in it."""
    return name == "train/tokens_per_second" or name.startswith("system/")
