"""Training metrics as sums, so that a mean is taken once: over tokens, across micro-batches and workers."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from overfill.distillation import LossTerms
from pipeline.training.distributed import Place

TERMS = ("loss", "kl", "kv", "ce")


class LossSums:
    """Sums and counts of loss terms since the last `means`; at first those of `pending`, which rank 0 takes over."""

    def __init__(self, place: Place, pending: Mapping[str, list[float]]) -> None:
        self._place = place
        self._sums = torch.zeros(len(TERMS), 2, dtype=torch.float64, device=place.device)
        for name, pair in pending.items() if place.first else ():
            self._sums[TERMS.index(name)] = torch.tensor(pair, dtype=torch.float64)

    def add(self, terms: LossTerms) -> None:
        """Add a micro-batch. Nothing is copied from the device."""
        for row, name in enumerate(TERMS):
            if name in terms:
                total, count = terms[name]
                self._sums[row, 0] += total.detach()
                self._sums[row, 1] += count

    def totals(self) -> dict[str, list[float]]:
        """[sum, count] of every term that was counted, over all workers. A collective."""
        sums = self._place.sum(self._sums.clone()).tolist()
        return {name: pair for name, pair in zip(TERMS, sums, strict=True) if pair[1] > 0}

    def means(self) -> dict[str, float]:
        """Mean per token of every term that was counted, over all workers; starts anew. A collective."""
        totals = self.totals()
        self._sums.zero_()
        return {name: total / count for name, (total, count) in totals.items()}


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
