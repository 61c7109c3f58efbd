"""Training metrics as sums, so that a mean is taken once: over tokens, across micro-batches and workers."""

from __future__ import annotations

import time

import torch

from overfill.distillation import LossTerms
from pipeline.training.distributed import Place

TERMS = ("loss", "kl", "kv", "ce")


class LossSums:
    """Sums and counts of loss terms since the last `means`."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._sums = torch.zeros(len(TERMS), 2, dtype=torch.float64, device=place.device)

    def add(self, terms: LossTerms) -> None:
        """Add a micro-batch. Nothing is copied from the device."""
        for row, name in enumerate(TERMS):
            if name in terms:
                total, count = terms[name]
                self._sums[row, 0] += total.detach()
                self._sums[row, 1] += count

    def means(self) -> dict[str, float]:
        """Mean per token of every term that was counted, over all workers; starts anew. A collective."""
        sums = self._place.sum(self._sums).tolist()
        self._sums.zero_()
        return {name: total / count for name, (total, count) in zip(TERMS, sums, strict=True) if count > 0}


class Rate:
    """Tokens per second since it was last asked. As a context manager it leaves out the time spent inside."""

    def __init__(self) -> None:
        self._tokens = 0
        self._since = self._paused = time.perf_counter()

    def add(self, tokens: int) -> None:
        """Count tokens."""
        self._tokens += tokens

    def __enter__(self) -> None:
        """Begin a pause: work that is not training."""
        self._paused = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        """End it: its time does not count."""
        self._since += time.perf_counter() - self._paused

    def read(self) -> float:
        """Tokens per second; starts anew."""
        now = time.perf_counter()
        rate = self._tokens / max(1e-9, now - self._since)
        self._tokens, self._since = 0, now
        return rate
